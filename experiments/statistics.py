"""Statistics of a comparison: how good agents are on users, and what the seeds and users at hand can tell apart.

A *score* is normalised by the ladder: 0 is the best static mask, 1 the reference gate. ``rliable`` (Agarwal et al.,
2021) gives interquartile means with stratified bootstrap intervals (runs are seeds, tasks are environments),
performance profiles and probabilities of improvement (tasks are an environment's users). What depends on *which users*
were drawn, a mean and a paired difference, has intervals bootstrapped over users and seeds
(:func:`dsa_gym.ladder.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dsa_gym.ladder import bootstrap, interval

Array = NDArray[np.float64]
Interval = dict[str, float]
"""``mean`` (the point estimate), ``low`` and ``high`` of its 95 % interval."""

SAMPLES = 2000
"""Bootstrap samples of numbers that are read; curves and the many pairs have a quarter."""

FEWEST_SEEDS = 3
"""With fewer, an interval over seeds says little."""


def rliable_library() -> Any:
    """``rliable.library``.

    Raises:
        ImportError: If it is not installed, or not together with a pandas that it works with.
    """
    try:
        from rliable import library
    except ImportError as error:
        raise ImportError(f"statistics need rliable: pip install 'dsa-gym[compare]' ({error})") from error
    return library


@dataclass(frozen=True)
class Scores:
    """Rewards of agents on the users of one part of one environment.

    Attributes:
        env: The environment.
        part: ``unseen`` or ``seen``.
        seeds: Agent to the seeds that it has, sorted.
        rewards: Agent to mean rewards (seeds, users).
        static: Mean reward of the best static mask (users,).
        reference: Mean reward of the reference gate (users,).
        inputs: Number of inputs (users,).
    """

    env: str
    part: str
    seeds: dict[str, list[int]]
    rewards: dict[str, Array]
    static: Array
    reference: Array
    inputs: NDArray[np.int64]

    @classmethod
    def of(cls, users: pd.DataFrame, env: str, part: str) -> Scores:
        """Take them from the users of a comparison.

        Args:
            users: Columns ``env``, ``agent``, ``seed``, ``part``, ``user``, ``inputs``, ``reward``, ``static`` and
                ``reference``.
            env: The environment.
            part: ``unseen`` or ``seen``.

        Raises:
            ValueError: If runs were not measured on the same users and yardsticks.
        """
        own = users[(users["env"] == env) & (users["part"] == part)]
        wide = own.pivot_table(index=["agent", "seed"], columns="user", values="reward")
        ends = own.groupby("user")[["static", "reference", "inputs"]].agg(["min", "max"])
        for name in ("static", "reference", "inputs"):
            if not np.allclose(ends[name]["min"], ends[name]["max"], rtol=0, atol=1e-4):
                raise ValueError(f"{env}, {part}: runs differ in {name!r} of a user; they are of different bundles")
        if wide.isna().to_numpy().any():
            raise ValueError(f"{env}, {part}: runs were measured on different users")
        agents = list(dict.fromkeys(own["agent"]))
        rows = {agent: wide.loc[agent].sort_index() for agent in agents}
        return cls(
            env,
            part,
            {agent: [int(seed) for seed in rows[agent].index] for agent in agents},
            {agent: rows[agent].to_numpy() for agent in agents},
            *(ends[name]["min"].to_numpy() for name in ("static", "reference", "inputs")),
        )

    @property
    def agents(self) -> list[str]:
        """Agents, the best first."""
        return sorted(self.rewards, key=lambda agent: -self.mean(self.rewards[agent]).mean())

    @property
    def contestants(self) -> list[str]:
        """Agents that can be asked for a decision, the best first; the oracle sees the answers."""
        return [agent for agent in self.agents if agent != "oracle"]

    def mean(self, rewards: Array) -> Array:
        """Mean over inputs of rewards (..., users)."""
        means: Array = np.average(rewards, axis=-1, weights=self.inputs)
        return means

    @cached_property
    def headroom(self) -> float:
        """What the reference gate earns over the best static mask."""
        return float(self.mean(self.reference) - self.mean(self.static))

    @property
    def scorable(self) -> bool:
        """Whether a score between static and reference means anything."""
        return self.headroom > 1e-6

    @property
    def unit(self) -> str:
        """What scores are called: gains where there is no headroom to divide by."""
        return "score" if self.scorable else "gain"

    def users(self, agent: str) -> Array:
        """Scores of every run on every user (seeds, users): the gain over static in units of the mean headroom.

        Where there is no headroom, the gain itself.
        """
        return (self.rewards[agent] - self.static) / (self.headroom if self.scorable else 1.0)

    def runs(self, agent: str) -> Array:
        """Score of every run (seeds,)."""
        return self.mean(self.users(agent))

    def _intervals(self, values: Mapping[Any, Array]) -> dict[Any, Interval]:
        """Means of values (seeds, users), with their intervals over users and seeds."""
        owner = np.repeat(np.arange(len(self.inputs)), self.inputs)
        found: dict[Any, Interval] = {}
        for count in {len(value) for value in values.values()}:  # one bootstrap for all that have as many seeds
            own = {name: value for name, value in values.items() if len(value) == count}
            repeated = {name: np.repeat(value, self.inputs, axis=1) for name, value in own.items()}
            drawn = bootstrap(repeated, owner, samples=SAMPLES)
            found |= {name: interval(float(self.mean(value).mean()), drawn[name]) for name, value in own.items()}
        return found

    @cached_property
    def score(self) -> dict[str, Interval]:
        """Agent to its mean score, with its interval over users and seeds."""
        return self._intervals({agent: self.users(agent) for agent in self.rewards})

    @cached_property
    def reward(self) -> dict[str, Interval]:
        """Agent to its mean reward, with its interval over users and seeds."""
        return self._intervals(self.rewards)

    @cached_property
    def difference(self) -> dict[tuple[str, str], Interval]:
        """Pair of agents to the mean score of the first less that of the second, with its interval.

        Paired on users and on the seeds that both have; pairs that have none in common are left out.
        """
        values = {}
        for one, other in combinations(self.rewards, 2):
            common = sorted(set(self.seeds[one]) & set(self.seeds[other]))
            if common:
                first, second = (
                    self.users(agent)[[self.seeds[agent].index(seed) for seed in common]] for agent in (one, other)
                )
                values[one, other] = first - second
        found = self._intervals(values)
        turned = {
            (other, one): {"mean": -value["mean"], "low": -value["high"], "high": -value["low"]}
            for (one, other), value in found.items()
        }
        return found | turned

    def improvement(self, one: str, other: str) -> Interval:
        """Probability that a run of one agent serves a user better than a run of another, averaged over users."""
        pair = [self.users(agent) for agent in (one, other)]
        return estimates({"pair": pair}, probability_of_improvement, SAMPLES // 4)["pair"][0]

    def profiles(self, levels: Array) -> dict[str, tuple[Array, Array, Array]]:
        """Performance profiles: the share of users and runs whose score is above each level, with its interval.

        Returns:
            Agent to share, low and high, each (levels,).
        """
        with _seeded():
            shares, bounds = rliable_library().create_performance_profile(
                {agent: self.users(agent) for agent in self.agents},
                levels,
                custom_profile_func=share_above,
                reps=SAMPLES // 4,
            )
        return {agent: (shares[agent], bounds[agent][0], bounds[agent][1]) for agent in shares}


def interquartile_mean(scores: Mapping[str, Array]) -> dict[str, Interval]:
    """Interquartile means of scores (seeds, environments), with stratified bootstrap intervals over seeds."""
    found = estimates(scores, lambda runs: middle_mean(runs.reshape(-1, 1)))
    return {agent: values[0] for agent, values in found.items()}


def middle_mean(values: Array) -> Array:
    """Mean of the middle half of each column of values (n, columns): ``rliable.metrics.aggregate_iqm``, but quick."""
    cut = len(values) // 4
    means: Array = np.sort(values, axis=0)[cut : len(values) - cut].mean(0)
    return means


def learning_curve(scores: Array) -> tuple[Array, Array, Array]:
    """Interquartile mean of scores (seeds, evaluations) at each evaluation, with the interval's low and high end."""
    found = estimates(
        {"agent": scores[:, None]}, lambda runs: middle_mean(runs.reshape(-1, runs.shape[-1])), SAMPLES // 4
    )
    values = [[value[name] for value in found["agent"]] for name in ("mean", "low", "high")]
    mean, low, high = (np.asarray(value) for value in values)
    return mean, low, high


