"""The numbers of the policy analysis: hand-made cases, and loops that compute the same."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from dsa_gym.experiments.policy_analysis import (
    agreement,
    bernoulli_entropy,
    bernoulli_kl,
    by_user,
    diversity,
    information,
    overall_agreement,
)

USERS, EACH, GATES = 16, 4, 400
users = np.repeat(np.arange(USERS), EACH)


def test_a_policy_that_looks_at_nothing() -> None:
    found = information(np.full((len(users), GATES), 0.3), users)
    np.testing.assert_allclose(found.user, 0, atol=1e-12)
    np.testing.assert_allclose(found.input, 0, atol=1e-12)


@pytest.mark.parametrize("decided", [True, False])
def test_a_policy_that_looks_at_the_user_only(rng: np.random.Generator, decided: bool) -> None:
    per_user = rng.random((USERS, GATES))
    probabilities = (per_user < 0.5).astype(float)[users] if decided else per_user[users]
    found = information(probabilities, users)
    assert found.user.mean() == pytest.approx(0.66 if decided else 0.18, abs=0.02)
    np.testing.assert_allclose(found.input, 0, atol=1e-9)


@pytest.mark.parametrize("decided", [True, False])
def test_a_policy_that_looks_at_the_input_only(rng: np.random.Generator, decided: bool) -> None:
    """Without the adjustment the user would seem to be told 0.12 nats of the decisions."""
    per_input = rng.random((len(users), GATES))
    found = information((per_input < 0.5).astype(float) if decided else per_input, users)
    assert abs(found.user.mean()) < 0.015
    assert found.input.mean() == pytest.approx(0.69 if decided else 0.19, abs=0.02)


def test_a_policy_that_looks_at_both(rng: np.random.Generator) -> None:
    """Half of the gates look at the user, half at the input."""
    decisions = rng.random((len(users), GATES)) < 0.5
    decisions[:, ::2] = (rng.random((USERS, GATES // 2)) < 0.5)[users]
    found = information(decisions.astype(float), users)
    assert found.user[::2].mean() > 0.6 > 0.05 > abs(found.user[1::2].mean())
    assert found.input[1::2].mean() > 0.6 > 0.05 > abs(found.input[::2].mean())


def test_information_adds_up_to_the_input_s(rng: np.random.Generator) -> None:
    """I(m; x) by the definition, a sum over inputs and both values of the gate."""
    order = rng.permutation(len(users))  # users need not be sorted
    probabilities = rng.random((len(users), 3)) * 0.98 + 0.01
    found = information(probabilities, users[order])
    for gate in range(3):
        p = probabilities[:, gate]
        mean = p.mean()
        total = sum(q * math.log(q / mean) + (1 - q) * math.log((1 - q) / (1 - mean)) for q in p) / len(p)
        assert found.user[gate] + found.input[gate] == pytest.approx(total)


def test_four_users_known_by_heart() -> None:
    """A gate that is on for two of four users tells one bit of them, and nothing else."""
    decisions = np.repeat([1.0, 1.0, 0.0, 0.0], 5)[:, None]
    found = information(decisions, np.repeat([7, 3, 9, 1], 5))
    assert found.user[0] == pytest.approx(math.log(2))
    assert found.input[0] == pytest.approx(0)


@pytest.mark.parametrize("owner", [np.zeros(6, np.int64), np.arange(6)])
def test_where_users_cannot_be_told_from_inputs(owner: np.ndarray) -> None:
    decisions = np.array([1.0, 0, 1, 0, 1, 0])[:, None]
    found = information(decisions, owner)
    assert found.user[0] == 0
    assert found.input[0] == pytest.approx(math.log(2))


def test_agreement_by_hand() -> None:
    masks = np.array([[1, 0, 0], [1, 0, 1], [1, 0, 1], [0, 0, 1]], np.uint8)
    best = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]], np.uint8)
    found = agreement(masks, best)
    np.testing.assert_allclose(found.precision, [1 / 3, np.nan, 0])
    np.testing.assert_allclose(found.recall, [1 / 2, 0, np.nan])
    assert overall_agreement(masks, best) == pytest.approx((1 / 6, 1 / 4))
    assert overall_agreement(best, best) == (1, 1)
    assert all(map(math.isnan, overall_agreement(0 * masks, 0 * best)))


def test_diversity_by_hand(rng: np.random.Generator) -> None:
    assert diversity(np.ones((5, 3), np.uint8)) == (1, 0.0, 0.0)
    assert diversity(np.ones((1, 3), np.uint8)) == (1, 0.0, 0.0)
    masks = rng.integers(0, 2, (30, 9)).astype(np.uint8)
    masks[10:20] = masks[0]
    found = diversity(masks)
    counts = Counter(mask.tobytes() for mask in masks)
    assert found.distinct == len(counts)
    assert found.entropy == pytest.approx(-sum(c / 30 * math.log(c / 30) for c in counts.values()))
    pairs = [int((a != b).sum()) for a, b in itertools.combinations(masks, 2)]
    assert found.hamming == pytest.approx(np.mean(pairs))


def test_masks_by_user() -> None:
    masks = np.array([[1, 0], [0, 1], [1, 0], [1, 1], [0, 1]], np.uint8)
    found = by_user(masks, np.array([5, 2, 5, 5, 2]))
    assert found.user.tolist() == [2, 5]
    assert found.first.tolist() == [1, 0]
    np.testing.assert_allclose(found.rate, [[0, 1], [1, 1 / 3]])
    assert found.frequent.tolist() == [[0, 1], [1, 0]]


def test_divergence_and_entropy_of_gates() -> None:
    p, q = np.array([0.5, 0.9, 0.25]), np.array([0.5, 0.5, 0.75])
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(bernoulli_kl(p, q), kl)
    assert bernoulli_kl(p, q)[0] == pytest.approx(0)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(bernoulli_entropy(p), entropy)
    assert bernoulli_entropy(np.array([0.0, 1.0])).tolist() == [0, 0]
