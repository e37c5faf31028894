"""Statistics of comparisons: against rliable's own metrics, by hand, and on agents whose order is known."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from rliable import metrics

from dsa_gym.experiments.statistics import (
    Scores,
    doubts,
    interquartile_mean,
    learning_curve,
    probability_of_improvement,
    share_above,
)
from dsa_gym.ladder import normalised_score


def table(rewards: dict[str, NDArray[np.float64]], inputs: NDArray[np.int64], headroom: float = 0.5) -> pd.DataFrame:
    """Users of a comparison of one environment, from rewards (seeds, users); static is -2 for everybody."""
    return pd.concat(
        pd.DataFrame(
            {"env": "E", "agent": agent, "seed": seed, "part": part, "user": np.arange(len(row)), "inputs": inputs,
             "reward": row, "static": -2.0, "reference": -2.0 + headroom}
        )
        for agent, values in rewards.items() for seed, row in enumerate(values) for part in ("unseen", "seen")
    )  # fmt: skip


@pytest.fixture
def inputs(rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.integers(1, 9, 40)


@pytest.fixture
def scores(rng: np.random.Generator, inputs: NDArray[np.int64]) -> Scores:
    """``good`` is 0.2 above ``poor`` for all users, ``same`` is ``poor`` with other noise; users differ by far more."""
    users, noise = rng.normal(0, 1, 40), lambda: rng.normal(0, 0.02, (5, 40))
    poor = -1.9 + users
    rewards = {"poor": poor + noise(), "good": poor + 0.2 + noise(), "same": poor + noise()}
    return Scores.of(table(rewards, inputs), "E", "unseen")


def test_scores_by_hand(scores: Scores, inputs: NDArray[np.int64]) -> None:
    assert scores.agents[0] == "good"
    assert scores.headroom == pytest.approx(0.5)
    for agent, rewards in scores.rewards.items():
        per_run = (rewards * inputs).sum(1) / inputs.sum()
        np.testing.assert_allclose(scores.runs(agent), normalised_score(per_run, -2.0, -1.5))
        value = scores.score[agent]
        assert value["low"] < value["mean"] < value["high"]
        assert value["mean"] == pytest.approx(scores.runs(agent).mean())
        assert scores.reward[agent]["mean"] == pytest.approx(per_run.mean())


def test_pairing_finds_what_single_intervals_hide(scores: Scores) -> None:
    good, poor = scores.score["good"], scores.score["poor"]
    assert good["low"] < poor["high"], "the intervals overlap: users differ more than agents"
    difference = scores.difference["good", "poor"]
    assert 0.3 < difference["low"] < difference["mean"] < difference["high"] < 0.5
    backwards = scores.difference["poor", "good"]
    assert backwards["mean"] == pytest.approx(-difference["mean"])
    level = scores.difference["same", "poor"]
    assert level["low"] < 0 < level["high"]


def test_a_difference_takes_the_seeds_that_both_have(rng: np.random.Generator) -> None:
    rewards = {"one": rng.normal(-1, 1, (4, 10)), "other": rng.normal(-1, 1, (2, 10))}
    scores = Scores.of(table(rewards, np.ones(10, np.int64)), "E", "seen")
    expected = (rewards["one"][:2] - rewards["other"]).mean() / 0.5
    assert scores.difference["one", "other"]["mean"] == pytest.approx(expected)
    apart = replace(scores, seeds={"one": [0, 1, 2, 3], "other": [7, 8]})
    assert apart.difference == {}
    assert any(
        "one can't be told from other" in line or "other can't be told from one" in line for line in doubts(apart)
    )


def test_interquartile_mean_is_that_of_rliable(rng: np.random.Generator) -> None:
    runs = {"a": rng.normal(size=(8, 3)), "b": rng.normal(size=(5, 3)) + 3}
    for agent, value in interquartile_mean(runs).items():
        assert value["mean"] == pytest.approx(metrics.aggregate_iqm(runs[agent]))
        assert value["low"] < value["mean"] < value["high"]
    constant = interquartile_mean({"static": np.full((5, 1), 0.25)})["static"]
    assert constant == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_probability_of_improvement_is_that_of_rliable(rng: np.random.Generator, scores: Scores) -> None:
    one, other = rng.integers(0, 4, (5, 7)).astype(float), rng.integers(1, 5, (3, 7)).astype(float)  # with ties
    assert probability_of_improvement(one, other)[0] == pytest.approx(metrics.probability_of_improvement(one, other))
    value = scores.improvement("good", "poor")
    assert value["low"] <= value["mean"] <= value["high"]
    assert value["mean"] > 0.99
    assert 0.4 < scores.improvement("same", "poor")["mean"] < 0.6


def test_profiles(rng: np.random.Generator, scores: Scores) -> None:
    levels = np.array([-1e9, 0.0, 0.5, 1e9])
    profiles = scores.profiles(levels)
    for agent, (share, low, high) in profiles.items():
        np.testing.assert_allclose(share, [(scores.users(agent) > level).mean() for level in levels])
        assert (low <= share).all() and (share <= high).all()
        assert (share[0], share[-1]) == (1, 0)
    values = rng.integers(0, 3, 10).astype(float)
    np.testing.assert_allclose(share_above(values, np.array([1.0])), [(values > 1).mean()])


def test_learning_curve(rng: np.random.Generator) -> None:
    runs = np.linspace(0, 1, 6) + rng.normal(0, 0.1, (8, 6))
    mean, low, high = learning_curve(runs)
    np.testing.assert_allclose(mean, [metrics.aggregate_iqm(runs[:, [i]]) for i in range(6)])
    assert (low <= mean).all() and (mean <= high).all()


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(5)
    expected = np.random.random(2)
    np.random.seed(5)
    first = np.random.random()
    one, other = (interquartile_mean({"a": np.arange(6.0)[:, None]}) for _ in range(2))
    assert one == other
    assert [first, np.random.random()] == expected.tolist()


def test_doubts(scores: Scores, inputs: NDArray[np.int64], rng: np.random.Generator) -> None:
    pairs = [line for line in doubts(scores) if "interval of the difference" in line]
    assert len(pairs) == 1
    assert {"same", "poor"} == {word.strip(":") for word in pairs[0].split() if word.strip(":") in scores.rewards}
    few = Scores.of(table({"one": rng.normal(-1, 0.1, (2, 40))}, inputs), "E", "unseen")
    assert any("one: fewer than 3 seeds" in line for line in doubts(few))
    flat = Scores.of(table({"one": rng.normal(-1, 0.1, (3, 40))}, inputs, headroom=-0.1), "E", "unseen")
    assert not flat.scorable
    assert flat.unit == "gain"
    assert flat.score["one"]["mean"] == pytest.approx(flat.reward["one"]["mean"] + 2)
    assert any("is not above the best static mask" in line for line in doubts(flat))
    clear = Scores.of(table({"a": np.full((3, 40), -1.0), "b": np.full((3, 40), -1.5)}, inputs), "E", "unseen")
    assert doubts(clear) == []


def test_runs_that_do_not_belong_together(inputs: NDArray[np.int64]) -> None:
    users = table({"a": np.zeros((2, 40)), "b": np.zeros((1, 40))}, inputs)
    other = users.copy()
    other.loc[other["agent"] == "b", "static"] = -1.0
    with pytest.raises(ValueError, match="E, unseen: runs differ in 'static'"):
        Scores.of(other, "E", "unseen")
    with pytest.raises(ValueError, match="measured on different users"):
        Scores.of(users[(users["agent"] == "a") | (users["user"] < 3)], "E", "seen")


def test_rliable_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rliable", None)
    with pytest.raises(ImportError, match=r"pip install 'dsa-gym\[compare\]'"):
        interquartile_mean({"a": np.zeros((3, 1))})


def test_scores_of_a_comparison(comparison: Path) -> None:
    scores = Scores.of(pd.read_parquet(comparison / "users.parquet"), "DSA-TextTable-v0", "unseen")
    rows = pd.read_parquet(comparison / "rows.parquet").set_index(["agent", "seed"])
    for agent in ("rloo", "static"):
        for seed, score in zip(scores.seeds[agent], scores.runs(agent), strict=True):
            if scores.scorable:
                assert score == pytest.approx(rows.loc[(agent, seed), "unseen_normalized_score"])
