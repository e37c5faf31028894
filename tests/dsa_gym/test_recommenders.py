"""Popularity and item neighbours against their formulas."""

import numpy as np
import torch

from dsa_gym.recommenders import ItemNeighbours, popularity

SEQUENCES = [[0, 1, 2], [1, 2, 3], [2, 3], [4]]


def test_popularity_counts() -> None:
    assert popularity(SEQUENCES, 6).tolist() == [1, 2, 3, 2, 1, 0]


def test_neighbours_are_the_dense_formula(rng: np.random.Generator) -> None:
    sequences = [rng.permutation(20)[: rng.integers(1, 12)].tolist() for _ in range(40)]
    chosen = np.zeros((40, 20))
    for user, sequence in enumerate(sequences):
        chosen[user, sequence] = 1
    together = chosen.T @ chosen
    norm = np.sqrt(np.diag(together))
    similarity = together / (np.outer(norm, norm) + 7.0)
    np.fill_diagonal(similarity, 0)
    histories = [sequence[:-1] or sequence for sequence in sequences]
    scores = ItemNeighbours(sequences, 20, shrink=7.0, latest=3).scores(histories)
    expected = np.stack([similarity[history[-3:]].sum(0) for history in histories])
    torch.testing.assert_close(scores, torch.from_numpy(expected).float())
