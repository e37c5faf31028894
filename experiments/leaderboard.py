"""The leaderboard: agents of one or several comparisons, from verified rows only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dsa_gym import storage
from dsa_gym.experiments import statistics
from dsa_gym.experiments.document import Page, Table, cell
from dsa_gym.experiments.rows import PARTS, command, read_row, read_users
from dsa_gym.experiments.statistics import Scores
from dsa_gym.experiments.train import TrainConfig
from dsa_gym.experiments.verify import verified


def leaderboard(folders: Sequence[Path], out: Path) -> dict[str, str]:
    """Verify the rows of comparisons and write the leaderboard of those that are reproduced.

    Args:
        folders: Comparisons' folders.
        out: The Markdown file.

    Returns:
        Refused runs with the reason.

    Raises:
        ValueError: If no row is verified.
        ImportError: If rliable is missing.
    """
    accepted, refused = verified(folders)
    if not accepted:
        raise ValueError(f"no row is verified: {next(iter(refused.items()))}")
    entries = [(read_row(run), read_users(run)) for run in accepted]
    storage.write_text(out, build_page(entries).markdown())
    return refused


def build_page(entries: Sequence[tuple[dict[str, Any], pd.DataFrame]]) -> Page:
    """The leaderboard's content.

    Args:
        entries: Verified rows with their users.
    """
    page = Page("Leaderboard")
    page.section(2, "How to read it").append(
        "Scores are normalised: 0 is the best static mask, chosen on training users; 1 is the reference gate, trained "
        "together with the library (on planted instances the exact optimum). IQM: interquartile mean over seeds, with "
        "its stratified bootstrap interval; mean: with its interval over users and seeds; both 95 %. Every row was "
        "reproduced from its saved agent by `dsa-gym verify`; this file is written by `dsa-gym leaderboard`."
    )
    problems: dict[str, list[tuple[dict[str, Any], pd.DataFrame]]] = {}
    for row, users in entries:
        problems.setdefault(problem_name(row), []).append((row, users))
    for name, own in problems.items():
        config = _named(TrainConfig(**own[0][0]["config"]))
        shipped = "shipped bundle" if "bundle" in config.takes else "generated"
        _problem(page, f"{name} ({f'bundle {config.bundle}' if config.bundle else shipped})", own)
    return page


def problem_name(row: Mapping[str, Any]) -> str:
    """What rows of one section have in common: the environment, its arguments and what they are over."""
    config = TrainConfig(**row["config"])
    arguments = {name: value for name, value in config.env_arguments.items() if name != "bundle"}
    default = TrainConfig(env=config.env).env_arguments
    changed = [f"{name}={value}" for name, value in arguments.items() if default.get(name) != value]
    return f"{row['env']}{' with ' + ', '.join(changed) if changed else ''}, {row['fingerprint'][:12]}"


def entry_name(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """An agent's name, with its steps and settings where another entry has other ones."""
    same = [other for other in others if other["agent"] == row["agent"]]
    name = str(row["agent"])
    if len({other["steps"] for other in same}) > 1:
        name += f", {row['steps']:,} steps"
    settings = {json.dumps(other["config"]["settings"], sort_keys=True) for other in same}
    if len(settings) > 1:
        name += f", {storage.digest([json.dumps(row['config']['settings'], sort_keys=True).encode()])[:6]}"
    return name


def _problem(page: Page, name: str, entries: Sequence[tuple[dict[str, Any], pd.DataFrame]]) -> None:
    rows = [row for row, _ in entries]
    of_entry: dict[str, dict[int, dict[str, Any]]] = {}
    frames: dict[tuple[str, int], pd.DataFrame] = {}
    for row, users in entries:
        entry = entry_name(row, rows)
        of_entry.setdefault(entry, {})[row["seed"]] = row  # the same run in two comparisons counts once
        frames[entry, row["seed"]] = users.assign(env=row["env"], agent=entry, seed=row["seed"])
    everything = pd.concat(frames.values())
    parts = {part: Scores.of(everything, rows[0]["env"], part) for part in PARTS}
    unseen, seen = parts["unseen"], parts["seen"]
    iqm = statistics.interquartile_mean({agent: unseen.runs(agent)[:, None] for agent in unseen.agents})
    lines = []
    for agent in unseen.agents:
        own = list(of_entry[agent].values())
        lines.append(
            [
                agent,
                str(len(own)),
                cell(iqm[agent]),
                cell(unseen.score[agent]),
                cell(seen.score[agent]),
                cell(unseen.reward[agent], 4),
                f"{np.mean([row['unseen']['density'] for row in own]):.3f}",
                f"{own[0]['steps']:,}",
                f"{np.mean([row['seconds'] for row in own]):,.0f}",
            ]
        )
    unit = unseen.unit
    scored = [f"IQM of {unit}, unseen", f"mean {unit}, unseen", f"mean {unit}, seen"]
    columns = ["agent", "seeds", *scored, "reward, unseen", "density", "steps", "seconds"]
    blocks = page.section(2, name)
    blocks.append(
        f"{len(unseen.inputs)} unseen users with {unseen.inputs.sum()} inputs, {len(seen.inputs)} seen ones with "
        f"{seen.inputs.sum()}. Reward on unseen users: best static mask {unseen.mean(unseen.static):.4f}, "
        f"reference gate {unseen.mean(unseen.reference):.4f}."
    )
    blocks.append(Table(columns, lines))
    if found := statistics.doubts(unseen):
        blocks += ["What can't be concluded on unseen users:", found]
    first = [TrainConfig(**next(iter(of_entry[agent].values()))["config"]) for agent in unseen.agents]
    blocks += ["The first seed of each:", [f"`{command(_named(config))}`" for config in first]]


def _named(config: TrainConfig) -> TrainConfig:
    """A run's configuration with its bundle's name in the place of where it was on some machine."""
    return config if config.bundle is None else replace(config, bundle=Path(config.bundle).name)
