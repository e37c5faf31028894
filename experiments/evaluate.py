"""Evaluation of finished runs: the ladder with intervals, the controls, a table, a plot and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dsa_gym import storage
from dsa_gym.experiments.train import TrainConfig, load_run
from dsa_gym.ladder import bootstrap as resample
from dsa_gym.ladder import build_ladder, interval, normalised_score, shuffled, summarise

RUNGS = {
    "none": "nothing on",
    "all": "everything on",
    "random": "random, same density",
    "static": "best static mask",
    "user_static": "best mask per user",
    "reference": "reference gate",
    "agent": "agent",
    "oracle_crossfit": "oracle, cross-fitted",
    "oracle": "oracle",
}


def evaluate(runs: Sequence[Path], split: str = "test") -> dict[str, Any]:
    """Judge one run, or several seeds of one configuration, on held-out inputs.

    Args:
        runs: Finished runs that differ in their seed only.
        split: ``test`` or ``validation``; the same users' ladder for ``seen`` is always added.

    Returns:
        The summary of ``split`` (see :func:`dsa_gym.ladder.summarise`) with ``controls``, ``density`` and
        ``active_parameters``, the same of the seen users under ``seen``, and what it was measured on.

    Raises:
        ValueError: If the runs do not belong together, or ``split`` is unknown.
    """
    if split not in ("test", "validation", "seen"):
        raise ValueError(f"split={split!r}: expected test, validation or seen")
    loaded = [load_run(Path(run)) for run in runs]
    configs = [config for config, _ in loaded]
    reference = {**vars(configs[0]), "seed": None}
    if len({config.seed for config in configs}) < len(configs):
        raise ValueError(f"runs: seeds {[config.seed for config in configs]}, expected each of them once")
    for run, config in zip(runs, configs, strict=True):
        if {**vars(config), "seed": None} != reference:
            raise ValueError(f"run={str(run)!r}: differs from {str(runs[0])!r} in more than its seed")
    result = _judge(configs[0], [agent for _, agent in loaded], split)
    if split != "seen":
        result["seen"] = _judge(configs[0], [agent for _, agent in loaded], "seen")
    manifests = [storage.read_json(Path(run) / "run.json") for run in runs]
    result["runs"] = [
        {"run": Path(run).name, "seed": config.seed, "seconds": manifest["seconds"]}
        for run, config, manifest in zip(runs, configs, manifests, strict=True)
    ]
    result["config"] = manifests[0]["config"]
    result["bundle"] = manifests[0]["bundle"]
    result["versions"] = storage.versions()
    return result


def _judge(config: TrainConfig, agents: Sequence[Any], split: str) -> dict[str, Any]:
    problem, train = config.problem(split), config.problem("train")
    masks = [agent.masks(problem) for agent in agents]
    inputs = np.arange(len(problem))
    rewards = np.stack([problem.rewards(inputs, mask) for mask in masks])
    active = np.mean([problem.active_parameters(mask).mean() for mask in masks])
    ladder = build_ladder(problem, train, density=float(np.mean(masks)))
    result = summarise(ladder, agent=rewards)
    ways = {"shuffled_users": "users", "shuffled_inputs": "inputs"}
    if result["users"] < 2:
        del ways["shuffled_users"]
    controls = {
        name: np.mean([shuffled(problem, mask, over=over) for mask in masks], axis=0) for name, over in ways.items()
    }
    drawn = resample({**controls, "static": ladder.rewards["static"]}, ladder.users)
    result["controls"] = {"shuffled_users": None} | {
        name: {
            **interval(float(value.mean()), drawn[name]),
            "gain_over_static": interval(
                float((value - ladder.rewards["static"]).mean()), drawn[name] - drawn["static"]
            ),
        }
        for name, value in controls.items()
    }
    result["split"] = split
    result["active_parameters"] = float(active)
    result["density"] = float(active / problem.sizes.sum())
    static, reference = (ladder.rewards[name].mean() for name in ("static", "reference"))
    result["normalized_score_per_seed"] = [float(normalised_score(r.mean(), static, reference)) for r in rewards]
    return result


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the ladders of unseen and seen users side by side."""
    console = console or Console()
    parts = [part for part in (result, result.get("seen")) if part is not None]
    title = f"{result['config']['agent']} on {result['config']['env']}: reward, 95 % intervals over users"
    table = Table(title=title)
    table.add_column("rung")
    digits = 3 if abs(result["ladder"]["static"]["mean"]) >= 1 else 5  # squared errors are small
    for part in parts:
        table.add_column(f"{part['split']} ({part['users']} users, {part['inputs']} inputs)", justify="right")
    for name, label in RUNGS.items():
        if name in result["ladder"]:
            table.add_row(label, *[_cell(part["ladder"].get(name), digits) for part in parts])
    table.add_section()
    table.add_row("agent, masks of other users", *[_cell(part["controls"]["shuffled_users"], digits) for part in parts])
    table.add_row(
        "agent, masks of other inputs", *[_cell(part["controls"]["shuffled_inputs"], digits) for part in parts]
    )
    table.add_section()
    table.add_row("headroom (reference - static)", *[_cell(part["headroom"], digits) for part in parts])
    table.add_row("gain over static", *[_cell(part["gain_over_static"], digits) for part in parts])
    table.add_row("normalised score", *[_score(part) for part in parts])
    table.add_row("density", *[f"{part['density']:.3f}" for part in parts])
    table.add_row("active parameters", *[f"{part['active_parameters']:,.0f}" for part in parts])
    console.print(table)
    console.print(f"Oracle: {result['oracle_kind']}; on real data it is inflated by label noise.")


def _score(part: dict[str, Any]) -> str:
    """The normalised score, or a dash where the reference is not above static and it means nothing."""
    return _cell(part["normalized_score"], 2) if part["headroom"]["mean"] > 0 else "-"


def _cell(value: dict[str, float] | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the ladder as points with intervals, unseen and seen users apart."""
    parts = [part for part in (result, result.get("seen")) if part is not None]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    colours = {"agent": "#c2410c", "reference": "#1d4ed8", "static": "#111827"}
    for axis, part in zip(axes, parts, strict=True):
        rows = [name for name in RUNGS if name in part["ladder"] and name != "all"]
        for place, name in enumerate(rows):
            value = part["ladder"][name]
            axis.plot(
                [value["low"], value["high"]], [place, place], color=colours.get(name, "#9ca3af"), lw=3, alpha=0.6
            )
            axis.plot(value["mean"], place, "o", color=colours.get(name, "#6b7280"), ms=7)
            axis.annotate(f"{value['mean']:.4g}", (value["mean"], place), (0, 7), textcoords="offset points",
            ha="center",
                          fontsize=8)  # fmt: skip
        axis.axvline(part["ladder"]["static"]["mean"], color="#111827", lw=0.8, ls=":")
        axis.set_yticks(range(len(rows)), [RUNGS[name] for name in rows])
        kind = "seen users, new inputs" if part["split"] == "seen" else f"unseen users ({part['split']})"
        axis.set_title(f"{kind}\nnormalised score {_score(part)}", fontsize=10)
        axis.set_xlabel("reward; all-on left out: " + f"{part['ladder']['all']['mean']:.4g}")
        axis.grid(axis="x", alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    agent, env = result["config"]["agent"], result["config"]["env"]
    figure.suptitle(f"{agent} on {env}: the ladder, {len(result['runs'])} seed(s), 95 % bootstrap intervals over users")
    with storage.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
