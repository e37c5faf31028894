"""Check of rows: the saved agent decides as the row says, and its decisions earn what the row says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsa_gym import storage
from dsa_gym.experiments.compare import static_mask
from dsa_gym.experiments.rows import IDENTITY, PARTS, fingerprint, judge, read_row, read_users
from dsa_gym.experiments.train import TrainConfig, load_run, read_manifest
from dsa_gym.problem import Bits

TOLERANCE = 1e-6
"""Difference of a mean reward that a model's batches may make; tables and planted instances reproduce it exactly."""


def verify(path: Path) -> dict[str, str | None]:
    """Check rows.

    Args:
        path: A row (``row.json``), its run's folder, or a comparison's folder, all of whose rows are checked.

    Returns:
        Run's folder to None where the row is reproduced, or the reason why it is refused.

    Raises:
        ValueError: If there is no row there.
    """
    path = Path(path)
    if path.name == "row.json" or (path / "row.json").is_file():
        folders = [path.parent if path.name == "row.json" else path]
    else:
        folders = [row.parent for row in sorted(path.glob("cells/*/*/*/row.json"))]
    if not folders:
        raise ValueError(f"{path}: no row there; expected a row.json, its folder, or one written by 'dsa-gym compare'")
    static: dict[str, Bits] = {}
    return {str(folder): _refusal(folder, static) for folder in folders}


def _refusal(run: Path, static: dict[str, Bits]) -> str | None:
    """Why a row is refused; ``static`` keeps the best static masks of environments that were searched already."""
    try:
        row = read_row(run)
        config, agent = load_run(run)
        return _identity(row, run, config) or _parts(row, run, config, agent, static)
    except (ValueError, OSError, KeyError, TypeError) as error:
        return " ".join(str(error).split()) or type(error).__name__


def _identity(row: dict[str, Any], run: Path, config: TrainConfig) -> str | None:
    """Whether row and run are of the same configuration and bundle."""
    manifest = read_manifest(run)
    expected = {
        **{name: getattr(config, name) for name in (*IDENTITY, "steps")},
        "config": manifest["config"],
        "fingerprint": fingerprint(manifest["bundle"]),
        "seconds": manifest["seconds"],
        "versions": manifest["versions"],
    }
    differ = [name for name, value in expected.items() if row[name] != value]
    return f"{differ[0]}: the row says {row[differ[0]]!r}, the run {expected[differ[0]]!r}" if differ else None


def _parts(row: dict[str, Any], run: Path, config: TrainConfig, agent: Any, static: dict[str, Bits]) -> str | None:
    """Whether decisions, rewards and users are reproduced, split by split in the order in which they were made."""
    key = f"{config.env} {config.env_arguments}"
    if key not in static:
        static[key] = static_mask(config)
    users = read_users(run)
    for part, split in PARTS.items():
        judgement = judge(config, agent, split, static[key])
        masks = run / f"masks-{part}.npy"
        if storage.sha256(masks) != row[part].get("masks_sha256"):
            return f"{masks.name}: is not the file that the row names by its SHA-256"
        if not np.array_equal(storage.read_array(masks), np.packbits(judgement.masks, axis=1)):
            return f"{part}: the saved agent decides otherwise than the masks of the row"
        exact = config.problem(split).optimum_known
        for name, value in judgement.measures.items():
            said = row[part].get(name)
            if not isinstance(said, int | float) or not abs(said - value) <= _allowed(name, value, exact):
                return f"{part}: {name} is {value!r}, the row says {said!r}"
        columns = judgement.users.columns
        stored = users[users["part"] == part][columns].reset_index(drop=True)
        if len(stored) != len(judgement.users) or not np.allclose(stored, judgement.users, rtol=0, atol=TOLERANCE):
            return f"{part}: users.parquet does not hold the rewards of the users"
    return None


def _allowed(name: str, value: float, exact: bool) -> float:
    """Tolerance of a measure. A score divides by the headroom, which may be a thousandth of a reward."""
    if exact:
        return 1e-12 * max(1.0, abs(value))  # another processor may add in another order
    return 1e-3 * max(1.0, abs(value)) if name == "normalized_score" else TOLERANCE * max(1.0, abs(value))


def verified(folders: Sequence[Path]) -> tuple[list[Path], dict[str, str]]:
    """Runs of comparisons whose rows are reproduced, and those that are refused with the reason."""
    checked: dict[str, str | None] = {}
    for folder in folders:
        checked |= verify(folder)
    accepted = [Path(run) for run, reason in checked.items() if reason is None]
    return accepted, {run: reason for run, reason in checked.items() if reason is not None}
