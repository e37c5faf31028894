"""Pre-training on interactions: who is held out, what is measured, a run that failed is the same run, it learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsa_gym import storage
from dsa_gym.backbone import Backbone
from dsa_gym.data import DataError, UserInteractions, split_users
from dsa_gym.domains.recommendation import CATALOGUE, RecommendationDomain
from dsa_gym.generators.tastes import TasteConfig, catalogue, generate_tastes, write_tastes
from dsa_gym.pretrain import recommendation as pretrain
from dsa_gym.pretrain.recommendation import RecommendationPretrainConfig, pretrain_recommendation

TASTES = TasteConfig(users=30, items=40, genres=3, min_interactions=8, max_interactions=20)
CONFIG = RecommendationPretrainConfig(
    batch_size=8, steps=12, learning_rate=1e-2, width=8, layers=1, heads=2, window=10, dropout=0.1
)
TITLES = {item.item: item.title for item in catalogue(TASTES)[:-1]}  # one has none
Result = tuple[Path, dict[str, Any]]


def readers(config: TasteConfig) -> list[UserInteractions]:
    return [
        UserInteractions(name, tuple(r.item for r in rows), tuple(float(r.time) for r in rows), None)
        for name, rows in generate_tastes(config)
    ]


USERS = readers(TASTES)


def pretrained(out: Path, users: Sequence[UserInteractions] = USERS, **settings: Any) -> dict[str, Any]:
    return pretrain_recommendation(users, out, replace(CONFIG, **settings), titles=TITLES, checkpoint_every=4)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A whole run: its folder and what it returned."""
    out = tmp_path_factory.mktemp("unbroken")
    return out, pretrained(out)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_what_is_written(unbroken: Result) -> None:
    out, result = unbroken
    backbone = Backbone.load(out)
    domain = RecommendationDomain.build(str(out), history=7, targets=2)
    domain.check(backbone)
    items = sorted({item for user in USERS for item in user.items})
    assert domain.items == items
    assert domain.titles == [TITLES.get(item, item) for item in items]
    assert domain.period == (min(user.times[0] for user in USERS), max(user.times[-1] for user in USERS))
    assert {tensor.dtype for tensor in storage.read_tensors(out / "model.safetensors").values()} == {torch.float16}
    assert not (out / "generation_config.json").exists()
    record = storage.read_json(out / "pretrain.json")
    assert result.items() <= record.items()
    assert record["config"]["width"] == 8
    assert (record["users"], record["items"], record["data"]) == (30, len(items), {})
    assert {"dsa-gym", "torch", "transformers"} <= record["versions"].keys()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers")
    parameters = sum(p.numel() for p in backbone.model.parameters())
    assert f"transformer of {parameters:,} parameters (1 layers, width 8, 2 heads)" in card
    for split in ("seen", "unseen"):
        for name, values in result[split].items():
            assert f"| {name} | {split} | " + " | ".join(f"{value:.4f}" for value in values.values()) + " |" in card
    assert "{" not in card


def test_files_and_what_reading_dropped_are_on_record(tmp_path: Path) -> None:
    file = tmp_path / "tastes.csv"
    write_tastes(TASTES, file)
    config = replace(CONFIG, steps=1)
    pretrain_recommendation(USERS, tmp_path / "out", config, data_files=[file], report={"duplicates": 3})
    record = storage.read_json(tmp_path / "out" / "pretrain.json")
    assert record["data"] == {"tastes.csv": storage.sha256(file)}
    assert record["read"] == {"duplicates": 3}
    assert storage.read_json(tmp_path / "out" / CATALOGUE)["titles"] == record_items(tmp_path / "out")


def record_items(out: Path) -> Any:
    return storage.read_json(out / CATALOGUE)["items"]


