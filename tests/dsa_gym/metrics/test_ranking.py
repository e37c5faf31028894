import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_precision, retrieval_recall

from dsa_gym.metrics import ndcg, ndcg_at, precision, precision_at, ranks, recall, recall_at

SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.7], [3.0, 1.0, 3.0, 2.0]])
METRICS = (ndcg, recall, precision)
RANK_METRICS = (ndcg_at, recall_at, precision_at)


@pytest.mark.parametrize(
    ("target", "expected"),
    [([1, 3], [1, 3]), ([3, 1], [2, 4]), ([0, 0], [4, 2]), ([2, 2], [3, 2])],
)
def test_ranks_of_worked_values(target: list[int], expected: list[int]) -> None:
    assert ranks(SCORES, torch.tensor(target)).tolist() == expected


def test_constant_scores_put_the_target_last() -> None:
    assert ranks(torch.zeros(3, 7), torch.tensor([0, 3, 6])).tolist() == [7, 7, 7]


def test_excluded_items_are_not_ranked() -> None:
    exclude = torch.tensor([[False, True, False, False], [True, False, False, True]])
    assert ranks(SCORES, torch.tensor([2, 1]), exclude).tolist() == [2, 2]


def test_an_excluded_target_is_refused() -> None:
    exclude = torch.zeros(2, 4, dtype=torch.bool)
    exclude[1, 2] = True
    with pytest.raises(ValueError, match="exclude: contains the target of row 1"):
        ranks(SCORES, torch.tensor([2, 2]), exclude)


def test_metrics_of_ranks_of_worked_values() -> None:
    given_ranks = torch.tensor([1, 2, 3, 4])
    assert ndcg_at(given_ranks, 3).tolist() == pytest.approx([1, 1 / math.log2(3), 0.5, 0])
    assert recall_at(given_ranks, 3).tolist() == [1, 1, 1, 0]
    assert precision_at(given_ranks, 2).tolist() == [0.5, 0.5, 0, 0]


def test_graded_ndcg_of_a_worked_value() -> None:
    # ranked grades 3, 2, 3, 0, 1, 2; gains 7, 3, 7, 0, 1, 3
    dcg = 7 + 3 / math.log2(3) + 7 / 2 + 0 + 1 / math.log2(6) + 3 / math.log2(7)
    ideal = 7 + 7 / math.log2(3) + 3 / 2 + 3 / math.log2(5) + 1 / math.log2(6)
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    grades = torch.tensor([[3, 2, 3, 0, 1, 2]])
    assert ndcg(scores, grades, 6).item() == pytest.approx(dcg / ideal)
    assert ndcg(scores, grades, 99).item() == pytest.approx(dcg / ideal)
    assert ndcg(scores, grades, 2).item() == pytest.approx((7 + 3 / math.log2(3)) / (7 + 7 / math.log2(3)))
    assert recall(scores, grades, 4).item() == pytest.approx(3 / 5)
    assert precision(scores, grades, 4).item() == pytest.approx(3 / 4)
    assert precision(scores, grades, 10).item() == pytest.approx(5 / 10)


@pytest.mark.parametrize("k", [1, 2, 5, 12, 20])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ndcg, retrieval_normalized_dcg), (recall, retrieval_recall), (precision, retrieval_precision)],
)
def test_binary_relevance_agrees_with_torchmetrics(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], k: int, generator: torch.Generator
) -> None:
    # above 0: torchmetrics takes items with a score of 0 or less as not retrieved
    scores = torch.rand(30, 12, generator=generator) + 0.01
    relevance = torch.rand(30, 12, generator=generator) < 0.3
    relevance[:, 4] = True
    expected = [theirs(row, wanted, top_k=k) for row, wanted in zip(scores, relevance, strict=True)]
    torch.testing.assert_close(ours(scores, relevance, k), torch.stack(expected))


# few distinct scores, so that ties are common
@given(
    scores=st.lists(st.integers(0, 4), min_size=2, max_size=9),
    k=st.integers(1, 12),
    data=st.data(),
)
def test_one_relevant_item_is_the_metric_of_its_rank(scores: list[int], k: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(0, len(scores) - 1))
    hidden = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    exclude = torch.tensor([hidden])
    exclude[0, target] = False
    relevance = torch.zeros(1, len(scores))
    relevance[0, target] = 1
    row = torch.tensor([scores], dtype=torch.float32)
    rank = ranks(row, torch.tensor([target]), exclude)
    for general, of_rank in zip(METRICS, RANK_METRICS, strict=True):
        torch.testing.assert_close(general(row, relevance, k, exclude), of_rank(rank, k))


