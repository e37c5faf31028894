"""Searches over masks: the best static mask, the best per user, and the oracle per input.

Exact where the problem knows (planted ones), exhaustive where 2^G masks can be scored, otherwise greedy coordinate
ascent, a lower bound that is labelled as one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsa_gym.model import all_gates
from dsa_gym.planted import PlantedProblem
from dsa_gym.problem import Bits, GatingProblem

Problem = GatingProblem | PlantedProblem

EXHAUSTIVE_GATES = 8
"""Up to this many gates every mask is scored."""

SEARCHED_GATES = 1024
"""Up to this many gates a greedy search ends in minutes."""


def kind(problem: Problem) -> str:
    """How masks are searched: ``exact``, ``exhaustive`` or ``greedy lower bound``."""
    if isinstance(problem, PlantedProblem):
        return "exact"
    return "exhaustive" if exhaustive(problem) else "greedy lower bound"


def exhaustive(problem: GatingProblem) -> bool:
    """Whether every mask of the problem can be scored: there are few, and the model need not write for each."""
    return problem.gates <= EXHAUSTIVE_GATES and not getattr(problem, "written", False)  # not every scorer says


def mask_table(problem: GatingProblem) -> NDArray[np.float64]:
    """Reward of every input under every mask, (n, 2^G)."""
    if problem.table is not None:
        return problem.measured_rewards()
    gates = _all(problem)
    inputs = np.repeat(np.arange(len(problem)), len(gates))
    return problem.rewards(inputs, np.tile(gates, (len(problem), 1))).reshape(len(problem), len(gates))


def _all(problem: GatingProblem) -> Bits:
    """Every mask, (2^G, G)."""
    gates: Bits = all_gates(problem.space).numpy()
    return gates


def best_static(problem: Problem, *, sample: int | None = None, seed: int = 0) -> Bits:
    """The mask with the best mean reward over a problem's inputs, (G,).

    Args:
        problem: The inputs to choose on (training users).
        sample: Inputs that a greedy search scores; None for 256, more of them where there are few gates.
        seed: Seeds the sample.
    """
    if isinstance(problem, PlantedProblem):
        best_of_all: Bits = problem.best_masks(np.zeros(len(problem), np.int64))[0]
        return best_of_all
    if exhaustive(problem):
        best: Bits = _all(problem)[mask_table(problem).mean(0).argmax()]
        return best
    sample = max(256, 2**13 // problem.gates) if sample is None else sample
    inputs = np.random.default_rng(seed).permutation(len(problem))[:sample]
    found: Bits = greedy(problem, inputs, np.zeros(len(inputs), dtype=np.int64))[0]
    return found


def best_per_user(problem: Problem) -> dict[int, Bits]:
    """For each user the mask with the best mean reward over that user's inputs."""
    users = problem.user.numpy()
    names, group = np.unique(users, return_inverse=True)
    if isinstance(problem, PlantedProblem):
        chosen = problem.best_masks(group)
    elif exhaustive(problem):
        table, gates = mask_table(problem), _all(problem)
        chosen = np.stack([gates[table[group == i].mean(0).argmax()] for i in range(len(names))])
    else:
        chosen = greedy(problem, np.arange(len(problem)), group)
    return {int(name): chosen[i] for i, name in enumerate(names)}


def oracle(problem: Problem) -> Bits:
    """For each input the mask with the best reward, (n, G)."""
    if isinstance(problem, PlantedProblem):
        return problem.optimum(np.arange(len(problem)))
    if exhaustive(problem):
        best: Bits = _all(problem)[mask_table(problem).argmax(1)]
        return best
    return greedy(problem, np.arange(len(problem)), np.arange(len(problem)))


def greedy(
    problem: GatingProblem, inputs: NDArray[np.int64], group: NDArray[np.int64], *, candidates: int = 64, seed: int = 0
) -> Bits:
    """Coordinate ascent on the mean reward of each group of inputs, all groups at once.

    Every step draws ``candidates`` gates, scores the flip of each for all inputs, and each group makes its best flip
    if that is an improvement; it ends when no group improves over two rounds of all gates.

    Returns:
        One mask per group, (groups, G).

    Raises:
        ValueError: If there are more than :data:`SEARCHED_GATES` gates.
    """
    if problem.gates > SEARCHED_GATES:
        raise ValueError(
            f"granularity={problem.space.granularity!r}: no search over {problem.gates:,} gates "
            f"(at most {SEARCHED_GATES:,}); the ladder needs pathway, layer, site or component"
        )
    generator = np.random.default_rng(seed)
    groups, gates = int(group.max()) + 1, problem.gates
    counts = np.bincount(group, minlength=groups)
    current = np.zeros((groups, gates), dtype=np.uint8)

    def score(masks: Bits) -> NDArray[np.float64]:
        return np.bincount(group, problem.rewards(inputs, masks[group]), groups) / counts

    best = score(current)
    idle = 0
    while idle < 2 * max(1, -(-gates // candidates)):
        tried = generator.permutation(gates)[:candidates]
        gains = np.empty((len(tried), groups))
        for i, gate in enumerate(tried):
            flipped = current.copy()
            flipped[:, gate] ^= 1
            gains[i] = score(flipped) - best
        choice = gains.argmax(0)
        # losses computed in another batch differ in their last digits; climbing on those might never end
        better = gains[choice, np.arange(groups)] > 1e-6
        current[better, tried[choice[better]]] ^= 1
        best = best + np.where(better, gains[choice, np.arange(groups)], 0.0)
        idle = 0 if better.any() else idle + 1
    return current