def test_held_out_users_and_latest_items_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # nobody shares an item, so that a token says whose it is and at which place
    lengths = {f"user{index}": 4 + index % 7 for index in range(20)}
    users = [
        UserInteractions(name, tuple(f"{name} {place:02d}" for place in range(n)), tuple(map(float, range(n))), None)
        for name, n in lengths.items()
    ]
    trained: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    loss, popularity = pretrain.sequence_loss, pretrain.popularity

    def watched(model: Any, sequences: Sequence[np.ndarray]) -> Tensor:
        trained.extend(sequences if model.training else [])
        return loss(model, sequences)

    def watched_popularity(sequences: Any, items: int) -> Tensor:
        counted.extend(sequences)
        return popularity(sequences, items)

    monkeypatch.setattr(pretrain, "sequence_loss", watched)
    monkeypatch.setattr(pretrain, "popularity", watched_popularity)
    pretrained(tmp_path, users, latest=0.3, window=5)
    items = record_items(tmp_path)
    groups = split_users(list(lengths), validation=CONFIG.validation, test=CONFIG.test, seed=CONFIG.seed)
    assert storage.read_json(tmp_path / "pretrain.json")["trained_users"] == groups["train"]
    kept = {name: lengths[name] - max(1, round(0.3 * lengths[name])) for name in groups["train"]}
    expected = {f"{name} {place:02d}" for name, n in kept.items() for place in range(n)}
    assert {items[token - 1] for sequence in trained for token in sequence} == expected
    assert {items[index] for sequence in counted for index in sequence} == expected
    for sequence in trained:  # a stretch of one user's items, in order, as long as it can be
        names = [items[token - 1] for token in sequence]
        owner, first = names[0].split()
        assert names == [f"{owner} {place:02d}" for place in range(int(first), int(first) + len(names))]
        assert len(names) == min(5, kept[owner])