def estimates(
    scores: Mapping[str, Any], function: Callable[..., Array], samples: int = SAMPLES
) -> dict[str, list[Interval]]:
    """What a function makes of scores (runs, tasks, ...), with stratified bootstrap intervals.

    Args:
        scores: Name to scores, or to a list of scores that the function takes one by one.
        function: Gives a vector.
        samples: Bootstrap samples.
    """
    with _seeded():
        points, bounds = rliable_library().get_interval_estimates(dict(scores), function, reps=samples)
    return {
        name: [
            {"mean": float(mean), "low": float(low), "high": float(high)}
            for mean, low, high in zip(points[name], *bounds[name], strict=True)
        ]
        for name in points
    }


def probability_of_improvement(one: Array, other: Array) -> Array:
    """``P(X > Y) + P(X = Y) / 2`` over pairs of runs, averaged over tasks, (1,); scores are (runs, tasks).

    What ``rliable.metrics.probability_of_improvement`` gives, for all tasks at once.
    """
    difference = one[:, None] - other[None]
    return np.atleast_1d((difference > 0).mean() + (difference == 0).mean() / 2)


def share_above(scores: Array, levels: Array) -> Array:
    """Share of scores above each level, (levels,)."""
    ordered = np.sort(scores, axis=None)
    return 1 - np.searchsorted(ordered, levels, side="right") / len(ordered)


@contextmanager
def _seeded() -> Iterator[None]:
    """Rliable draws from NumPy's global generator: start it from a fixed state, and put it back afterwards."""
    before = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(before)


def doubts(scores: Scores) -> list[str]:
    """What a comparison can't conclude on one part of one environment, in words."""
    found = []
    if not scores.scorable:
        found.append(
            f"The reference gate is not above the best static mask ({scores.headroom:+.2g}): a score between the two "
            "means nothing, so what stands for it is the gain in reward over the best static mask."
        )
    few = [agent for agent in scores.agents if len(scores.seeds[agent]) < FEWEST_SEEDS]
    if few:
        found.append(
            f"{_names(few)}: fewer than {FEWEST_SEEDS} seeds, so how much a result owes to its seed is not known."
        )
    agents = scores.contestants
    for place, agent in enumerate(agents[:-1]):
        level = [other for other in agents[place + 1 :] if _undecided(scores, agent, other)]
        if level:
            found.append(f"{agent} can't be told from {_names(level)}: the interval of the difference contains zero.")
    below = [agent for agent in agents if agent != "static" and _within(scores.score[agent], 0.0)]
    if below:
        found.append(f"{_names(below)}: can't be told from the best static mask.")
    return found


def _undecided(scores: Scores, one: str, other: str) -> bool:
    value = scores.difference.get((one, other))
    return value is None or _within(value, 0.0)


def _within(value: Interval, number: float) -> bool:
    return value["low"] <= number <= value["high"]


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
