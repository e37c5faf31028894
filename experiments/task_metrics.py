"""Task metrics of a bundle's users: the bare backbone, the shared library, the personal change, and baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsa_gym import storage
from dsa_gym.bundle import Bundle
from dsa_gym.data import read_interactions
from dsa_gym.domains import take
from dsa_gym.ladder import bootstrap, interval
from dsa_gym.problem import GatingProblem
from dsa_gym.recommenders import ItemNeighbours, Items, popularity


def task_metrics(
    bundle: Bundle, split: str = "test", *, interactions: Path | None = None, batch_size: int = 256
) -> dict[str, Any]:
    """Measure every task metric of the bundle's domain on a split, under the reference gate where adapters are on.

    Args:
        bundle: The bundle.
        split: Its split.
        interactions: Recommendation only: the file that the bundle was made of. Popularity and item-kNN are then fitted
            on the interactions of its train users that are not held out, and ranked on the same inputs.
        batch_size: Rows per forward.

    Returns:
        Metric to row (``backbone``, ``shared``, ``personal``, baselines) to mean with its 95 % interval, bootstrapped
        over users; and versions, split and number of inputs.

    Raises:
        ValueError: If ``split`` is unknown or ``interactions`` is given for another domain.
    """
    problem = GatingProblem(bundle, split, device="cpu")
    domain, mask = problem.model.domain, problem.space.expand(torch.from_numpy(problem.reference_gates()).float())
    everybody: dict[str, Tensor | None] = {"backbone": None, "shared": bundle.phi_meta[None]}
    scored: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in domain.metrics}
    for metric in domain.metrics:
        for row in (*everybody, "personal"):
            pieces = []
            for part in torch.arange(len(problem)).split(batch_size):
                examples = take(bundle.examples, problem.rows[part])
                phi, owners = (everybody[row], None) if row in everybody else problem.parameters(problem.user[part])
                masks = None if phi is None else mask[part]
                pieces.append(problem.model.metric(metric, examples, phi, masks, owners))
            scored[metric][row] = torch.cat(pieces).double().numpy()
    if interactions is not None:
        if bundle.domain != "recommendation":
            raise ValueError(f"interactions={str(interactions)!r}: the bundle is of domain {bundle.domain!r}")
        recommendation: Any = domain
        examples = take(bundle.examples, problem.rows)
        for row, baseline in _baselines(bundle, interactions).items():
            scores = _scores(problem, baseline)
            for metric in domain.metrics:
                scored[metric][row] = recommendation.ranking(metric, scores, examples).double().numpy()
    users = problem.user.numpy()
    result: dict[str, Any] = {"bundle": bundle.manifest["data"], "split": split, "inputs": len(problem), "seed": 0}
    result["metrics"] = {
        metric: {row: interval(float(values[row].mean()), sample) for row, sample in bootstrap(values, users).items()}
        for metric, values in scored.items()
    }
    return result | {"versions": storage.versions()}


Scores = Callable[[Sequence[Items]], Tensor]


def _baselines(bundle: Bundle, path: Path) -> dict[str, Scores]:
    """Scores of all items (rows, items) for histories of item indices, by baselines fitted on the train users."""
    everyone, _ = read_interactions([path], user_core=1, item_core=1)
    items = {item: index for index, item in enumerate(bundle.make_domain().items)}
    group = dict(zip(bundle.users, bundle.manifest["groups"], strict=True))
    held = bundle.manifest["config"]["splits"]["unseen"]
    trained = []
    for user in everyone:
        known = [items[item] for item in user.items if item in items]
        if group.get(user.user) == "train" and known:
            trained.append(known[: max(1, len(known) - round(held * len(known)))])
    if not trained:
        raise ValueError(f"interactions={str(path)!r}: none of the bundle's {len(group)} users is there")
    counts, neighbours = popularity(trained, len(items)), ItemNeighbours(trained, len(items))
    return {
        "popularity": lambda histories: counts.expand(len(histories), -1),
        "item-kNN": neighbours.scores,
    }


def _scores(problem: GatingProblem, scores: Scores) -> Tensor:
    """A baseline's scores for every place of the problem's inputs, (n, targets, items)."""
    domain: Any = problem.model.domain
    examples = take(problem.bundle.examples, problem.rows)
    rows = list(zip(examples["tokens"].tolist(), examples["length"].tolist(), strict=True))
    places = range(1, domain.targets + 1)
    return torch.stack([scores([[token - 1 for token in row[1 : n + step]] for row, n in rows]) for step in places], 1)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table."""
    rows = next(iter(result["metrics"].values()))
    table = Table(title=f"task metrics, {result['split']}, {result['inputs']} inputs")
    for name in ("", *rows):
        table.add_column(name)
    for metric, values in result["metrics"].items():
        cells = [f"{v['mean']:.4f} [{v['low']:.4f}, {v['high']:.4f}]" for v in values.values()]
        table.add_row(metric, *cells)
    console.print(table)
