"""Planted instances: the loss is the formula, the optimum is the best of all masks, the knobs do what they say."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_gym import search
from dsa_gym.ladder import build_ladder
from dsa_gym.observations import LIMIT
from dsa_gym.planted import PlantedConfig, PlantedProblem
from dsa_gym.population import SPLITS

SMALL = st.builds(
    lambda gates, **other: PlantedConfig(users=5, inputs=3, gates=gates[0], active=1 / gates[1], **other),
    gates=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (8, 4), (8, 8)]),
    interference=st.floats(0, 1),
    kinds=st.integers(1, 3),
    registers=st.integers(1, 2),
    all_registers=st.integers(2, 4),
    noise=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
)


def loss_by_hand(problem: PlantedProblem, index: int, gates: np.ndarray) -> float:
    """The formula of the module's docstring, with loops."""
    size, total = problem.config.channel_size, 0.0
    for channel, weight in enumerate(problem.weight):
        own = gates[channel * size : (channel + 1) * size]
        need = int(problem.need[index, channel])
        harm = sum(own[j] for j in range(size) if j != need) / max(size - 1, 1)
        total += weight * ((1 - own[need]) + problem.config.interference * own[need] * harm)
    return total


@given(config=SMALL, split=st.sampled_from(SPLITS), penalty=st.floats(0, 1))
def test_the_optimum_is_the_best_of_all_masks(config: PlantedConfig, split: str, penalty: float) -> None:
    problem = PlantedProblem(config, split, l0_penalty=penalty)
    inputs = np.arange(len(problem))
    every = np.array(list(itertools.product((0, 1), repeat=problem.gates)), np.uint8)
    best = np.max([problem.rewards(inputs, np.tile(mask, (len(inputs), 1))) for mask in every], axis=0)
    np.testing.assert_allclose(problem.rewards(inputs, problem.optimum(inputs)), best, atol=1e-6)
    np.testing.assert_allclose(problem.best_rewards(inputs), best, atol=1e-6)


@given(config=SMALL, penalty=st.floats(0, 1), of_users=st.booleans())
def test_best_masks_of_groups(config: PlantedConfig, penalty: float, of_users: bool) -> None:
    """One mask for everybody, and one for each user: nothing is better on the mean."""
    problem = PlantedProblem(config, l0_penalty=penalty)
    inputs = np.arange(len(problem))
    group = problem.user.numpy() if of_users else np.zeros_like(inputs)
    every = np.array(list(itertools.product((0, 1), repeat=problem.gates)), np.uint8)
    rewards = [problem.rewards(inputs, np.tile(mask, (len(inputs), 1))) for mask in every]
    means = np.stack([np.bincount(group, reward) / np.bincount(group) for reward in rewards])  # (2^G, groups)
    found = problem.best_masks(group)
    reached = np.bincount(group, problem.rewards(inputs, found[group])) / np.bincount(group)
    np.testing.assert_allclose(reached, means.max(0), atol=1e-6)


@given(config=SMALL, data=st.data())
def test_the_loss_is_the_formula(config: PlantedConfig, data: st.DataObject) -> None:
    problem = PlantedProblem(config)
    inputs = np.array(data.draw(st.lists(st.integers(0, len(problem) - 1), min_size=1, max_size=4)))
    bits = st.lists(st.integers(0, 1), min_size=problem.gates, max_size=problem.gates)
    gates = np.array([data.draw(bits) for _ in inputs], np.uint8)
    expected = [loss_by_hand(problem, index, row) for index, row in zip(inputs, gates, strict=True)]
    np.testing.assert_allclose(problem.losses(inputs, gates), expected, atol=1e-6)
    relaxed = problem.relaxed_losses(torch.from_numpy(inputs), torch.from_numpy(gates).float())
    np.testing.assert_allclose(relaxed.numpy(), expected, atol=1e-6)


def test_without_interference_a_static_mask_is_enough() -> None:
    gains = []
    for interference in (0.0, 0.25, 0.5, 0.75, 1.0):
        problem = PlantedProblem(PlantedConfig(interference=interference, users=300))
        inputs = np.arange(len(problem))
        every = np.array(list(itertools.product((0, 1), repeat=problem.gates)), np.uint8)
        static = max(problem.rewards(inputs, np.tile(mask, (len(inputs), 1))).mean() for mask in every)
        gains.append(problem.best_rewards(inputs).mean() - static)
    assert gains[0] == pytest.approx(0, abs=1e-6)
    assert np.all(np.diff(gains) > 0.04), gains


