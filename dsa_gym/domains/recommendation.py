"""Recommendation: an example is a stretch of a user's history, the next items are scored one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsa_gym import storage
from dsa_gym.backbone import Backbone, resolve_source
from dsa_gym.domains import Examples, cross_entropy, rows_of
from dsa_gym.metrics.ranking import ranking_metric, ranks

CATALOGUE = "items.json"
"""In the backbone's folder: ``{"items": [id, ...], "titles": [title, ...], "period": [first, last time]}``.

Token ``i + 1`` is item i, token 0 begins a sequence.
"""

MOMENTS = 16
"""Numbers that describe when a choice is made."""

MOMENT_SCALE = 10.0
"""Their size, large beside that of normalised states: principal components are to keep them."""

SHOWN = 10
"""Length of the lists that are shown, and the default k of the metrics."""


class Window(NamedTuple):
    """A raw example: what a user had chosen before, the items to predict, both in time order, and when that is."""

    history: tuple[str, ...]
    targets: tuple[str, ...]
    time: float


def _is_catalogue(value: Any) -> bool:
    kinds: dict[str, Any] = {"items": str, "titles": str, "period": (int, float)}
    return isinstance(value, dict) and all(
        isinstance(value.get(name), list) and all(isinstance(entry, kind) for entry in value[name])
        for name, kind in kinds.items()
    )


class RecommendationDomain:
    """Next-item prediction over a full catalogue (SASRec; Kang and McAuley, 2018).

    Attributes:
        items: Item ids; token ``i + 1`` is ``items[i]``.
        titles: What is shown of them.
        period: First and last time of the data that the backbone knows; the context says where between them a choice
            is made, because what people choose depends on what is new.
        history: Items of the history that the model reads, the latest.
        targets: Items that are scored, each predicted from all before it.
    """

    name = "recommendation"
    unit = "nats per item"
    l0_penalty = 3e-6  # everything of 16,384 parameters costs about 0.05 nats
    metrics = ("ndcg@10", "recall@10", "precision@10")
    written_metrics = ()
    defaults: dict[str, Any] = {
        "domain": {"history": 8, "targets": 2},
        "splits": {
            "min_examples": 5,
            "inputs": {"train": 12, "seen": 2, "validation": 6, "test": 6},
            "support_inputs": 2,
        },
        "library": {"steps": 400, "users": 64, "query": 12, "validate_every": 50},
        # a person's few choices are over-fitted fast
        "adaptation": {"learning_rate": 5e-4, "steps": 40},
    }

    def __init__(
        self,
        items: Sequence[str],
        titles: Sequence[str],
        period: Sequence[float],
        *,
        history: int = 20,
        targets: int = 2,
    ) -> None:
        """Set catalogue and lengths.

        Raises:
            ValueError: If the lengths or the catalogue cannot be used.
        """
        if history < 1 or targets < 1:
            raise ValueError(f"history={history}, targets={targets}: expected positive numbers of items")
        if len(items) < SHOWN or len(set(items)) < len(items) or len(titles) != len(items):
            raise ValueError(
                f"items: {len(items)} ids, {len(set(items))} of them distinct, and {len(titles)} titles; expected "
                f"distinct ids, {SHOWN} or more, and a title for each"
            )
        if len(period) != 2 or not period[0] <= period[1]:
            raise ValueError(f"period={list(period)}: expected the first and the last time")
        self.items, self.titles = list(items), list(titles)
        self.period = (float(period[0]), float(period[1]))
        self.history, self.targets = history, targets
        self._token = {item: index + 1 for index, item in enumerate(self.items)}

    @classmethod
    def build(cls, backbone_source: str, **settings: Any) -> RecommendationDomain:
        """Make the domain with the catalogue that belongs to a backbone.

        Raises:
            ValueError: If the backbone has no catalogue.
        """
        path = Path(resolve_source(backbone_source)) / CATALOGUE
        if not path.is_file():
            raise ValueError(
                f"backbone={backbone_source!r}: no {CATALOGUE} there; expected a folder written by "
                "'dsa-gym pretrain recommendation'"
            )
        catalogue = storage.read_json(path)
        if not _is_catalogue(catalogue):
            raise ValueError(f"{path}: expected a JSON object with 'items' and 'titles' (text), and 'period' (numbers)")
        return cls(catalogue["items"], catalogue["titles"], catalogue["period"], **settings)

    def settings(self) -> dict[str, Any]:
        """The lengths."""
        return {"history": self.history, "targets": self.targets}

    def check(self, backbone: Backbone) -> None:
        """Refuse backbones that are no causal model over this catalogue or whose window is too short.

        Raises:
            ValueError: With the reason.
        """
        config = backbone.model.config
        vocabulary, window = getattr(config, "vocab_size", 0), getattr(config, "max_position_embeddings", 0)
        if vocabulary != len(self.items) + 1 or not getattr(backbone.model, "can_generate", lambda: False)():
            raise ValueError(
                f"backbone={backbone.source!r}: {type(backbone.model).__name__} with {vocabulary} tokens; expected a "
                f"causal model over the catalogue, {len(self.items)} items and one token to begin with"
            )
        needed = 1 + self.history + self.targets  # the token that begins a sequence
        if window < needed:
            raise ValueError(
                f"history={self.history}, targets={self.targets}: take {needed} positions with the token that begins a "
                f"sequence, the backbone's window has {window}"
            )

    def windows(self, items: Sequence[str], times: Sequence[float]) -> list[Window]:
        """Cut a user's items, in time order, into examples whose targets do not overlap."""
        starts = range(self.targets, len(items) - self.targets + 1, self.targets)
        return [
            Window(
                tuple(items[max(0, start - self.history) : start]),
                tuple(items[start : start + self.targets]),
                float(times[start]),
            )
            for start in starts
        ]

    def encode(self, raw: Sequence[Window]) -> tuple[Examples, Tensor]:
        """Encode windows: ``tokens`` (rows, 1 + history + targets), the history's ``length`` and ``moment`` (rows,).

        ``moment`` is when the choice is made, 0 at the beginning of the period and 1 at its end.

        Items of a history that are not in the catalogue are skipped; a window without a known item in its history, or
        with an unknown target, is not usable.
        """
        width = 1 + self.history + self.targets
        rows, lengths, moments, kept = [], [], [], []
        first, last = self.period
        for index, window in enumerate(raw):
            history = [self._token[item] for item in window.history if item in self._token][-self.history :]
            targets = [self._token[item] for item in window.targets if item in self._token]
            if not history or len(window.targets) != self.targets or len(targets) < self.targets:
                continue
            row = [0, *history, *targets]
            rows.append(row + [0] * (width - len(row)))
            lengths.append(len(history))
            moments.append(min(1.0, max(0.0, (window.time - first) / max(last - first, 1e-9))))
            kept.append(index)
        examples = {
            "tokens": torch.tensor(rows, dtype=torch.int32).view(len(rows), width),
            "length": torch.tensor(lengths, dtype=torch.int32),
            "moment": torch.tensor(moments, dtype=torch.float32),
        }
        return examples, torch.tensor(kept, dtype=torch.int64)

    def _logits(self, model: nn.Module, examples: Examples) -> tuple[Tensor, Tensor]:
        """Logits at the scored positions (rows, targets, items + 1), and the targets (rows, targets)."""
        tokens = examples["tokens"].long()
        places = examples["length"][:, None] + torch.arange(self.targets, device=tokens.device)  # last token known
        states = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state  # type: ignore[operator]
        chosen = states.gather(1, places[..., None].long().expand(-1, -1, states.shape[-1]))
        logits = model.get_output_embeddings()(chosen)  # type: ignore[operator]
        return logits, tokens.gather(1, places.long() + 1)

    def losses(self, model: nn.Module, examples: Examples, *, parts: bool = False) -> Tensor:
        """Mean next-item cross-entropy over the full catalogue, in nats per scored item."""
        logits, targets = self._logits(model, examples)
        weighted = cross_entropy(logits, targets) / self.targets
        if parts:
            return torch.stack([weighted[:, 0::2].sum(1), weighted[:, 1::2].sum(1)], dim=1)
        return weighted.sum(1)

    def features(self, model: nn.Module, examples: Examples, *, context: bool) -> Tensor:
        """States of the middle and last layer: means over the window, or over the history, its end and the moment.

        The moment is smoothed over Gaussian bumps, and scaled so that it is not lost among the states' components.
        """
        tokens, length = examples["tokens"].long(), examples["length"][:, None].long()
        if not context:
            length = length + self.targets
        # the history's states depend on nothing behind it: the model is causal
        states = model.base_model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states  # type: ignore[operator]
        chosen = [states[len(states) // 2].float(), states[-1].float()]
        means = [_mean_of_items(state, length) for state in chosen]
        if not context:
            return torch.cat(means, dim=1)
        end = chosen[-1].gather(1, length[..., None].expand(-1, -1, chosen[-1].shape[-1]))[:, 0]
        centres = torch.linspace(0, 1, MOMENTS, device=tokens.device)
        bumps = torch.exp(-0.5 * ((examples["moment"][:, None] - centres) * (MOMENTS - 1)) ** 2)
        return torch.cat([*means, end, bumps * MOMENT_SCALE], dim=1)

    def known_state(self, states: Tensor, examples: Examples) -> Tensor:
        """Mean state over the history (rows, d): a causal model's states there know nothing of what follows."""
        return _mean_of_items(states.float(), examples["length"][:, None])

    def new_items(self, scores: Tensor, examples: Examples) -> Tensor:
        """Scores of all items for every place (rows, targets, items), with those chosen before it put last."""
        tokens, length = examples["tokens"].long(), examples["length"][:, None, None].long()
        place = torch.arange(tokens.shape[1], device=tokens.device)
        step = torch.arange(self.targets, device=tokens.device)[:, None]
        before = tokens[:, None] * (place <= length + step)  # (rows, targets, tokens); 0 is no item and is cut off
        chosen = scores.new_zeros(*scores.shape[:2], len(self.items) + 1, dtype=torch.bool).scatter(2, before, True)
        return scores.masked_fill(chosen[..., 1:], torch.finfo(scores.dtype).min)

    def ranking(self, name: str, scores: Tensor, examples: Examples) -> Tensor:
        """Ranking metric of any recommender's scores (rows, targets, items), mean over the targets (rows,)."""
        places = examples["length"][:, None].long() + torch.arange(1, self.targets + 1, device=scores.device)
        targets = examples["tokens"].long().gather(1, places) - 1
        place = ranks(self.new_items(scores, examples).flatten(0, 1), targets.flatten())
        return ranking_metric(name, place).view(-1, self.targets).mean(1)

    def metric(self, model: nn.Module, name: str, examples: Examples) -> Tensor:
        """Ranking metric in the full catalogue without what the user has chosen before, mean over the targets (rows,).

        Raises:
            ValueError: If ``name`` is not in :attr:`metrics`.
        """
        if name not in self.metrics:
            raise ValueError(f"metric={name!r}: expected one of {', '.join(self.metrics)}")
        with torch.no_grad():
            logits, _ = self._logits(model, examples)
            return self.ranking(name, logits[..., 1:].float(), examples)

    def describe(self, examples: Examples, row: int) -> dict[str, Any]:
        """The end of the history and the items to predict, by title."""
        tokens, length = examples["tokens"][row].tolist(), int(examples["length"][row])
        return {
            "history": self._list(tokens[max(1, length - SHOWN + 1) : length + 1]),
            "next": self._list(tokens[length + 1 : length + 1 + self.targets]),
        }

    def outcome(self, model: nn.Module, examples: Examples) -> dict[str, Any]:
        """The ten items that the model puts first for the next place, the true one in brackets."""
        if rows_of(examples) != 1:
            raise ValueError(f"examples: {rows_of(examples)} rows, expected one")
        with torch.no_grad():
            logits, targets = self._logits(model, examples)
        scores = self.new_items(logits[..., 1:].float(), examples)[0, 0]
        best = scores.topk(SHOWN)
        first = best.indices[best.values > torch.finfo(scores.dtype).min].tolist()  # a short catalogue runs out
        truth = int(targets[0, 0]) - 1
        return {"top 10": "; ".join(f"[{self.titles[i]}]" if i == truth else self.titles[i] for i in first)}

    def _list(self, tokens: Sequence[int]) -> str:
        return "; ".join(self.titles[token - 1] for token in tokens)


def _mean_of_items(states: Tensor, length: Tensor) -> Tensor:
    """Mean (rows, d) of states (rows, tokens, d) over the first ``length`` (rows, 1) items behind the beginning."""
    place = torch.arange(states.shape[1], device=states.device)
    inside = ((place > 0) & (place <= length))[..., None]
    return (states * inside).sum(1) / inside.sum(1)
