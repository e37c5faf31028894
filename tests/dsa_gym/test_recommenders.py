"""Popularity and item neighbours against their formulas."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_gym.recommenders import ItemNeighbours, popularity

ITEMS = 12
SEQUENCES = st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=8, unique=True), min_size=1, max_size=10)


def dense_similarity(sequences: list[list[int]], items: int, shrink: float) -> np.ndarray:
    """The formula on a table of users and items."""
    chosen = np.zeros((len(sequences), items))
    for user, sequence in enumerate(sequences):
        chosen[user, sequence] = 1
    together = chosen.T @ chosen
    norm = np.sqrt(np.diag(together))
    bottom = np.outer(norm, norm) + shrink
    similarity = np.divide(together, bottom, out=np.zeros_like(together), where=bottom > 0)
    np.fill_diagonal(similarity, 0)
    return similarity


@given(SEQUENCES)
def test_popularity_counts(sequences: list[list[int]]) -> None:
    scores = popularity(sequences, ITEMS)
    assert scores.dtype == torch.float32
    count = Counter(item for sequence in sequences for item in sequence)
    assert scores.tolist() == [count[item] for item in range(ITEMS)]


def test_popularity_of_a_few() -> None:
    assert popularity([[0, 1, 2], [1, 2, 3], [2, 3], [4]], 6).tolist() == [1, 2, 3, 2, 1, 0]


@pytest.mark.parametrize("shrink", [0.0, 7.0])
@pytest.mark.parametrize("latest", [1, 3, 100])
def test_neighbours_are_the_dense_formula(rng: np.random.Generator, shrink: float, latest: int) -> None:
    sequences = [rng.permutation(20)[: rng.integers(1, 12)].tolist() for _ in range(40)]
    similarity = dense_similarity(sequences, 20, shrink)
    histories = [sequence[:-1] or sequence for sequence in sequences]
    neighbours = ItemNeighbours(sequences, 20, shrink=shrink, latest=latest)
    scores = neighbours.scores([np.asarray(history) for history in histories])
    expected = np.stack([similarity[history[-latest:]].sum(0) for history in histories])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.from_numpy(expected).float())


@given(SEQUENCES, st.floats(0, 20))
def test_similarity_is_symmetric_below_one_and_without_self(sequences: list[list[int]], shrink: float) -> None:
    similarity = ItemNeighbours(sequences, ITEMS, shrink=shrink).similarity.toarray()
    np.testing.assert_allclose(similarity, dense_similarity(sequences, ITEMS, shrink), rtol=1e-12)
    assert np.array_equal(similarity, similarity.T)
    assert not similarity.diagonal().any()
    assert similarity.min() >= 0
    assert similarity.max() <= 1 + 1e-12


@given(SEQUENCES, st.randoms(use_true_random=False))
def test_the_order_of_users_and_of_the_votes_does_not_matter(sequences: list[list[int]], shuffle) -> None:  # type: ignore[no-untyped-def]
    shuffled = [shuffle.sample(sequence, len(sequence)) for sequence in shuffle.sample(sequences, len(sequences))]
    scores = ItemNeighbours(sequences, ITEMS, latest=8).scores(sequences)
    others = ItemNeighbours(shuffled, ITEMS, latest=8).scores([sequence[::-1] for sequence in sequences])
    torch.testing.assert_close(scores, others)


def test_shrinking_distrusts_a_single_reader() -> None:
    # 0 and 1 are always chosen together, four times; 2 and 3 too, but once
    sequences = [[0, 1]] * 4 + [[2, 3]]
    bare = ItemNeighbours(sequences, 4, shrink=0.0).scores([[0], [2]])
    assert (float(bare[0, 1]), float(bare[1, 3])) == (1.0, 1.0)
    shrunk = ItemNeighbours(sequences, 4, shrink=10.0).scores([[0], [2]])
    assert (float(shrunk[0, 1]), float(shrunk[1, 3])) == pytest.approx((4 / 14, 1 / 11))


def test_no_history_has_no_neighbours() -> None:
    assert ItemNeighbours([[0, 1]], 3).scores([[], [0]]).tolist() == [[0, 0, 0], [0, pytest.approx(1 / 11), 0]]