def test_user_and_input_both_matter() -> None:
    """Masks of other users, or of other inputs of the same user, lose."""
    problem = PlantedProblem(PlantedConfig(users=300))
    inputs, best = np.arange(len(problem)), problem.reference_gates()
    assert problem.rewards(inputs, best).mean() == pytest.approx(0, abs=1e-6)
    other_user = np.roll(best, problem.config.inputs, axis=0)
    other_input = best.reshape(300, -1, 8)[:, ::-1].reshape(best.shape)
    assert problem.rewards(inputs, other_user).mean() < -0.3
    assert problem.rewards(inputs, other_input).mean() < -0.1


def test_splits() -> None:
    problems = {split: PlantedProblem(PlantedConfig(noise=0.0), split) for split in SPLITS}
    support = problems["test"].support()
    kinds = {name: problem.observations["user"][:: problem.config.inputs] for name, problem in problems.items()}
    assert np.array_equal(kinds["train"], kinds["seen"])
    assert not np.array_equal(kinds["train"], kinds["test"]) and not np.array_equal(kinds["validation"], kinds["test"])
    assert np.array_equal(support.observations["user"], problems["test"].observations["user"])
    assert not np.array_equal(support.need, problems["test"].need)
    # without noise, what is observed decides what is needed: the rule is the same for all users
    seen: dict[bytes, bytes] = {}
    for problem in (*problems.values(), support):
        for user, context, need in zip(*problem.observations.values(), problem.need, strict=True):
            assert seen.setdefault(user.tobytes() + context.tobytes(), need.tobytes()) == need.tobytes()


def test_observations() -> None:
    problem = PlantedProblem(PlantedConfig(noise=10.0))
    for values in problem.observations.values():
        assert values.shape == (2400, 16) and values.dtype == np.float32 and np.abs(values).max() == LIMIT
    again = PlantedProblem(PlantedConfig(noise=10.0))
    assert all(np.array_equal(again.observations[name], value) for name, value in problem.observations.items())
    assert not np.array_equal(PlantedProblem(PlantedConfig(seed=1)).need, again.need)


def test_many_gates() -> None:
    problem = PlantedProblem(PlantedConfig(gates=4096, users=4, inputs=2), l0_penalty=1e-5)
    inputs = np.arange(len(problem))
    gates = problem.optimum(inputs)
    assert gates.shape == (8, 4096) and 0 < gates.mean() <= 0.25
    np.testing.assert_allclose(problem.rewards(inputs, gates), problem.best_rewards(inputs), atol=1e-5)
    assert (problem.active_parameters(gates) == gates.sum(1)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"users": 0}, "users=0: expected a positive integer"),
        ({"inputs": True}, "inputs=True"),
        ({"gates": 4100}, "gates=4100: expected at most 4096"),
        ({"gates": 10}, "active=0.25: expected 1 / s .* divides gates=10"),
        ({"active": 0.3}, "active=0.3: expected 1 / s"),
        ({"active": 0.0}, "active=0.0"),
        ({"interference": 1.1}, "interference=1.1"),
        ({"registers": 5}, "registers=5: expected at most all_registers=4"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlantedConfig(**settings)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="split='future': expected one of train"):
        PlantedProblem(PlantedConfig(), "future")
    with pytest.raises(ValueError, match="l0_penalty=-1"):
        PlantedProblem(PlantedConfig(), l0_penalty=-1)
    with pytest.raises(ValueError, match=r"gates: shape \(2, 7\), expected \(2, 8\)"):
        PlantedProblem(PlantedConfig()).losses(np.arange(2), np.zeros((2, 7), np.uint8))


def test_searches_know_the_instance() -> None:
    """With 512 gates the searches are exact and take no time; the oracle is the optimum."""
    problem = PlantedProblem(PlantedConfig(users=20, gates=512), "test", l0_penalty=1e-4)
    assert search.kind(problem) == "exact"
    ladder = build_ladder(problem, PlantedProblem(problem.config, l0_penalty=1e-4), density=0.25)
    means = {name: rewards.mean() for name, rewards in ladder.rewards.items()}
    assert means["static"] < means["user_static"] < means["oracle"]
    assert means["oracle"] == pytest.approx(problem.best_rewards(np.arange(1))[0], abs=1e-6)
    assert ladder.oracle_kind == "exact"
    assert problem.fingerprint["instance"]["gates"] == 512


def test_gates_are_described_alike_whatever_their_number() -> None:
    few, many = (PlantedProblem(PlantedConfig(users=1, inputs=1, gates=gates)).gate_features for gates in (8, 64))
    assert few.dtype == np.float32 and many.shape == (64, few.shape[1])
    np.testing.assert_array_equal(many[:8], few)
    assert len(np.unique(many, axis=0)) == 64
    assert len(PlantedProblem(PlantedConfig(users=1, inputs=1, gates=8)).gate_magnitudes()) == 8
