"""Pre-training of the recommendation backbone: ``dsa-gym pretrain recommendation --data FILE --out DIR``.

A SASRec-style causal transformer over item ids (Kang and McAuley, 2018), built as a Hugging Face GPT-2 and trained with
the next-item cross-entropy over the full catalogue. Some users are held out altogether, so that a bundle made of the
same file has people whom nothing was trained on; of the others the latest interactions are held out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dsa_gym import storage
from dsa_gym.data import UserInteractions
from dsa_gym.domains.recommendation import CATALOGUE, SHOWN, RecommendationDomain
from dsa_gym.metrics.ranking import ranking_metric, ranks
from dsa_gym.pretrain.loop import UsersConfig, claim, fit
from dsa_gym.recommenders import ItemNeighbours, popularity

METRICS = RecommendationDomain.metrics


@dataclass(frozen=True)
class RecommendationPretrainConfig(UsersConfig):
    """What the backbone is and how it is trained, see :class:`~dsa_gym.pretrain.loop.UsersConfig`.

    Attributes:
        window: Items per training sequence; also the longest input of the model.
        dropout: Of embeddings, attention and sublayers, in training.
        latest: Share of a user's interactions, the latest, that is not trained on.
    """

    batch_size: int = 64
    steps: int = 800
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    width: int = 64
    layers: int = 2
    heads: int = 2
    window: int = 32
    dropout: float = 0.6
    latest: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        super().__post_init__()
        if self.window < 2:
            raise ValueError(f"window={self.window}: expected at least 2 items, one to predict from another")
        for name in ("dropout", "latest"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share in [0, 1)")


def build_model(config: RecommendationPretrainConfig, items: int) -> GPT2LMHeadModel:
    """Return a GPT-2 over ``items`` items; token 0 begins every sequence, token ``i + 1`` is item i."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=items + 1,
            n_positions=config.window,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def sequence_loss(model: GPT2LMHeadModel, sequences: Sequence[np.ndarray]) -> Tensor:
    """Mean next-item cross-entropy in nats over all places of some token sequences."""
    longest = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), longest + 1, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, 1 : len(sequence) + 1] = torch.from_numpy(sequence)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), ignore_index=0)


def pretrain_recommendation(
    users: Sequence[UserInteractions],
    out: Path,
    config: RecommendationPretrainConfig | None = None,
    *,
    titles: dict[str, str] | None = None,
    data_files: Sequence[Path] = (),
    report: dict[str, Any] | None = None,
    checkpoint_every: int = 50,
) -> dict[str, Any]:
    """Pre-train the backbone and write it to ``out`` as a Hugging Face folder with its catalogue.

    Args:
        users: Their interactions in time order.
        out: Folder for weights (fp16 safetensors), ``items.json``, ``README.md`` (model card) and ``pretrain.json``.
        config: Size and schedule.
        titles: What to show of an item; its id where there is none.
        data_files: Where ``users`` came from, for the record.
        report: What reading them dropped, for the record.
        checkpoint_every: Optimiser steps between checkpoints and measurements on the validation users.

    Returns:
        ``seen`` and ``unseen``: for users trained on and not, NDCG, recall and precision at 10 of the last item in
        the full ranking, for ``model``, ``popularity`` and ``item-kNN``; and ``validation_loss`` in nats per item.

    Raises:
        ValueError: For too few users, or an ``out`` that holds another run.
        FloatingPointError: If the loss is not finite; the last checkpoint stays.
    """
    config = config or RecommendationPretrainConfig()
    out = Path(out)
    items = sorted({item for user in users for item in user.items})
    if len(items) < SHOWN:
        raise ValueError(f"users: {len(items)} different items in all, expected {SHOWN} or more")
    groups = config.split([user.user for user in users])
    ordered = sorted(users, key=lambda user: user.user)
    content = storage.digest(json.dumps([u.user, u.items, u.times]).encode("ascii") for u in ordered)
    key = {"config": asdict(config), "data": storage.checksums(data_files), "users": len(users), "content": content}
    claim(out, key)
    token = {item: index + 1 for index, item in enumerate(items)}
    sequence = {user.user: np.asarray([token[item] for item in user.items]) for user in users}
    trained = [_earlier(sequence[user], config.latest) for user in groups["train"]]
    torch.manual_seed(config.seed)
    model = build_model(config, len(items))

    def loss(generator: np.random.Generator) -> Tensor:
        chosen = [trained[i] for i in generator.integers(0, len(trained), config.batch_size)]
        ends = [int(generator.integers(min(len(s), config.window), len(s) + 1)) for s in chosen]
        return sequence_loss(model, [s[max(0, end - config.window) : end] for s, end in zip(chosen, ends, strict=True)])

    held = [sequence[user][-config.window :] for user in groups["validation"]]

    @torch.no_grad()
    def validate() -> float:
        model.eval()
        value = float(sequence_loss(model, held))
        model.train()
        return value

    model.train()
    seconds = fit(
        model,
        loss,
        config,
        out / "checkpoint" / "state.safetensors",
        checkpoint_every=checkpoint_every,
        validate=validate,
    )
    model = model.eval().half().float()  # measured as shipped
    result: dict[str, Any] = {"validation_loss": validate()}
    model.eval()
    for name, group in (("seen", "train"), ("unseen", "test")):
        result[name] = _compare(model, trained, [sequence[user] for user in groups[group]], len(items), config.window)
    model.half().save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)  # nothing generates with this model
    shown = titles or {}
    period = [min(user.times[0] for user in users), max(user.times[-1] for user in users)]
    storage.write_json(
        out / CATALOGUE, {"items": items, "titles": [shown.get(item, item) for item in items], "period": period}
    )
    record = {**result, **key, "trained_users": groups["train"], "items": len(items), "read": report or {}}
    record |= {"seconds": round(seconds, 1), "versions": storage.versions()}
    storage.write_json(out / "pretrain.json", record)
    _write_card(out, config, result, len(items), len(trained), sum(p.numel() for p in model.parameters()))
    return result


