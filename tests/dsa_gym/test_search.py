"""Searches over masks: exhaustive ones are optimal, the greedy one climbs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsa_gym import search
from dsa_gym.bundle import Bundle
from dsa_gym.problem import GatingProblem

Make = Callable[..., GatingProblem]


@pytest.fixture(params=[False, True], ids=["table", "computed"])
def problem(request: pytest.FixtureRequest, table_problem: Make, rng: np.random.Generator) -> GatingProblem:
    """Twelve inputs of three users, four gates, random losses; served from a table, or computed."""
    losses = rng.normal(3.0, 1.0, (12, 16))
    return table_problem(losses, np.array([0, 0, 2] * 4), l0_penalty=2e-3, hidden=request.param)


def reward(problem: Any, row: int, bits: tuple[int, ...]) -> float:
    """By the formula, with gate i as bit i of the table's column."""
    column = sum(bit << i for i, bit in enumerate(bits))
    return float(-problem._losses[row, column] - 2e-3 * 100 * sum(bits))


def test_exhaustive_equals_brute_force(problem: GatingProblem) -> None:
    masks = list(product((0, 1), repeat=4))

    def best(rows: list[int]) -> tuple[int, ...]:
        return max(masks, key=lambda bits: np.mean([reward(problem, row, bits) for row in rows]))

    assert search.exhaustive(problem)
    assert tuple(search.best_static(problem)) == best(list(range(12)))
    of_user = {user: np.flatnonzero(problem.user.numpy() == user).tolist() for user in (0, 2)}
    found = search.best_per_user(problem)
    expected = {user: best(rows) for user, rows in of_user.items()}
    assert {user: tuple(mask) for user, mask in found.items()} == expected
    assert [tuple(mask) for mask in search.oracle(problem)] == [best([row]) for row in range(12)]


def test_mask_table_is_the_reward(problem: GatingProblem) -> None:
    table = search.mask_table(problem)
    assert table.shape == (12, 16)
    for row, bits in ((0, (0, 0, 0, 0)), (3, (1, 0, 0, 0)), (7, (0, 1, 1, 0)), (11, (1, 1, 1, 1))):
        column = sum(bit << i for i, bit in enumerate(bits))
        assert table[row, column] == pytest.approx(reward(problem, row, bits), abs=1e-6)


class SeparableProblem:
    """Many gates, each with its own effect on every input: the best mask is known."""

    def __init__(self, inputs: int, gates: int, *, interaction: float = 0.0) -> None:
        generator = np.random.default_rng(1)
        self.effect = generator.normal(size=(inputs, gates))
        self.gates, self.interaction, self.calls = gates, interaction, 0
        self.user = torch.arange(inputs) // 4
        self.space = SimpleNamespace(gates=gates, granularity="test")
        self.l0_penalty, self.table = 0.0, None

    def __len__(self) -> int:
        return len(self.effect)

    def rewards(self, inputs: np.ndarray, gates: np.ndarray) -> np.ndarray:
        self.calls += 1
        pairs = (gates[:, 1:] * gates[:, :-1]).sum(1)
        result: np.ndarray = (self.effect[inputs] * gates).sum(1) - self.interaction * pairs
        return result


def test_greedy_finds_the_optimum_of_a_separable_problem() -> None:
    problem: Any = SeparableProblem(12, 70)
    assert not search.exhaustive(problem)
    assert np.array_equal(search.oracle(problem), (problem.effect > 0).astype(np.uint8))
    per_user = search.best_per_user(problem)
    assert per_user.keys() == {0, 1, 2}
    for user, mask in per_user.items():
        own = problem.effect[problem.user.numpy() == user].mean(0)
        assert np.array_equal(mask, (own > 0).astype(np.uint8))
    assert np.array_equal(search.best_static(problem), (problem.effect.mean(0) > 0).astype(np.uint8))


def test_greedy_ends_where_no_single_flip_improves() -> None:
    problem: Any = SeparableProblem(3, 12, interaction=0.7)
    inputs = np.arange(3)
    masks = search.greedy(problem, inputs, inputs, candidates=5)
    reached = problem.rewards(inputs, masks)
    assert (reached >= problem.rewards(inputs, np.zeros_like(masks))).all()
    for gate in range(12):
        flipped = masks.copy()
        flipped[:, gate] ^= 1
        assert (problem.rewards(inputs, flipped) <= reached + 1e-6).all()


def test_greedy_is_seeded() -> None:
    problem: Any = SeparableProblem(6, 20, interaction=1.0)
    arguments = (problem, np.arange(6), np.zeros(6, dtype=np.int64))
    first, again = (search.greedy(*arguments, candidates=4, seed=3) for _ in range(2))
    assert np.array_equal(first, again)


def test_too_many_gates_to_search() -> None:
    problem: Any = SeparableProblem(2, 1025)
    with pytest.raises(ValueError, match=r"granularity='test': no search over 1,025 gates"):
        search.oracle(problem)


def test_what_has_to_be_written_is_not_searched_exhaustively(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    assert search.kind(GatingProblem(bundle, "train")) == "exhaustive"
    assert search.kind(GatingProblem(bundle, "train", reward_metric="rougeL")) == "greedy lower bound"
