"""Rows: what is measured of a finished run on fixed inputs of users it never saw and of users it did.

A run's folder gets ``row.json``, the mean rewards of its users in ``users.parquet`` and its decisions in
``masks-unseen.npy`` and ``masks-seen.npy`` (bits packed along the gates). Whoever has the folder can check the row, see
:mod:`dsa_gym.experiments.verify`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dsa_gym import storage
from dsa_gym.experiments.train import TrainConfig, load_run, read_manifest
from dsa_gym.ladder import normalised_score
from dsa_gym.problem import Bits

PARTS = {"unseen": "test", "seen": "seen"}
"""Part of a row to the split that it is measured on."""

IDENTITY = ("env", "agent", "seed")


@dataclass(frozen=True)
class Judgement:
    """What an agent does on one split.

    Attributes:
        measures: ``reward``, ``static`` and ``reference`` (mean rewards), ``normalized_score``, ``loss``,
            ``active_parameters``, ``density``, where the optimum is known ``regret``, and numbers of ``users`` and
            ``inputs``.
        users: One line per user: ``user``, ``inputs`` and the means over them of ``reward``, ``static``, ``reference``.
        masks: The decisions (n, G).
    """

    measures: dict[str, float]
    users: pd.DataFrame
    masks: Bits


def judge(config: TrainConfig, agent: Any, split: str, static: Bits) -> Judgement:
    """Measure an agent on all inputs of a split.

    Args:
        config: The run.
        agent: The trained agent.
        split: Whose inputs.
        static: The best static mask of the training users (G,).
    """
    problem = config.problem(split)
    inputs = np.arange(len(problem))
    masks = agent.masks(problem)
    rewards = {
        "reward": problem.rewards(inputs, masks),
        "static": problem.rewards(inputs, np.tile(static, (len(problem), 1))),
        "reference": problem.rewards(inputs, problem.reference_gates()),
    }
    means = {name: float(value.mean()) for name, value in rewards.items()}
    active = float(problem.active_parameters(masks).mean())
    table = pd.DataFrame({"user": problem.user.numpy(), **rewards}).groupby("user", as_index=False)
    users = table.mean().merge(table.size().rename(columns={"size": "inputs"}))
    measures = {
        **means,
        "normalized_score": float(normalised_score(means["reward"], means["static"], means["reference"])),
        "loss": float(problem.losses(inputs, masks).mean()),
        "active_parameters": active,
        "density": active / float(problem.sizes.sum()),
        "users": len(users),
        "inputs": len(problem),
    }
    if problem.optimum_known:
        measures["regret"] = float(problem.best_rewards(inputs).mean()) - means["reward"]
    return Judgement(measures, users, masks)


def write_row(run: Path, static: Bits) -> dict[str, Any]:
    """Judge a finished run and write its row; ``row.json`` comes last.

    Args:
        run: The run's folder.
        static: The best static mask of the training users (G,).

    Returns:
        The row.

    Raises:
        ValueError: If the folder is no finished run.
    """
    run = Path(run)
    config, agent = load_run(run)
    manifest = read_manifest(run)
    row: dict[str, Any] = {
        **{name: getattr(config, name) for name in (*IDENTITY, "steps")},
        "gates": agent.gates,
        "seconds": manifest["seconds"],
        "fingerprint": fingerprint(manifest["bundle"]),
        "config": manifest["config"],
        "versions": manifest["versions"],
        "command": command(config),
    }
    users = []
    for part, split in PARTS.items():
        judgement = judge(config, agent, split, static)
        path = run / f"masks-{part}.npy"
        storage.write_array(path, np.packbits(judgement.masks, axis=1))
        row[part] = {**judgement.measures, "split": split, "masks_sha256": storage.sha256(path)}
        users.append(judgement.users.assign(part=part))
    write_table(run / "users.parquet", pd.concat(users))
    storage.write_json(run / "row.json", row)
    return row


def read_row(path: Path) -> dict[str, Any]:
    """A row as it was written.

    Args:
        path: ``row.json``, or the run's folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    path = Path(path) / "row.json" if Path(path).is_dir() else Path(path)
    row: dict[str, Any] = storage.read_json(path)
    needed = {*IDENTITY, "steps", "seconds", "fingerprint", "config", "versions", "command", *PARTS}
    if not isinstance(row, dict) or not needed <= set(row) or not all(isinstance(row[part], dict) for part in PARTS):
        raise ValueError(f"{path}: is no row of a comparison, or a damaged one; expected {', '.join(sorted(needed))}")
    return row


def fingerprint(bundle: Mapping[str, Any]) -> str:
    """SHA-256 of what an environment's rewards depend on."""
    return storage.digest([json.dumps(bundle, sort_keys=True).encode()])


def command(config: TrainConfig) -> str:
    """The command that trains a run anew: what differs from the defaults and from the tuned settings."""
    words = ["dsa-gym", "train", "--env", config.env, "--agent", config.agent, "--seed", str(config.seed)]
    names = ("bundle", "steps", "num_envs", "granularity", "l0_penalty", "reward_metric", "evaluate_every")
    for name in names:
        if getattr(config, name) != getattr(TrainConfig, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    tuned = config.tuned
    changed = {name: value for name, value in (config.settings or {}).items() if tuned.get(name) != value}
    for option, values in (("--set", changed), ("--env-set", config.env_settings)):
        if values:
            words += [option, *(f"{name}={json.dumps(value)}" for name, value in values.items())]
    return shlex.join(words)


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as columns; what is nested as JSON."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        if name in PARTS:
            columns |= {f"{name}_{measure}": number for measure, number in value.items()}
        else:
            columns[name] = json.dumps(value) if isinstance(value, dict) else value
    return columns


def write_rows(out: Path, folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Gather the rows of finished runs: ``rows.parquet``, ``rows.csv``, and all their users in ``users.parquet``.

    Raises:
        ValueError: If a row is damaged.
    """
    folders = list(folders)
    rows = [read_row(folder) for folder in folders]
    table = pd.DataFrame([flat(row) for row in rows])
    write_table(out / "rows.parquet", table)
    with storage.atomic_path(out / "rows.csv") as temporary:
        table.to_csv(temporary, index=False)
    users = [
        read_users(folder).assign(**{name: row[name] for name in IDENTITY})
        for folder, row in zip(folders, rows, strict=True)
    ]
    write_table(out / "users.parquet", pd.concat(users) if users else pd.DataFrame())
    return rows


def read_users(run: Path) -> pd.DataFrame:
    """Mean rewards of a run's users by part: columns as in :attr:`Judgement.users`, and ``part``.

    Raises:
        FileNotFoundError: If they are missing.
        ValueError: If they are damaged.
    """
    path = Path(run) / "users.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        users = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as Parquet: {error}") from error
    needed = {"user", "inputs", "reward", "static", "reference", "part"}
    if not needed <= set(users.columns):
        raise ValueError(f"{path}: expected columns {', '.join(sorted(needed))}")
    return users


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as Parquet, atomically."""
    with storage.atomic_path(path) as temporary:
        table.reset_index(drop=True).to_parquet(temporary)