def _earlier(sequence: np.ndarray, latest: float) -> np.ndarray:
    """All but the latest share of a sequence, at least one item of each."""
    return sequence[: max(1, len(sequence) - max(1, round(latest * len(sequence))))]


@torch.no_grad()
def _compare(
    model: GPT2LMHeadModel, trained: Sequence[np.ndarray], sequences: Sequence[np.ndarray], items: int, window: int
) -> dict[str, dict[str, float]]:
    """Rank each sequence's last item among all items that are not in the rest of it."""
    counted = [sequence - 1 for sequence in trained]  # item indices
    rivals = (popularity(counted, items), ItemNeighbours(counted, items))
    parts = [sequences[start : start + 256] for start in range(0, len(sequences), 256)]
    places = [_places(model, part, window, *rivals) for part in parts]
    return {
        name: {
            metric: float(ranking_metric(metric, torch.cat([place[name] for place in places])).mean())
            for metric in METRICS
        }
        for name in places[0]
    }


def _places(
    model: GPT2LMHeadModel,
    sequences: Sequence[np.ndarray],
    window: int,
    popular: Tensor,
    neighbours: ItemNeighbours,
) -> dict[str, Tensor]:
    """Rank of each sequence's last item by each recommender, (sequences,)."""
    histories = [sequence[:-1] for sequence in sequences]
    logits = [
        model(input_ids=torch.from_numpy(np.r_[0, h[-(window - 1) :]])[None], use_cache=False).logits[0, -1, 1:]
        for h in histories
    ]
    scores = {
        "model": torch.stack(logits),
        "popularity": popular.expand(len(histories), -1),
        "item-kNN": neighbours.scores([history - 1 for history in histories]),
    }
    row = torch.from_numpy(np.repeat(np.arange(len(histories)), [len(h) for h in histories]))
    known = torch.from_numpy(np.concatenate(histories) - 1)
    target = torch.tensor([int(sequence[-1]) - 1 for sequence in sequences])
    result = {}
    for name, value in scores.items():
        table = value.clone()
        table[row, known] = torch.finfo(table.dtype).min
        result[name] = ranks(table, target)
    return result


def _write_card(
    out: Path, config: RecommendationPretrainConfig, result: dict[str, Any], items: int, users: int, parameters: int
) -> None:
    lines = [
        f"| {name} | {split} | " + " | ".join(f"{value:.4f}" for value in result[split][name].values()) + " |"
        for split in ("unseen", "seen")
        for name in result[split]
    ]
    card = _MODEL_CARD.format(**asdict(config), items=items, users=users, parameters=parameters, table="\n".join(lines))
    storage.write_text(out / "README.md", card)


_MODEL_CARD = """---
library_name: transformers
license: apache-2.0
---
# dsa-gym recommendation backbone

A SASRec-style causal transformer of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads) over
{items:,} items, the frozen model of the recommendation domain. Token 0 begins a sequence, token i + 1 is item i of
`items.json`.

- Trained on {users:,} users without the latest {latest:.0%} of their interactions: at most {steps} steps of
  {batch_size} sequences of {window} items, dropout {dropout}, AdamW, peak learning rate {learning_rate}, weight decay
  {weight_decay}, seed {seed}; the weights are those that were best on the validation users ({validation:.0%}).
- Each user's last item in the full ranking, without what the user has chosen before; fp16 weights as shipped:

| | users | NDCG@10 | recall@10 | precision@10 |
|---|---|---|---|---|
{table}

- Re-made by `dsa-gym pretrain recommendation`; `pretrain.json` has the configuration, the checksums and the versions.
"""