@given(
    grades=st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any),
    k=st.integers(1, 10),
    data=st.data(),
)
def test_ndcg_is_one_for_the_ideal_order_and_ties_never_help(grades: list[int], k: int, data: st.DataObject) -> None:
    relevance = torch.tensor([grades])
    assert ndcg(relevance.double(), relevance, k).item() == pytest.approx(1)
    size = len(grades)
    scores = torch.tensor([data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))], dtype=torch.float32)
    for metric in METRICS:
        tied = metric(scores, relevance, k).item()
        broken = metric(scores + 0.01 * torch.tensor([data.draw(st.permutations(range(size)))]), relevance, k).item()
        assert 0 <= tied <= broken + 1e-6
        assert broken <= 1 + 1e-6


def test_excluded_items_are_the_same_as_absent_ones(generator: torch.Generator) -> None:
    scores = torch.randn(5, 8, generator=generator)
    relevance = torch.randint(0, 4, (5, 8), generator=generator)
    relevance[:, 0] = 2
    exclude = torch.zeros(5, 8, dtype=torch.bool)
    exclude[:, 5:] = True
    for metric in METRICS:
        torch.testing.assert_close(metric(scores, relevance, 3, exclude), metric(scores[:, :5], relevance[:, :5], 3))


@pytest.mark.parametrize("metric", [ndcg, recall])
def test_rows_without_a_relevant_item_are_refused(metric: Callable[..., Tensor]) -> None:
    relevance = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]])
    exclude = torch.tensor([[False] * 4, [True, False, False, False]])
    assert len(metric(SCORES, relevance, 2)) == 2
    with pytest.raises(ValueError, match="relevance: row 1 has no relevant item"):
        metric(SCORES, relevance, 2, exclude)
    assert precision(SCORES, relevance, 2, exclude).tolist() == [0.5, 0]


@pytest.mark.parametrize(
    ("scores", "target", "exclude", "message"),
    [
        (torch.zeros(4), torch.tensor([0]), None, r"scores: expected shape \(rows, items\).*got \(4,\)"),
        (torch.zeros(0, 4), torch.zeros(0).long(), None, r"scores: .*got \(0, 4\)"),
        (torch.zeros(2, 0), torch.tensor([0, 0]), None, r"scores: .*got \(2, 0\)"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), None, "scores: expected finite numbers, got nan"),
        (torch.tensor([[0.0, -math.inf]]), torch.tensor([0]), None, "scores: expected finite numbers, got -inf"),
        (SCORES, torch.tensor([0]), None, r"target: expected integers of shape \(2,\).*\(1,\)"),
        (SCORES, torch.tensor([0.0, 1.0]), None, "target: expected integers.*float32"),
        (SCORES, torch.tensor([0, 4]), None, "target: expected indices from 0 to 3, got 4"),
        (SCORES, torch.tensor([-1, 0]), None, "target: expected indices from 0 to 3, got -1"),
        (SCORES, torch.tensor([0, 0]), torch.zeros(2, 4), "exclude: expected bool of shape.*float32"),
        (SCORES, torch.tensor([0, 0]), torch.zeros(2, 3).bool(), r"exclude: .*\(2, 3\)"),
    ],
)
def test_ranks_refuses(scores: Tensor, target: Tensor, exclude: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(scores, target, exclude)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("scores", "relevance", "message"),
    [
        (SCORES, torch.ones(2, 3), r"relevance: expected the shape of scores \(2, 4\), got \(2, 3\)"),
        (SCORES, -torch.ones(2, 4), "relevance: expected grades from 0 to 100, got -1.0"),
        (SCORES, torch.full((2, 4), math.nan), "relevance: .*got nan"),
        (SCORES, torch.full((2, 4), 101), "relevance: .*got 101"),
        (SCORES * math.inf, torch.ones(2, 4), "scores: expected finite numbers"),
    ],
)
def test_metrics_refuse(metric: Callable[..., Tensor], scores: Tensor, relevance: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(scores, relevance, 2)


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_k_must_be_a_positive_integer(k: int) -> None:
    for metric in METRICS:
        with pytest.raises(ValueError, match=r"k=.*expected a positive integer"):
            metric(SCORES, torch.ones(2, 4), k)
    for metric in RANK_METRICS:
        with pytest.raises(ValueError, match=r"k=.*expected a positive integer"):
            metric(torch.tensor([1]), k)


@pytest.mark.parametrize("metric", RANK_METRICS)
def test_metrics_of_ranks_refuse(metric: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"ranks: expected shape \(rows,\).*\(0,\)"):
        metric(torch.zeros(0).long(), 3)
    with pytest.raises(ValueError, match="ranks: expected ranks from 1, got 0"):
        metric(torch.tensor([3, 0]), 3)
