"""Pictures of a comparison, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from dsa_gym.experiments import statistics
from dsa_gym.experiments.statistics import Interval, Scores
from dsa_gym.experiments.train import read_curve

TITLES = {"unseen": "users never seen", "seen": "seen users, new inputs"}

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's palette, which the colour-blind tell apart; beyond it the line style changes too."""

STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*"
MOST_CURVES = 8
"""Agents whose curves are drawn in colour, the best ones; the others are thin and grey."""


def _look(place: int) -> dict[str, Any]:
    colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]
    return {"color": colour, "ls": style, "lw": 1.8}


def _figure(width: float, height: float, columns: int, *, sharey: bool = False) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False, sharey=sharey)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=140, format="png")
    return buffer.getvalue()


def scores_picture(parts: Mapping[str, Scores]) -> bytes:
    """Mean scores with intervals and single seeds, the best agent on top, a panel per part."""
    agents = parts["unseen"].agents[::-1]
    figure, axes = _figure(11, 1.4 + 0.38 * len(agents), len(parts), sharey=True)
    for axis, (part, scores) in zip(axes, parts.items(), strict=True):
        for place, agent in enumerate(agents):
            value = scores.score[agent]
            colour = COLOURS[0] if part == "unseen" else COLOURS[1]
            ends, runs = [value["low"], value["high"]], scores.runs(agent)
            axis.plot(ends, [place, place], color=colour, lw=6, alpha=0.35, solid_capstyle="butt")
            axis.plot(runs, [place] * len(runs), "o", mfc="none", mec=colour, ms=4, alpha=0.7)
            axis.plot(value["mean"], place, "|", color=colour, ms=16, mew=2.5)
        axis.axvline(0, color="#111827", lw=0.9, ls=":")
        if scores.scorable:
            axis.axvline(1, color="#111827", lw=0.9, ls="--")
        axis.set_title(TITLES[part], fontsize=11)
        axis.set_xlabel("score: 0 best static mask (dotted), 1 reference gate (dashed)" if scores.scorable
                        else "gain in reward over the best static mask")  # fmt: skip
        _clip(axis, [scores.score[agent] for agent in agents])
    axes[0].set_yticks(range(len(agents)), agents)
    return _png(figure)


def _clip(axis: Any, values: Sequence[Interval]) -> None:
    """Leave room for the agents that matter: what is far below the best static mask goes off the left edge."""
    low, high = min(value["low"] for value in values), max(value["high"] for value in values)
    least = min(-0.3 * max(high, 0), -1e-9)
    if low < 4 * least and high > 0:
        off = sum(value["high"] < least for value in values)
        axis.set_xlim(left=least)
        if off:
            axis.annotate(f"{off} off to the left", (0.01, 0.01), xycoords="axes fraction", fontsize=8, color="#4b5563")


