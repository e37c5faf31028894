"""The ladder: how every gate is judged, on the same held-out inputs, with its controls and intervals.

    nothing on -> everything on -> random masks of the same density -> best static mask -> best mask per user
    -> the bundle's reference gate -> the agent -> the oracle

The normalised score of a gate is ``(gate - static) / (reference - static)``. Intervals are bootstrapped over users,
paired on inputs, and over seeds where there are several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsa_gym import search
from dsa_gym.model import all_gates
from dsa_gym.planted import PlantedProblem
from dsa_gym.problem import Bits
from dsa_gym.search import Problem

Rewards = NDArray[np.float64]


@dataclass(frozen=True)
class Ladder:
    """Masks and rewards of the rungs on one split.

    Attributes:
        users: User of each input (n,).
        rewards: Rung name to rewards: (n,), or (seeds, n) for a rung with several seeds.
        masks: Rung name to gates (n, G), the same names but for ``oracle_crossfit``.
        oracle_kind: How the oracle was searched, see :func:`dsa_gym.search.kind`.
    """

    users: NDArray[np.int64]
    rewards: dict[str, Rewards]
    masks: dict[str, Bits]
    oracle_kind: str


def build_ladder(problem: Problem, train: Problem, *, density: float, seed: int = 0) -> Ladder:
    """Score the rungs that need no agent.

    Args:
        problem: The held-out inputs.
        train: Inputs of training users, on which the static mask is chosen.
        density: Share of gates that the random masks switch on.
        seed: Seeds the random masks.
    """
    n, gates = len(problem), problem.gates
    inputs = np.arange(n)
    generator = np.random.default_rng(seed)
    per_user = search.best_per_user(problem.support())
    masks: dict[str, Bits] = {
        "none": np.zeros((n, gates), dtype=np.uint8),
        "all": np.ones((n, gates), dtype=np.uint8),
        "random": (generator.random((n, gates)) < density).astype(np.uint8),
        "static": np.tile(search.best_static(train), (n, 1)),
        "user_static": np.stack([per_user[int(user)] for user in problem.user]),
        "reference": problem.reference_gates(),
        "oracle": search.oracle(problem),
    }
    rewards = {name: problem.rewards(inputs, mask) for name, mask in masks.items()}
    crossfit = crossfitted_oracle(problem)
    if crossfit is not None:
        rewards["oracle_crossfit"] = crossfit
    return Ladder(problem.user.numpy(), rewards, masks, search.kind(problem))


def crossfitted_oracle(problem: Problem) -> Rewards | None:
    """Oracle whose mask is chosen on half of an input's scored elements and scored on the other half, (n,).

    The plain oracle's gain is mostly label noise; this one is free of it, at the price of choosing on half the
    labels. None where the bundle has not measured the halves of this split at this granularity.
    """
    if isinstance(problem, PlantedProblem) or problem.table is None or problem.even_table is None:
        return None
    even = np.asarray(problem.even_table, dtype=np.float64)
    odd = np.asarray(problem.table, dtype=np.float64) - even
    price = problem.l0_penalty * problem.active_parameters(all_gates(problem.space).numpy())
    rows = np.arange(len(problem))
    total = np.zeros(len(problem))
    for chosen_on, scored_on in ((even, odd), (odd, even)):
        mask = (2 * chosen_on + price).argmin(1)
        total -= scored_on[rows, mask] + 0.5 * price[mask]
    return total


def bootstrap(
    values: Mapping[str, Rewards], users: NDArray[np.int64], *, samples: int = 2000, seed: int = 0
) -> dict[str, Rewards]:
    """Resample means over users, paired across names, and over seeds for values of several seeds.

    Args:
        values: Name to (n,) or (seeds, n).
        users: User of each input (n,).
        samples: Bootstrap samples.
        seed: Seeds the resampling.

    Returns:
        Name to resampled means (samples,). A user weighs as much as it has inputs.
    """
    generator = np.random.default_rng(seed)
    _, group = np.unique(users, return_inverse=True)
    count = int(group.max()) + 1
    weights = generator.multinomial(count, np.full(count, 1 / count), size=samples).astype(np.float64)
    sizes = np.bincount(group, minlength=count)
    denominator = weights @ sizes
    resampled = {}
    seeds = max((v.shape[0] for v in values.values() if v.ndim == 2), default=1)
    draws = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=samples) / seeds
    for name, value in values.items():
        sums = np.stack([np.bincount(group, row, count) for row in np.atleast_2d(value)])  # (seeds, users)
        means = weights @ sums.T / denominator[:, None]  # (samples, seeds)
        resampled[name] = (means * draws).sum(1) if value.ndim == 2 else means[:, 0]
    return resampled


def interval(mean: float, resampled: Rewards) -> dict[str, float]:
    """Mean with its 95 % percentile interval."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def summarise(ladder: Ladder, *, agent: Rewards | None = None, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Means with intervals of every rung, and, with an agent, its normalised score and gain over static.

    Args:
        ladder: The rungs.
        agent: Rewards of the agent (n,) or (seeds, n).
        samples: Bootstrap samples.
        seed: Seeds the resampling.

    Returns:
        ``ladder`` (rung to interval), ``headroom`` (reference over static), ``users``, ``inputs``, ``oracle_kind``
        and, with an agent, ``normalized_score`` and ``gain_over_static``.
    """
    values = dict(ladder.rewards)
    if agent is not None:
        values["agent"] = agent
    drawn = bootstrap(values, ladder.users, samples=samples, seed=seed)
    means = {name: float(value.mean()) for name, value in values.items()}
    result: dict[str, Any] = {
        "ladder": {name: interval(means[name], drawn[name]) for name in values},
        "headroom": interval(means["reference"] - means["static"], drawn["reference"] - drawn["static"]),
        "users": len(np.unique(ladder.users)),
        "inputs": len(ladder.users),
        "oracle_kind": ladder.oracle_kind,
    }
    if agent is not None:
        gain = drawn["agent"] - drawn["static"]
        result["gain_over_static"] = interval(means["agent"] - means["static"], gain)
        result["normalized_score"] = interval(
            normalised_score(means["agent"], means["static"], means["reference"]),
            normalised_score(drawn["agent"], drawn["static"], drawn["reference"]),
        )
    return result


def normalised_score(agent: Any, static: Any, reference: Any) -> Any:
    """``(agent - static) / (reference - static)``; a reference within 1e-6 nats of static counts as 1e-6 above it."""
    return (agent - static) / np.maximum(reference - static, 1e-6)


def shuffled(problem: Problem, masks: Bits, *, over: str, repeats: int = 8, seed: int = 0) -> Rewards:
    """Control: the same masks given to other inputs, mean rewards (n,).

    Args:
        problem: The inputs.
        masks: The agent's gates (n, G).
        over: ``"inputs"``: any permutation. ``"users"``: every user's masks go to the inputs of another user.
        repeats: Permutations to average over.
        seed: Seeds the permutations.

    Raises:
        ValueError: If ``over`` is unknown, or is ``"users"`` where there is one user only.
    """
    if over not in ("inputs", "users"):
        raise ValueError(f"over={over!r}: expected 'inputs' or 'users'")
    generator = np.random.default_rng(seed)
    users = problem.user.numpy()
    if over == "users" and len(np.unique(users)) < 2:
        raise ValueError("over='users': the split has one user, expected two or more")
    total = np.zeros(len(problem))
    for _ in range(repeats):
        order = generator.permutation(len(users)) if over == "inputs" else _other_users(users, generator)
        total += problem.rewards(np.arange(len(users)), masks[order])
    return total / repeats


def _other_users(users: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """For each input a random input of the next user in a random cyclic order, (n,)."""
    names = generator.permutation(np.unique(users))
    order = np.empty(len(users), dtype=np.int64)
    for name, other in zip(names, np.roll(names, 1), strict=True):
        own, pool = np.flatnonzero(users == name), np.flatnonzero(users == other)
        order[own] = generator.permutation(np.resize(generator.permutation(pool), len(own)))
    return order