def test_the_result_is_that_of_ranking_by_hand(unbroken: Result) -> None:
    """With the weights as shipped: each user's last item among all that are not in the rest of the sequence."""
    out, result = unbroken
    model, items = Backbone.load(out).model, record_items(out)
    sequence = {user.user: [items.index(item) for item in user.items] for user in USERS}
    groups = split_users(list(sequence), validation=CONFIG.validation, test=CONFIG.test, seed=CONFIG.seed)
    kept = [sequence[u][: len(sequence[u]) - max(1, round(0.2 * len(sequence[u])))] for u in groups["train"]]
    count = np.zeros((len(kept), len(items)))
    for row, known in enumerate(kept):
        count[row, known] = 1
    together = count.T @ count
    norm = np.sqrt(np.diag(together))
    cosine = together / (np.outer(norm, norm) + 10)
    np.fill_diagonal(cosine, 0)

    @torch.no_grad()
    def next_logits(history: list[int]) -> np.ndarray:
        tokens = torch.tensor([[0, *(item + 1 for item in history)]])
        return np.asarray(model(input_ids=tokens).logits[0, -1])

    for split, group in (("seen", "train"), ("unseen", "test")):
        gains: dict[str, list[tuple[float, ...]]] = {"model": [], "popularity": [], "item-kNN": []}
        for user in groups[group]:
            *history, target = sequence[user]
            scores = {
                "model": next_logits(history[-(CONFIG.window - 1) :])[1:],
                "popularity": count.sum(0),
                "item-kNN": cosine[history[-5:]].sum(0),
            }
            for name, score in scores.items():
                rank = sum(float(score[i]) >= float(score[target]) for i in range(len(items)) if i not in history)
                hit = float(rank <= 10)
                gains[name].append((hit / math.log2(1 + rank), hit, hit / 10))
        for name, rows in gains.items():
            assert list(result[split][name]) == ["ndcg@10", "recall@10", "precision@10"]
            assert list(result[split][name].values()) == pytest.approx(np.mean(rows, axis=0), rel=1e-5)
    losses = []
    for user in groups["validation"]:
        latest = sequence[user][-CONFIG.window :]
        for place, target in enumerate(latest):
            logits = next_logits(latest[:place]).astype(np.float64)
            losses.append(math.log(np.exp(logits).sum()) - logits[target + 1])
    assert result["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_padding_is_not_counted() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = pretrain.build_model(CONFIG, 40).eval()
    sequences = [np.arange(1, n + 1) for n in (2, 10, 5)]
    with torch.no_grad():
        alone = [float(pretrain.sequence_loss(model, [sequence])) for sequence in sequences]
        together = float(pretrain.sequence_loss(model, sequences))
    assert together == pytest.approx(np.average(alone, weights=[2, 10, 5]), rel=1e-5)


def test_a_second_run_is_equal(unbroken: Result, tmp_path: Path) -> None:
    out, result = unbroken
    torch.manual_seed(1234)  # a run owes nothing to what its process did before
    # nor to the order in which the users come
    assert pretrained(tmp_path, USERS[::-1]) == result
    assert weights(tmp_path) == weights(out)
    records = [storage.read_json(folder / "pretrain.json") | {"seconds": 0} for folder in (out, tmp_path)]
    assert records[0] == records[1]


@pytest.mark.parametrize("stop", [2, 7, 12])
def test_a_run_that_failed_goes_on_bit_for_bit(
    unbroken: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    steps = 0
    original = pretrain.sequence_loss

    def counting(model: Any, sequences: Sequence[np.ndarray]) -> Tensor:
        nonlocal steps
        steps += model.training
        if steps == stop:
            raise KeyboardInterrupt
        return original(model, sequences)

    monkeypatch.setattr(pretrain, "sequence_loss", counting)
    with pytest.raises(KeyboardInterrupt):
        pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    steps = 100
    assert pretrained(tmp_path) == unbroken[1]
    assert steps - 100 == CONFIG.steps - (stop - 1) // 4 * 4  # it went on from the last checkpoint
    assert weights(tmp_path) == weights(unbroken[0])


def test_another_run_is_not_overwritten(unbroken: Result) -> None:
    out, _ = unbroken
    before = weights(out)
    read_otherwise = [*USERS[:-1], replace(USERS[-1], times=tuple(time + 1 for time in USERS[-1].times))]
    for users, settings in ((USERS, {"seed": 1}), (USERS, {"steps": 13}), (USERS[1:], {}), (read_otherwise, {})):
        with pytest.raises(ValueError, match="holds a run with another configuration or data"):
            pretrained(out, users, **settings)
    assert weights(out) == before


def test_loss_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "sequence_loss", lambda *_: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0: lower learning_rate"):
        pretrained(tmp_path)


def test_too_few_users(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 users are too few"):
        pretrained(tmp_path, USERS[:2])
    pretrained(tmp_path)  # the refused attempt did not claim the folder


def test_users_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="users must be distinct"):
        pretrained(tmp_path, [*USERS, USERS[0]])
    few = [UserInteractions(user.user, user.items[:1], user.times[:1], None) for user in USERS[:5]]
    with pytest.raises(ValueError, match="different items in all, expected 10 or more"):
        pretrained(tmp_path, few)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"layers": 0}, "layers=0: expected a positive integer"),
        ({"window": 1}, "window=1: expected at least 2"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"weight_decay": math.inf}, "weight_decay=inf"),
        ({"seed": -1}, "seed=-1"),
        ({"width": 10, "heads": 4}, "width=10: expected a multiple of heads=4"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"latest": -0.1}, "latest=-0.1"),
        ({"latest": math.nan}, "latest=nan"),
        ({"validation": 0.0}, "validation=0.0"),
        ({"test": 1.0}, "test=1.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecommendationPretrainConfig(**settings)


def test_it_learns_what_popularity_does_not_know(tmp_path: Path) -> None:
    """Ordinary readers mostly read the next item of a series, about half of what they do can be foreseen."""
    users = readers(TasteConfig(users=120, items=200, genres=4, min_interactions=25, max_interactions=40))
    result = {}
    for name, steps in (("untrained", 1), ("trained", 150)):
        config = replace(
            CONFIG, batch_size=32, steps=steps, learning_rate=5e-3, weight_decay=0.1, width=32, window=24, test=0.3
        )
        result[name] = pretrain_recommendation(users, tmp_path / name, config)
    gain = {name: scores["ndcg@10"] for name, scores in result["trained"]["unseen"].items()}
    assert gain["model"] > gain["popularity"] + 0.5
    assert gain["model"] > gain["item-kNN"] + 0.2
    assert result["untrained"]["unseen"]["model"]["ndcg@10"] < gain["popularity"] + 0.1
