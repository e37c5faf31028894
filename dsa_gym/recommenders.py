"""Recommenders without a network, which a sequence model has to beat: popularity and item nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

Items = Sequence[int] | NDArray[np.int64]
"""Indices of a user's items in time order."""


def popularity(sequences: Sequence[Items], items: int) -> Tensor:
    """How often each item was chosen, float32 (items,): the same scores for everybody."""
    return torch.from_numpy(np.bincount(np.concatenate(sequences), minlength=items).astype(np.float32))


class ItemNeighbours:
    """Item-to-item nearest neighbours (Sarwar et al., 2001): ``score(i) = sum of cos(i, j)`` over the latest items j.

    The cosine of two items' user vectors is shrunk, ``c_ij / (|i| |j| + shrink)``, so that two items that one person
    shares do not look alike.

    Attributes:
        similarity: Sparse (items, items), zero on the diagonal.
    """

    def __init__(self, sequences: Sequence[Items], items: int, *, shrink: float = 10.0, latest: int = 5) -> None:
        """Count who chose what.

        Args:
            sequences: Item indices of each user, distinct, in time order.
            items: Size of the catalogue.
            shrink: See the class.
            latest: Items of a history, the last ones, that vote.
        """
        self.latest = latest
        user = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
        chosen = np.concatenate(sequences)
        matrix = sp.csr_matrix((np.ones(len(chosen)), (user, chosen)), shape=(len(sequences), items))
        together = (matrix.T @ matrix).tocoo()
        norm = np.sqrt(np.bincount(chosen, minlength=items))
        value = together.data / (norm[together.row] * norm[together.col] + shrink)
        value[together.row == together.col] = 0.0
        self.similarity = sp.csr_matrix((value, (together.row, together.col)), shape=(items, items))

    def scores(self, histories: Sequence[Items]) -> Tensor:
        """Scores of all items for each history (rows, items), float32."""
        recent = [history[-self.latest :] for history in histories]
        row = np.repeat(np.arange(len(recent)), [len(history) for history in recent])
        column = np.concatenate([np.asarray(history, dtype=np.int64) for history in recent])
        votes = sp.csr_matrix((np.ones(len(row)), (row, column)), shape=(len(recent), self.similarity.shape[0]))
        return torch.from_numpy((votes @ self.similarity).toarray().astype(np.float32))
