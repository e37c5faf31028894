"""The recommendation domain: what is encoded, what is scored, and what a gate may know before it decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dsa_gym import storage
from dsa_gym.backbone import Backbone
from dsa_gym.domains import take
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


def test_encode(domain: RecommendationDomain) -> None:
    examples, kept = domain.encode(RAW)
    assert kept.tolist() == [0, 1, 2]
    assert examples["tokens"].tolist() == [[0, 2, 3, 4, 5, 6, 7], [0, 8, 9, 10, 0, 0, 0], [0, 11, 12, 13, 0, 0, 0]]
    assert examples["length"].tolist() == [4, 1, 1]
    assert examples["moment"].tolist() == pytest.approx([0.1, 0.5, 1.0])
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


def test_metric_is_the_rank_among_what_was_not_chosen(domain: RecommendationDomain, backbone: Backbone) -> None:
    examples, _ = domain.encode(RAW)
    recall = domain.metric(backbone.model, "recall@10", examples)
    ndcg = domain.metric(backbone.model, "ndcg@10", examples)
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"history": 0}, "history=0"), ({"targets": 0}, "targets=0"), ({"window": 3}, "not the settings of")],
)
def test_bad_settings(folder: Path, settings: dict[str, int], message: str) -> None:
    from dsa_gym.domains import make_domain

    with pytest.raises(ValueError, match=message):
        make_domain("recommendation", settings, backbone_source=str(folder))


def test_backbones_that_do_not_fit(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no items.json there"):
        RecommendationDomain.build(str(tmp_path))
    with pytest.raises(ValueError, match="the backbone's window has 12 positions"):
        RecommendationDomain.build(str(folder), history=11, targets=2).check(backbone)
    with pytest.raises(ValueError, match="with 31 tokens; expected a causal model over the catalogue, 29 items"):
        RecommendationDomain(ITEMS[:29], ITEMS[:29], (0, 1)).check(backbone)
