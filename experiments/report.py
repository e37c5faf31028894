"""The report of a comparison: one HTML page that needs nothing else, and the same as Markdown with its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dsa_gym import storage
from dsa_gym.experiments import statistics
from dsa_gym.experiments.document import Fold, Page, Picture, Table, cell
from dsa_gym.experiments.pictures import TITLES, curves_picture, pairs_picture, profiles_picture, scores_picture
from dsa_gym.experiments.rows import PARTS, read_row
from dsa_gym.experiments.statistics import Scores


def report(out: Path) -> Path:
    """Write ``report.html``, ``report.md`` and its pictures into a comparison's folder.

    Args:
        out: The folder, with ``grid.json`` and finished cells.

    Returns:
        The page.

    Raises:
        ValueError: If the folder is no comparison, or no cell is finished.
        ImportError: If rliable is missing.
    """
    out = Path(out)
    if not (out / "grid.json").is_file():
        raise ValueError(f"{out}: no grid.json there; expected a folder written by 'dsa-gym compare'")
    grid = storage.read_json(out / "grid.json")
    rows = [read_row(path) for path in sorted(out.glob("cells/*/*/*/row.json"))]
    failed = {str(path.parent.relative_to(out / "cells")): path for path in sorted(out.glob("cells/*/*/*/error.txt"))}
    if not rows:
        raise ValueError(f"{out}: no cell is finished" + (f", {len(failed)} failed" if failed else ""))
    page = build_page(out, grid, rows, failed)
    for _, _, blocks in page.sections:
        for block in blocks:
            if isinstance(block, Picture):
                with storage.atomic_path(out / block.name) as temporary:
                    temporary.write_bytes(block.png)
    storage.write_text(out / "report.md", page.markdown())
    storage.write_text(out / "report.html", page.html())
    return out / "report.html"


def build_page(out: Path, grid: Mapping[str, Any], rows: Sequence[dict[str, Any]], failed: Mapping[str, Path]) -> Page:
    """The report's content."""
    users = pd.read_parquet(out / "users.parquet")
    envs = [env for env in grid["envs"] if any(row["env"] == env for row in rows)]
    scores = {env: {part: Scores.of(users, env, part) for part in PARTS} for env in envs}
    page = Page("Comparison of gating agents")
    cells = len(grid["envs"]) * len(grid["agents"]) * grid["seeds"]
    summary = page.section(2, "Summary")
    summary += [
        f"Agents: {len(grid['agents'])}. Environments: {len(grid['envs'])}. Seeds: {grid['seeds']}. "
        f"Cells: {cells}, of which finished {len(rows)}, failed {len(failed)}.",
        "Scores are normalised: 0 is the best static mask, chosen on training users; 1 is the reference gate, trained "
        "together with the library (on planted instances the exact optimum). The oracle sees the answers and is no "
        "contestant. Brackets are 95 % bootstrap intervals: of the interquartile mean (IQM) over seeds, of the mean "
        "and of differences over users and seeds.",
        _winners(scores),
    ]
    if len(envs) > 1:
        _across(page, scores)
    for env in envs:
        own = [row for row in rows if row["env"] == env]
        _environment(page, out, scores[env], own)
    _failures(page, failed)
    _provenance(page, grid, rows)
    return page


def _winners(scores: Mapping[str, Mapping[str, Scores]]) -> Table:
    rows = []
    for env, parts in scores.items():
        for part, own in parts.items():
            best = (own.contestants or own.agents)[0]
            rows.append([env, TITLES[part], best, cell(own.score[best]), str(len(own.inputs)), str(own.inputs.sum())])
    return Table(["environment", "on", "best agent", "mean score", "users", "inputs"], rows)


def _across(page: Page, scores: Mapping[str, Mapping[str, Scores]]) -> None:
    """Agents over all environments together."""
    blocks = page.section(2, "All environments together")
    for part in PARTS:
        own = [parts[part] for parts in scores.values() if parts[part].scorable]
        agents = [agent for agent in own[0].agents if all(agent in other.rewards for other in own)] if own else []
        matrices = {}
        for agent in agents:
            common = sorted(set.intersection(*(set(other.seeds[agent]) for other in own)))
            if common:
                chosen = [other.runs(agent)[[other.seeds[agent].index(seed) for seed in common]] for other in own]
                matrices[agent] = np.stack(chosen, axis=1)  # (seeds, environments)
        if not matrices:
            continue
        found = statistics.interquartile_mean(matrices)
        found = dict(sorted(found.items(), key=lambda item: -item[1]["mean"]))
        names = ", ".join(other.env for other in own)
        rows = [[agent, cell(found[agent]), *(f"{x:.3f}" for x in matrices[agent].mean(0))] for agent in found]
        blocks.append(f"{TITLES[part].capitalize()}: interquartile mean over seeds and environments ({names}).")
        blocks.append(Table(["agent", "IQM", *(other.env for other in own)], rows))