def curves_picture(out: Path, env: str, agents: Sequence[str]) -> bytes:
    """Learning curves of a comparison's agents, the best ones first, against steps and against seconds."""
    figure, axes = _figure(11, 4.4, 2, sharey=True)
    tops, bottoms, ends = [], [], []
    for place, agent in enumerate(agents):
        steps, seconds, scores = _curves(out, env, agent)
        if not steps[-1]:  # it does not learn step by step
            continue
        ends.append([steps[-1], seconds[-1]])
        mean, low, high = statistics.learning_curve(scores)
        shown = place < MOST_CURVES
        look = _look(place) if shown else {"color": "#9ca3af", "lw": 0.8}
        for axis, x in zip(axes, (steps, seconds), strict=True):
            axis.plot(x, mean, label=agent if shown else None, marker=MARKERS[place % len(MARKERS)] if shown else None,
                      ms=4, markevery=max(1, len(x) // 10), **look)  # fmt: skip
            if shown:
                axis.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)
        if shown:
            tops.append(mean.max())
            bottoms.append(mean[len(mean) // 4 :].min())
    for place, label in enumerate(("environment steps", "seconds of learning")):
        axis, last = axes[place], [end[place] for end in ends]
        if last and max(last) > 30 * min(last):  # some would be a vertical line
            axis.set_xscale("log")
        axis.axhline(0, color="#111827", lw=0.9, ls=":")
        axis.axhline(1, color="#111827", lw=0.9, ls="--")
        axis.set_xlabel(label)
    axes[0].xaxis.set_major_formatter(EngFormatter())
    axes[0].set_ylabel("normalised score, validation users")
    if tops:
        span = max(*tops, 1.0) - min(*bottoms, 0.0)
        axes[0].set_ylim(max(min(*bottoms, 0.0), -1.0) - 0.05 * span, max(*tops, 1.0) + 0.08 * span)
        axes[1].legend(fontsize=8, loc="lower right")
    else:
        axes[0].annotate("no agent here learns step by step", (0.5, 0.5), xycoords="axes fraction", ha="center")
    return _png(figure)


def _curves(out: Path, env: str, agent: str) -> tuple[Any, Any, Any]:
    """Steps and mean seconds (evaluations,), and validation scores (seeds, evaluations), of the finished runs."""
    folders = sorted(path.parent for path in out.glob(f"cells/{env}/{agent}/*/row.json"))
    curves = [pd.DataFrame(read_curve(folder)) for folder in folders]
    shortest = min(len(curve) for curve in curves)
    cut = [curve.iloc[:shortest] for curve in curves]
    mean = [np.mean([curve[name].to_numpy() for curve in cut], axis=0) for name in ("steps", "seconds")]
    return mean[0], mean[1], np.stack([curve["unseen/normalized_score"].to_numpy() for curve in cut])


def profiles_picture(parts: Mapping[str, Scores]) -> bytes:
    """Performance profiles over users and seeds, a panel per part."""
    figure, axes = _figure(11, 4.4, len(parts), sharey=True)
    for axis, (part, scores) in zip(axes, parts.items(), strict=True):
        best = np.concatenate([scores.users(agent).ravel() for agent in scores.agents[:MOST_CURVES]])
        least, most = np.quantile(best, [0.02, 0.98]).tolist()
        levels = np.linspace(least, most, 81)
        for place, (agent, (share, low, high)) in enumerate(scores.profiles(levels).items()):
            shown = place < MOST_CURVES
            look = _look(place) if shown else {"color": "#9ca3af", "lw": 0.8}
            axis.plot(levels, share, label=agent if shown else None, **look)
            if shown:
                axis.fill_between(levels, low, high, color=look["color"], alpha=0.12, lw=0)
        axis.axvline(0, color="#111827", lw=0.9, ls=":")
        axis.set_title(TITLES[part], fontsize=11)
        axis.set_xlabel(f"{scores.unit} of a user")
    axes[0].set_ylabel("share of users and seeds above")
    axes[0].legend(fontsize=8)
    return _png(figure)


def pairs_picture(scores: Scores) -> bytes:
    """Differences and probabilities of improvement of all pairs."""
    agents, size = scores.agents, len(scores.agents)
    gain, better = np.zeros((size, size)), np.full((size, size), 0.5)
    clear = np.zeros((size, size), dtype=bool)
    for i, one in enumerate(agents):
        for j, other in enumerate(agents):
            if (one, other) not in scores.difference:
                continue
            value = scores.difference[one, other]
            gain[i, j], clear[i, j] = value["mean"], value["low"] > 0 or value["high"] < 0
            better[i, j] = statistics.probability_of_improvement(scores.users(one), scores.users(other))[0]
    figure, axes = _figure(2.6 + 1.1 * size if size < 9 else 13, 1.8 + 0.45 * size, 2)
    bound = float(np.median(np.abs(gain[clear]))) if clear.any() else 1.0
    for axis, values, low, high, shown in (
        (axes[0], gain, -bound, bound, clear),
        (axes[1], better, 0.0, 1.0, ~np.eye(size, dtype=bool)),
    ):
        axis.imshow(values, cmap="PuOr_r", vmin=low, vmax=high, aspect="auto")
        axis.grid(visible=False)
        axis.set_xticks(range(size), agents, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(size), agents, fontsize=8)
        for i, j in zip(*np.nonzero(shown), strict=True):
            dark = abs(values[i, j] - (low + high) / 2) > 0.35 * (high - low)
            text = f"{values[i, j]:.2f}" if low == 0 else _short(values[i, j])
            axis.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=7 if size < 12 else 6,
                color="white" if dark else "#111827",
            )
    axes[0].set_title(f"difference of mean {scores.unit}s", fontsize=10)
    axes[1].set_title("probability of improvement", fontsize=10)
    return _png(figure)


def _short(value: float) -> str:
    """A signed number in four or five characters."""
    size = abs(value)
    return f"{value:+.2f}" if size < 1 else f"{value:+.1f}" if size < 10 else f"{value:+.0f}"
