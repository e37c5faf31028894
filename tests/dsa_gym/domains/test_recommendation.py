"""The recommendation domain: what is encoded, what is scored, and what a gate may know before it decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Model

from dsa_gym import storage
from dsa_gym.backbone import Backbone
from dsa_gym.domains import make_domain, rows_of, take
from dsa_gym.domains.recommendation import CATALOGUE, RecommendationDomain, Window
from dsa_gym.pretrain.recommendation import RecommendationPretrainConfig, build_model

ITEMS = [f"item{i}" for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(RecommendationPretrainConfig(width=16, window=12, layers=2), len(ITEMS))
        for parameter in model.parameters():  # large enough that states move the logits
            parameter.data.mul_(5)
        model.save_pretrained(path)
    titles = [name.title() for name in ITEMS]
    storage.write_json(path / CATALOGUE, {"items": ITEMS, "titles": titles, "period": [0.0, 100.0]})
    return path


@pytest.fixture(scope="module")
def domain(folder: Path) -> RecommendationDomain:
    return RecommendationDomain.build(str(folder), history=4, targets=2)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone.load(folder)


RAW = [
    Window(("item1", "item2", "item3", "item4"), ("item5", "item6"), 10.0),
    Window(("item7",), ("item8", "item9"), 50.0),
    Window(("item10", "unknown"), ("item11", "item12"), 200.0),
    Window(("item10",), ("unknown", "item12"), 20.0),
    Window(("unknown",), ("item11", "item12"), 20.0),
]


def test_windows_do_not_overlap_and_keep_the_order(domain: RecommendationDomain) -> None:
    windows = domain.windows(ITEMS[:9], list(range(9)))
    assert [window.targets for window in windows] == [tuple(ITEMS[i : i + 2]) for i in (2, 4, 6)]
    assert [window.history for window in windows] == [tuple(ITEMS[:2]), tuple(ITEMS[:4]), tuple(ITEMS[2:6])]
    assert [window.time for window in windows] == [2.0, 4.0, 6.0]


@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 4))
def test_windows_of_any_lengths(length: int, history: int, targets: int) -> None:
    domain = RecommendationDomain(ITEMS, ITEMS, (0, 1), history=history, targets=targets)
    items = ITEMS[:length]
    windows = domain.windows(items, [10.0 * place for place in range(length)])
    scored = [item for window in windows for item in window.targets]
    # everything but the first items, which are history only, and what is left over at the end: each once, in order
    assert scored == items[targets : targets + len(scored)]
    assert length - targets - len(scored) < targets
    for window in windows:
        first = items.index(window.targets[0])
        assert len(window.targets) == targets
        assert window.history == tuple(items[max(0, first - history) : first])
        assert window.history
        assert window.time == 10.0 * first


def test_encode(domain: RecommendationDomain) -> None:
    examples, kept = domain.encode(RAW)
    assert kept.tolist() == [0, 1, 2]
    assert examples["tokens"].tolist() == [[0, 2, 3, 4, 5, 6, 7], [0, 8, 9, 10, 0, 0, 0], [0, 11, 12, 13, 0, 0, 0]]
    assert examples["length"].tolist() == [4, 1, 1]
    assert examples["moment"].tolist() == pytest.approx([0.1, 0.5, 1.0])
    assert (examples["tokens"].dtype, examples["length"].dtype) == (torch.int32, torch.int32)
    assert rows_of(domain.encode([RAW[0]._replace(targets=("item5",))])[0]) == 0  # one target too few
    early, _ = domain.encode([RAW[0]._replace(time=-5.0)])
    assert early["moment"].tolist() == [0.0]
    # known items are taken from before unknown ones, up to the length of the history
    longer, _ = domain.encode([Window((*ITEMS[:9], "unknown"), ("item10", "item11"), 0.0)])
    assert longer["tokens"].tolist() == [[0, 6, 7, 8, 9, 11, 12]]
    empty, none = domain.encode([])
    assert empty["tokens"].shape == (0, 7) and not len(none)


def test_losses_are_those_of_one_sequence_at_a_time(domain: RecommendationDomain, backbone: Backbone) -> None:
    examples, _ = domain.encode(RAW)
    with torch.no_grad():
        losses = domain.losses(backbone.model, examples)
        parts = domain.losses(backbone.model, examples, parts=True)
        for row, window in enumerate(RAW[:3]):
            known = [ITEMS.index(item) + 1 for item in window.history if item in ITEMS]
            expected = []
            for target in (ITEMS.index(item) + 1 for item in window.targets):
                logits = backbone.model(input_ids=torch.tensor([[0, *known]])).logits[0, -1]
                expected.append(float(torch.logsumexp(logits, 0) - logits[target]))
                known.append(target)
            assert float(losses[row]) == pytest.approx(np.mean(expected), rel=1e-5)
            assert parts[row].tolist() == pytest.approx([expected[0] / 2, expected[1] / 2], rel=1e-5)


@pytest.mark.parametrize("targets", [1, 2, 3])
def test_parts_sum_to_the_loss_and_it_has_a_gradient(folder: Path, targets: int) -> None:
    domain = RecommendationDomain.build(str(folder), history=4, targets=targets)
    backbone = Backbone.load(folder)
    examples, _ = domain.encode([Window(("item1", "item2"), tuple(ITEMS[10 : 10 + targets]), 0.0)] * 2)
    backbone.model.get_submodule("transformer.h.0").requires_grad_(True)
    parts = domain.losses(backbone.model, examples, parts=True)
    losses = domain.losses(backbone.model, examples)
    assert parts.shape == (2, 2)
    torch.testing.assert_close(parts.sum(1), losses)
    assert bool((parts[:, 1] > 0).all()) == (targets > 1)
    assert losses.requires_grad


@pytest.mark.parametrize("row", [0, 1, 2])
def test_padding_does_not_matter(folder: Path, backbone: Backbone, domain: RecommendationDomain, row: int) -> None:
    """A row among longer ones is the row alone, and alone it is what a domain without room for padding makes of it."""
    examples, _ = domain.encode(RAW[:3])
    length = int(examples["length"][row])
    bare = RecommendationDomain.build(str(folder), history=length, targets=2)
    alone, _ = bare.encode([RAW[row]])
    assert alone["tokens"].shape[1] == 1 + length + 2

    def everything(domain: RecommendationDomain, examples: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [
            domain.losses(backbone.model, examples),
            domain.losses(backbone.model, examples, parts=True),
            domain.features(backbone.model, examples, context=True),
            domain.features(backbone.model, examples, context=False),
            *(domain.metric(backbone.model, name, examples) for name in domain.metrics),
        ]

    with torch.no_grad():
        batch, single, shortest = (
            everything(domain, examples),
            everything(domain, take(examples, torch.tensor([row]))),
            everything(bare, alone),
        )
    for value, other, short in zip(batch, single, shortest, strict=True):
        torch.testing.assert_close(value[row : row + 1], other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other, short, rtol=1e-4, atol=1e-5)


def test_metric_is_the_rank_among_what_was_not_chosen(domain: RecommendationDomain, backbone: Backbone) -> None:
    examples, _ = domain.encode(RAW)
    recall = domain.metric(backbone.model, "recall@10", examples)
    ndcg = domain.metric(backbone.model, "ndcg@10", examples)
    precision = domain.metric(backbone.model, "precision@10", examples)
    for row in range(3):
        n, tokens, hits, gains = int(examples["length"][row]), examples["tokens"][row].tolist(), [], []
        for step in range(2):
            seen = tokens[: n + step + 1]
            with torch.no_grad():
                logits = backbone.model(input_ids=torch.tensor([seen])).logits[0, -1]
            order = [i for i in logits.argsort(descending=True).tolist() if i and i not in seen]
            rank = order.index(tokens[n + step + 1]) + 1
            hits.append(rank <= 10)
            gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0.0)
        assert float(recall[row]) == pytest.approx(np.mean(hits))
        assert float(ndcg[row]) == pytest.approx(np.mean(gains), rel=1e-5)
        assert float(precision[row]) == pytest.approx(np.mean(hits) / 10)
    with pytest.raises(ValueError, match="metric='mrr': expected one of ndcg@10"):
        domain.metric(backbone.model, "mrr", examples)


def test_context_knows_the_time_but_not_the_targets(domain: RecommendationDomain, backbone: Backbone) -> None:
    examples, _ = domain.encode(RAW)
    changed, _ = domain.encode([window._replace(targets=("item20", "item21")) for window in RAW])
    later, _ = domain.encode([window._replace(time=90.0) for window in RAW[:2]])
    with torch.no_grad():
        context, other, late = (domain.features(backbone.model, e, context=True) for e in (examples, changed, later))
        whole = domain.features(backbone.model, examples, context=False)
        assert not torch.allclose(whole[:3], domain.features(backbone.model, changed, context=False)[:3])
        alone = domain.features(backbone.model, take(examples, torch.tensor([1])), context=False)
    torch.testing.assert_close(context, other[:3])
    assert not torch.allclose(context[:2], late)
    torch.testing.assert_close(whole[1:2], alone)


def test_what_there_is_to_see(domain: RecommendationDomain, backbone: Backbone) -> None:
    examples, _ = domain.encode(RAW)
    assert domain.describe(examples, 0) == {"history": "Item1; Item2; Item3; Item4", "next": "Item5; Item6"}
    listed = domain.outcome(backbone.model, take(examples, torch.tensor([0])))["top 10"].split("; ")
    assert len(listed) == 10 and not {"Item1", "Item2", "Item3", "Item4"} & set(listed)
    hit = domain.metric(backbone.model, "recall@10", take(examples, torch.tensor([0])))
    assert ("[Item5]" in listed) <= bool(hit > 0)


@pytest.mark.parametrize("place", [0, 4, 9, 10])
def test_the_true_item_is_marked_where_it_is(domain: RecommendationDomain, backbone: Backbone, place: int) -> None:
    history = RAW[0].history
    tokens = torch.tensor([[0, *(ITEMS.index(item) + 1 for item in history)]])
    with torch.no_grad():
        order = backbone.model(input_ids=tokens).logits[0, -1].argsort(descending=True).tolist()
    unread = [ITEMS[token - 1] for token in order if token and ITEMS[token - 1] not in history]
    examples, _ = domain.encode([Window(history, (unread[place], unread[20]), 0.0)])
    expected = [f"[{item.title()}]" if item == unread[place] else item.title() for item in unread[:10]]
    assert domain.outcome(backbone.model, examples) == {"top 10": "; ".join(expected)}


def test_a_long_history_is_shown_from_its_end(folder: Path) -> None:
    domain = RecommendationDomain.build(str(folder), history=15, targets=2)
    examples, _ = domain.encode([Window(tuple(ITEMS[:14]), (ITEMS[20], ITEMS[21]), 0.0)])
    assert domain.describe(examples, 0)["history"] == "; ".join(f"Item{i}" for i in range(4, 14))


def test_one_outcome_at_a_time(domain: RecommendationDomain, backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="examples: 3 rows, expected one"):
        domain.outcome(backbone.model, domain.encode(RAW)[0])


def test_a_list_ends_where_nothing_new_is_left() -> None:
    items = [f"i{number}" for number in range(10)]
    domain = RecommendationDomain(items, items, (0, 1), history=4, targets=1)
    examples, _ = domain.encode([Window(tuple(items[:4]), (items[9],), 0.0)])
    model = build_model(RecommendationPretrainConfig(width=8, heads=1, layers=1, window=8), len(items)).eval()
    shown = domain.outcome(model, examples)["top 10"].split("; ")
    assert sorted(name.strip("[]") for name in shown) == items[4:]


def test_settings_make_the_domain_again(folder: Path) -> None:
    domain = RecommendationDomain.build(str(folder), history=5, targets=3)
    again = make_domain("recommendation", domain.settings(), backbone_source=str(folder))
    assert vars(again) == vars(domain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"history": 0}, "history=0"), ({"targets": 0}, "targets=0"), ({"window": 3}, "not the settings of")],
)
def test_bad_settings(folder: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_domain("recommendation", settings, backbone_source=str(folder))


@pytest.mark.parametrize(
    ("items", "titles", "period", "message"),
    [
        (ITEMS[:9], ITEMS[:9], (0, 1), "items: 9 ids, 9 of them distinct, and 9 titles"),
        ([*ITEMS, "item3"], [*ITEMS, "again"], (0, 1), "items: 31 ids, 30 of them distinct"),
        (ITEMS, ITEMS[1:], (0, 1), "30 of them distinct, and 29 titles"),
        (ITEMS, ITEMS, (2, 1), r"period=\[2, 1\]: expected the first and the last time"),
        (ITEMS, ITEMS, (0, float("nan")), r"period=\[0, nan\]"),
        (ITEMS, ITEMS, (0,), r"period=\[0\]"),
    ],
)
def test_catalogues_that_cannot_be_used(items: Any, titles: Any, period: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecommendationDomain(items, titles, period)


def test_all_at_one_time(folder: Path, backbone: Backbone) -> None:
    domain = RecommendationDomain(ITEMS, ITEMS, (5, 5), history=4)
    examples, _ = domain.encode(RAW[:3])
    assert domain.features(backbone.model, examples, context=True).isfinite().all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "expected a JSON object with 'items' and 'titles' "),
        (b'{"items": [], "titles": []}', "expected a JSON object with 'items' and 'titles' "),
        (b'{"items": [1], "titles": ["one"], "period": [0, 1]}', "expected a JSON object with 'items' and 'titles' "),
        (b'{"items":', "is not JSON: line 1"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_damaged_catalogues(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / CATALOGUE).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        RecommendationDomain.build(str(tmp_path))
    assert str(tmp_path / CATALOGUE) in str(error.value)


def test_backbones_that_do_not_fit(folder: Path, domain: RecommendationDomain, tmp_path: Path) -> None:
    backbone = Backbone.load(folder)
    domain.check(backbone)
    with pytest.raises(ValueError, match=r"no items.json there; expected a folder written by"):
        RecommendationDomain.build(str(tmp_path))
    with pytest.raises(ValueError, match=r"history=11, targets=2: take 14 positions .* the backbone's window has 12"):
        RecommendationDomain.build(str(folder), history=11, targets=2).check(backbone)
    with pytest.raises(ValueError, match="with 31 tokens; expected a causal model over the catalogue, 29 items"):
        RecommendationDomain(ITEMS[:29], ITEMS[:29], (0, 1)).check(backbone)
    backbone.model = GPT2Model(backbone.config)  # it has no head
    with pytest.raises(ValueError, match="GPT2Model with 31 tokens; expected a causal model"):
        domain.check(backbone)


def test_the_longest_examples_that_pass_the_check_can_be_read(folder: Path, backbone: Backbone) -> None:
    for history in range(8, 13):
        domain = RecommendationDomain.build(str(folder), history=history, targets=2)
        try:
            domain.check(backbone)
        except ValueError:
            continue
        examples, _ = domain.encode([Window(tuple(ITEMS[:history]), (ITEMS[20], ITEMS[21]), 0.0)])
        domain.losses(backbone.model, examples)
        domain.features(backbone.model, examples, context=True)
        domain.features(backbone.model, examples, context=False)