def _environment(page: Page, out: Path, parts: Mapping[str, Scores], rows: Sequence[dict[str, Any]]) -> None:
    unseen = parts["unseen"]
    env = unseen.env
    page.section(2, env).append([_about(part, own) for part, own in parts.items()])
    for part, own in parts.items():
        page.section(3, f"{env}: {TITLES[part]}").append(_table(own, rows))
    blocks = page.section(3, f"{env}: pictures")
    for name, (png, caption) in _pictures(out, parts).items():
        blocks.append(Picture(f"{env}-{name}.png", png, f"{env}: {caption}"))
    if len(unseen.contestants) > 1:
        page.section(3, f"{env}: the best agent against the others").append(_best_table(parts))
    doubts = page.section(3, f"{env}: what can't be concluded")
    for part, own in parts.items():
        doubts.append(f"{TITLES[part].capitalize()}:")
        doubts.append(statistics.doubts(own) or ["Every pair of agents is told apart at the 95 % level."])


def _about(part: str, scores: Scores) -> str:
    return (
        f"{TITLES[part].capitalize()}: {len(scores.inputs)} users with {scores.inputs.sum()} inputs; reward of the "
        f"best static mask {scores.mean(scores.static):.4f}, of the reference gate "
        f"{scores.mean(scores.reference):.4f}."
    )


def _pictures(out: Path, parts: Mapping[str, Scores]) -> dict[str, tuple[bytes, str]]:
    """Name to PNG and caption."""
    unseen = parts["unseen"]
    found = {
        "scores": (
            scores_picture(parts),
            f"mean {unseen.unit} with its 95 % interval over users and seeds; open circles are single seeds.",
        ),
        "curves": (
            curves_picture(out, unseen.env, unseen.agents),
            "learning curves on validation users, interquartile mean over seeds with 95 % intervals, against "
            "environment steps and against seconds of learning.",
        ),
        "profiles": (
            profiles_picture(parts),
            "performance profiles, the share of users (and seeds) whose score is above a level; further up is better.",
        ),
    }
    if len(unseen.agents) > 1:
        found["pairs"] = (
            pairs_picture(unseen),
            f"{TITLES['unseen']}. Left: difference of mean {unseen.unit}s, row less column, printed where its interval "
            "excludes zero. Right: probability that a run of the row serves a user better than a run of the column.",
        )
    return found


def _table(scores: Scores, rows: Sequence[dict[str, Any]]) -> Table:
    """Agents, the best first."""
    iqm = statistics.interquartile_mean({agent: scores.runs(agent)[:, None] for agent in scores.agents})
    lines = []
    for agent in scores.agents:
        own = [row for row in rows if row["agent"] == agent]
        part = [row[scores.part] for row in own]
        regret = [p["regret"] for p in part if "regret" in p]
        lines.append(
            [
                agent,
                str(len(own)),
                cell(iqm[agent]),
                cell(scores.score[agent]),
                cell(scores.reward[agent], 4),
                f"{np.mean(regret):.4f}" if regret else "-",
                f"{np.mean([p['density'] for p in part]):.3f}",
                f"{np.mean([p['active_parameters'] for p in part]):,.0f}",
                f"{np.mean([row['seconds'] for row in own]):,.1f}",
            ]
        )
    unit = scores.unit
    columns = ["agent", "seeds", f"IQM of {unit}", f"mean {unit}", "reward", "regret", "density", "active parameters",
               "seconds"]  # fmt: skip
    return Table(columns, lines)


def _best_table(parts: Mapping[str, Scores]) -> Table:
    best, *others = parts["unseen"].contestants
    lines = []
    for other in others:
        cells = [f"{best} - {other}"]
        for scores in parts.values():
            value = scores.difference.get((best, other))
            cells += ["-", "-"] if value is None else [cell(value), cell(scores.improvement(best, other), 2)]
        lines.append(cells)
    columns = [f"{what}, {part}" for part in parts for what in ("difference", "probability of improvement")]
    return Table(["pair", *columns], lines)


def _failures(page: Page, failed: Mapping[str, Path]) -> None:
    if not failed:
        return
    blocks = page.section(2, "Failed cells")
    blocks.append(
        "They are in no figure above. `dsa-gym compare` with the same arguments and --retry-failed tries again."
    )
    blocks += [Fold(cell, path.read_text(encoding="utf-8")) for cell, path in failed.items()]


def _provenance(page: Page, grid: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    blocks = page.section(2, "How it was made")
    versions: dict[str, set[str]] = {}
    for row in rows:
        for name, version in row["versions"].items():
            versions.setdefault(name, set()).add(version)
    prints = {row["env"]: row["fingerprint"] for row in rows}
    blocks.append("Versions: " + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()))
    blocks.append("Bundles and instances (SHA-256): " + ", ".join(f"{env} {key[:12]}" for env, key in prints.items()))
    options = {**grid["options"], "envs": grid["envs"], "agents": grid["agents"], "seeds": grid["seeds"]}
    blocks.append(Fold("Settings of the grid", "\n".join(f"{name}: {value}" for name, value in options.items())))
    blocks.append(Fold("Commands that train the cells", "\n".join(row["command"] for row in rows)))
