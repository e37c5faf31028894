"""The state of a batch of episodes: whose turn it is, on which input, and how every draw follows from a seed.

Scalar and vector environments share it: a scalar environment is a batch of one. Draws are counter-based
(SplitMix64; Steele et al., 2014): the t-th draw of an environment is a hash of its key and t, so a whole
batch draws in a few array operations and yet environment i of a batch draws exactly what a scalar environment
with the same seed would.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Episodes:
    """Users, inputs and step counts of ``num_envs`` episodes.

    Attributes:
        user: Current user of each environment, int64 (num_envs,).
        input: Current input, an index into the split, int64 (num_envs,).
        steps: Steps taken in the episode, int64 (num_envs,).
    """

    def __init__(self, owners: NDArray[np.int64], num_envs: int, length: int) -> None:
        """Index the inputs by user.

        Args:
            owners: User of each input (n,).
            num_envs: Environments in the batch.
            length: Steps per episode.
        """
        self._order = np.argsort(owners, kind="stable")
        self._users, self._start, self._count = np.unique(owners[self._order], return_index=True, return_counts=True)
        self._owners, self._length = owners, length
        self.user = np.zeros(num_envs, dtype=np.int64)
        self.input = np.zeros(num_envs, dtype=np.int64)
        self._place = np.zeros(num_envs, dtype=np.int64)
        self.steps = np.zeros(num_envs, dtype=np.int64)
        self._key = np.zeros(num_envs, dtype=np.uint64)
        self._counter = np.zeros(num_envs, dtype=np.uint64)

    def seed(self, seeds: NDArray[np.uint64], where: NDArray[np.intp]) -> None:
        """Start the draws of the environments ``where`` afresh from ``seeds``."""
        self._key[where] = _mix(seeds + _GOLDEN)
        self._counter[where] = 0

    def begin(self, where: NDArray[np.intp], user: NDArray[np.int64], first: NDArray[np.int64]) -> None:
        """Begin new episodes in the environments ``where``.

        Args:
            where: Indices of environments.
            user: Their user, or -1 to draw one uniformly.
            first: Their first input, or -1 to draw one of the user's uniformly. A given input decides the
                user.
        """
        place = self.draw(where, len(self._users))
        given = (first >= 0) | (user >= 0)
        if given.any():
            owner = np.where(first >= 0, self._owners[first], user)
            place = np.where(given, np.searchsorted(self._users, owner), place)
        self._enter(where, place)
        self.steps[where] = 0
        own = self._draw_input(where)
        self.input[where] = np.where(first >= 0, first, own) if given.any() else own

    def _enter(self, where: NDArray[np.intp], place: NDArray[np.int64]) -> None:
        """Put users, by their place among the split's, into environments."""
        self._place[where], self.user[where] = place, self._users[place]

    def change_user(self, where: NDArray[np.intp]) -> None:
        """Go on with any user of the split, and one of that user's inputs, in the environments ``where``."""
        self._enter(where, self.draw(where, len(self._users)))
        self.input[where] = self._draw_input(where)

    def advance(self) -> NDArray[np.bool_]:
        """Count a step everywhere and draw the next input of those that go on; returns which ended."""
        self.steps += 1
        ended = self.steps >= self._length
        going = np.flatnonzero(~ended)
        if len(going):
            self.input[going] = self._draw_input(going)
        return ended

    def _draw_input(self, where: NDArray[np.intp]) -> NDArray[np.int64]:
        place = self._place[where]
        drawn: NDArray[np.int64] = self._order[self._start[place] + self.draw(where, self._count[place])]
        return drawn

    def draw(self, where: NDArray[np.intp], bound: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """One uniform integer below ``bound`` for each environment in ``where``."""
        rows = slice(None) if len(where) == len(self.user) else where  # a view is faster than a choice of all
        self._counter[rows] += np.uint64(1)
        bits = _mix(self._key[rows] + self._counter[rows] * _GOLDEN)
        return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 * bound).astype(np.int64)
