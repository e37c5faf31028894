"""Ranking metrics per example: rank of a target, NDCG, recall and precision at k.

Every metric ranks all items, not a sample of them, and is one number per row, so that it can be a reward. Ties are
counted against the ranking: a model that scores everything alike puts the target last.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ndcg", "ndcg_at", "precision", "precision_at", "ranking_metric", "ranks", "recall", "recall_at"]

_HIGHEST_GRADE = 100


def ranks(scores: Tensor, target: Tensor, exclude: Tensor | None = None) -> Tensor:
    """Rank of each row's target in the full ranking, 1 for the best.

    The rank is 1 + the number of other items whose score is at least the target's.

    Args:
        scores: Score of every item, finite, higher is better (rows, items).
        target: Index of the relevant item, integer (rows,).
        exclude: Items that are not ranked, such as those seen in training, bool (rows, items). A target cannot be one.

    Returns:
        int64 (rows,), from 1 to the number of ranked items.

    Raises:
        ValueError: If a shape, an index or a score is wrong, or a target is excluded.
    """
    _check_scores(scores, exclude)
    if target.shape != scores.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f"target: expected integers of shape ({len(scores)},), got {target.dtype} of shape {tuple(target.shape)}"
        )
    target = target.long()[:, None]  # (rows, 1)
    outside = (target < 0) | (target >= scores.shape[1])
    if outside.any():
        raise ValueError(f"target: expected indices from 0 to {scores.shape[1] - 1}, got {int(target[outside][0])}")
    ahead = scores >= scores.gather(1, target)
    if exclude is not None:
        hidden = exclude.gather(1, target)[:, 0]
        if hidden.any():
            raise ValueError(f"exclude: contains the target of row {int(hidden.nonzero()[0])}; targets must be ranked")
        ahead &= ~exclude
    return ahead.sum(1)  # the target is ahead of itself, which makes ranks start at 1


def ndcg_at(ranks: Tensor, k: int) -> Tensor:
    """NDCG@k with one relevant item: 1 / log2(1 + rank) if the rank is at most k, else 0.

    Args:
        ranks: Ranks from 1, as :func:`ranks` returns them (rows,).
        k: Length of the list that counts, at least 1.

    Returns:
        float32 (rows,) in [0, 1].

    Raises:
        ValueError: If ``ranks`` is empty or has a rank below 1, or ``k`` is no positive integer.
    """
    return recall_at(ranks, k) / torch.log2(1 + ranks)


def recall_at(ranks: Tensor, k: int) -> Tensor:
    """Recall@k with one relevant item, also called hit rate: 1 if the rank is at most k, else 0.

    Arguments, result and errors are those of :func:`ndcg_at`.
    """
    _check_k(k)
    if ranks.dim() != 1 or not len(ranks):
        raise ValueError(f"ranks: expected shape (rows,) with at least one row, got {tuple(ranks.shape)}")
    if not (ranks >= 1).all():
        raise ValueError(f"ranks: expected ranks from 1, got {ranks.min().item()}")
    return (ranks <= k).float()


def precision_at(ranks: Tensor, k: int) -> Tensor:
    """Precision@k with one relevant item: 1 / k if the rank is at most k, else 0.

    Arguments, result and errors are those of :func:`ndcg_at`.
    """
    return recall_at(ranks, k) / k


def ranking_metric(name: str, ranks: Tensor) -> Tensor:
    """A metric with one relevant item by its name, such as ``ndcg@10``, ``recall@5`` or ``precision@1``.

    Result is that of :func:`ndcg_at`, and so are the errors.

    Raises:
        ValueError: Also if there is no such metric.
    """
    kind, _, k = name.partition("@")
    if kind not in _METRICS or not k.isdecimal():
        raise ValueError(f"metric={name!r}: expected {', '.join(f'{known}@k' for known in _METRICS)}")
    return _METRICS[kind](ranks, int(k))


_METRICS = {"ndcg": ndcg_at, "recall": recall_at, "precision": precision_at}


def ndcg(scores: Tensor, relevance: Tensor, k: int, exclude: Tensor | None = None) -> Tensor:
    """NDCG@k with graded relevance: the discounted cumulative gain over that of the best possible order.

    DCG@k sums (2^grade - 1) / log2(1 + rank) over the first k items, the exponential gain of Burges et al. (2005). The
    measure's authors, Järvelin and Kekäläinen (2002), have the grade itself as gain; for grades 0 and 1 that is the
    same. Items with equal scores are ordered worst first.

    Args:
        scores: Score of every item, finite, higher is better (rows, items).
        relevance: Grade of every item from 0 (irrelevant) to 100, any numeric type or bool (rows, items).
        k: Length of the list that counts, at least 1; it may be more than there are items.
        exclude: Items that are not ranked, bool (rows, items); their grades do not count.

    Returns:
        float32 (rows,) in [0, 1].

    Raises:
        ValueError: If a shape or value is wrong, or a row has no relevant item, which leaves the metric undefined.
    """
    grades = _ranked(scores, relevance, k, exclude)
    _require_relevant(grades)
    gains = torch.exp2(grades) - 1
    discount = 1 / torch.log2(torch.arange(2, min(k, grades.shape[1]) + 2, device=grades.device, dtype=gains.dtype))
    ideal = gains.sort(dim=1, descending=True).values[:, :k] @ discount
    return (gains[:, :k] @ discount / ideal).float()


def recall(scores: Tensor, relevance: Tensor, k: int, exclude: Tensor | None = None) -> Tensor:
    """Recall@k: share of a row's relevant items (grade above 0) that are among the first k.

    With more than k relevant items 1 cannot be reached. Arguments, result and errors are those of :func:`ndcg`.
    """
    grades = _ranked(scores, relevance, k, exclude)
    _require_relevant(grades)
    relevant = grades > 0
    return relevant[:, :k].sum(1) / relevant.sum(1)


def precision(scores: Tensor, relevance: Tensor, k: int, exclude: Tensor | None = None) -> Tensor:
    """Precision@k: relevant items (grade above 0) among the first k, over k even where there are fewer items.

    Arguments, result and errors are those of :func:`ndcg`, but rows without a relevant item are 0.
    """
    return (_ranked(scores, relevance, k, exclude)[:, :k] > 0).sum(1) / k


def _ranked(scores: Tensor, relevance: Tensor, k: int, exclude: Tensor | None) -> Tensor:
    """Grades in the order of the scores, best first (rows, items) float64; excluded items are last, with grade 0."""
    _check_k(k)
    _check_scores(scores, exclude)
    if relevance.shape != scores.shape:
        raise ValueError(f"relevance: expected the shape of scores {tuple(scores.shape)}, got {tuple(relevance.shape)}")
    grades = relevance.double()
    wrong = ~((grades >= 0) & (grades <= _HIGHEST_GRADE))  # this way round, NaN is wrong too
    if wrong.any():
        raise ValueError(f"relevance: expected grades from 0 to {_HIGHEST_GRADE}, got {grades[wrong][0].item()}")
    if exclude is not None:
        scores = scores.double().masked_fill(exclude, -torch.inf)
        grades = grades.masked_fill(exclude, 0)
    # both sorts are stable, so ties of the second keep the order of the first: least relevant ahead
    grades, worst_first = grades.sort(dim=1, stable=True)
    order = scores.gather(1, worst_first).argsort(dim=1, descending=True, stable=True)
    return grades.gather(1, order)


def _check_scores(scores: Tensor, exclude: Tensor | None) -> None:
    """Refuse scores that cannot be ranked and masks that do not fit them."""
    if scores.dim() != 2 or not scores.numel():
        raise ValueError(f"scores: expected shape (rows, items), neither of them 0, got {tuple(scores.shape)}")
    if not torch.isfinite(scores).all():
        raise ValueError(f"scores: expected finite numbers, got {scores[~torch.isfinite(scores)][0].item()}")
    if exclude is not None and (exclude.dtype != torch.bool or exclude.shape != scores.shape):
        raise ValueError(
            f"exclude: expected bool of shape {tuple(scores.shape)}, got {exclude.dtype} of shape "
            f"{tuple(exclude.shape)}"
        )


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}: expected a positive integer")


def _require_relevant(grades: Tensor) -> None:
    """Refuse rows for which a share of the relevant items is 0 / 0."""
    without = ~(grades > 0).any(dim=1)
    if without.any():
        raise ValueError(f"relevance: row {int(without.nonzero()[0])} has no relevant item; leave such rows out")
