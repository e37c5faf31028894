"""Whether a bundle is worth a study: the ladder without an agent, over prices and granularities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dsa_gym import storage
from dsa_gym.bundle import Bundle
from dsa_gym.domains import domain_class
from dsa_gym.ladder import build_ladder, summarise
from dsa_gym.masks import GRANULARITIES
from dsa_gym.problem import GatingProblem

PRICES = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Prices that are looked at, as multiples of the domain's."""


def headroom(
    bundle: Bundle,
    split: str = "test",
    *,
    prices: Sequence[float] = PRICES,
    granularities: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the ladder without an agent at several prices of a parameter and granularities of the gates.

    Args:
        bundle: The bundle.
        split: The inputs it is measured on.
        prices: lambda as multiples of the domain's default, each >= 0.
        granularities: Those to look at; none for the one that the library was trained under. Finer ones are scored
            through the model, and fixed masks and oracle are then searched greedily, which takes minutes.
        device: Where the model runs.
        seed: Seeds random masks and the bootstrap.

    Returns:
        ``rows``: one for each granularity and price, with ``granularity``, ``l0_penalty``, ``density`` of the
        reference and what :func:`dsa_gym.ladder.summarise` returns; the bundle's data checksums, split, seed, versions.

    Raises:
        ValueError: If an argument is out of range, or a granularity is coarser than the trained one.
    """
    wrong = [price for price in prices if not 0 <= price < float("inf")]
    if wrong or not prices:
        raise ValueError(f"prices={list(prices)}: expected one or more finite multiples >= 0")
    trained = bundle.manifest["granularity"]
    for name in granularities:
        if name not in GRANULARITIES or GRANULARITIES.index(name) < GRANULARITIES.index(trained):
            finer = GRANULARITIES[GRANULARITIES.index(trained) :]
            raise ValueError(f"granularities: {name!r}, expected some of {', '.join(finer)}")
    rows = []
    for granularity in granularities or (trained,):
        for price in prices:
            settings: dict[str, Any] = {"granularity": granularity, "l0_penalty": price * bundle.l0_penalty}
            problem, train = (GatingProblem(bundle, name, device=device, **settings) for name in (split, "train"))
            density = float(problem.active_parameters(problem.reference_gates()).mean() / bundle.shape.size)
            summary = summarise(build_ladder(problem, train, density=density, seed=seed), seed=seed)
            rows.append({**settings, "density": density, **summary})
    return {
        "bundle": bundle.manifest["data"],
        "domain": bundle.domain,
        "unit": domain_class(bundle.domain).unit,
        "split": split,
        "seed": seed,
        "rows": rows,
        "versions": storage.versions(),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print one line for each granularity and price."""
    table = Table(title=f"headroom in {result['unit']}, {result['split']}: {result['rows'][0]['users']} users")
    for name in ("gates", "lambda", "static", "reference", "headroom", "best per user", "oracle", "density"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        means = {name: value["mean"] for name, value in row["ladder"].items()}
        gain, oracle = row["headroom"], "oracle_crossfit" if "oracle_crossfit" in means else "oracle"
        table.add_row(
            row["granularity"],
            f"{row['l0_penalty']:.2g}",
            *(f"{means[name]:.4f}" for name in ("static", "reference")),
            f"{gain['mean']:.4f} [{gain['low']:.4f}, {gain['high']:.4f}]",
            *(f"{means[name]:.4f}" for name in ("user_static", oracle)),
            f"{row['density']:.3f}",
        )
    console.print(table)
    kind = result["rows"][0]["oracle_kind"]
    console.print(f"Oracle: {kind}, cross-fitted where the halves of the loss are measured.")
    if any(row["headroom"]["low"] > 0 for row in result["rows"]):
        console.print("The reference gate beats the best fixed mask: there is something to learn.")
    else:
        console.print("The reference gate is nowhere above the best fixed mask: an agent has nothing to learn here.")


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw what every rung earns over the best fixed mask, against the price."""
    kinds = list(dict.fromkeys(row["granularity"] for row in result["rows"]))
    figure = Figure(figsize=(5.2 * len(kinds), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    rungs = {
        "random": ("random masks", "#9ca3af"),
        "user_static": ("best mask per user", "#0f766e"),
        "reference": ("reference gate", "#1d4ed8"),
        "oracle_crossfit": ("oracle, cross-fitted", "#c2410c"),
    }
    for axis, kind in zip(axes, kinds, strict=True):
        rows = [row for row in result["rows"] if row["granularity"] == kind]
        price = [row["l0_penalty"] for row in rows]
        for rung, (label, colour) in rungs.items():
            if rung in rows[0]["ladder"]:
                gains = [row["ladder"][rung]["mean"] - row["ladder"]["static"]["mean"] for row in rows]
                axis.plot(price, gains, "o-", color=colour, label=label)
        axis.fill_between(
            price,
            [row["headroom"]["low"] for row in rows],
            [row["headroom"]["high"] for row in rows],
            color=rungs["reference"][1],
            alpha=0.15,
        )
        axis.axhline(0, color="#111827", lw=0.8, ls=":")
        axis.set_title(f"gates: {kind}", fontsize=10)
        axis.set_xlabel("price of an active parameter, lambda")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"over the best fixed mask, {result['unit']}")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"headroom: {result['domain']} bundle, {result['split']}")
    with storage.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
