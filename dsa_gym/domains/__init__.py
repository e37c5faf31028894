"""Domains: what turns a user's examples into model inputs, a loss per example and something to look at.

Everything else is domain-blind. A new domain is one module here and one line in :data:`DOMAINS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dsa_gym.backbone import Backbone

Examples = dict[str, Tensor]
"""Encoded examples: tensors whose first axis is the example."""


DOMAINS: dict[str, str] = {
    "text": "dsa_gym.domains.text:TextDomain",
    "recommendation": "dsa_gym.domains.recommendation:RecommendationDomain",
    "image": "dsa_gym.domains.image:ImageDomain",
}
"""Name to ``module:class``; imported when it is asked for."""


class Domain(Protocol):
    """What the rest of the system asks of a domain."""

    name: str
    unit: str
    """Unit of the loss, such as ``"nats per token"``."""
    l0_penalty: float
    """Default price of one active parameter, in that unit."""
    metrics: tuple[str, ...]
    """Task metrics of :meth:`metric`, each usable as a reward."""
    written_metrics: tuple[str, ...]
    """Those of what the model writes, token by token: many times as slow as a loss."""
    defaults: dict[str, Any]
    """Settings of a preparation that suit the domain, nested like the YAML of ``PrepareConfig``."""

    @classmethod
    def build(cls, backbone_source: str, **settings: Any) -> Domain:
        """Make the domain from its settings, with what belongs to a backbone (for text: its tokenizer)."""
        ...

    def settings(self) -> dict[str, Any]:
        """The constructor arguments, as JSON, that make this domain again."""
        ...

    def check(self, backbone: Backbone) -> None:
        """Raise ``ValueError`` if the backbone cannot serve this domain."""
        ...

    def encode(self, raw: Sequence[Any]) -> tuple[Examples, Tensor]:
        """Turn raw examples into ``(examples, kept)``; ``kept`` are the indices of the usable ones, int64."""
        ...

    def losses(self, model: nn.Module, examples: Examples, *, parts: bool = False) -> Tensor:
        """Loss of each example (rows,), differentiable.

        With ``parts`` the shares (rows, 2) that the even and the odd scored elements have in it: they sum to the loss.
        """
        ...

    def features(self, model: nn.Module, examples: Examples, *, context: bool) -> Tensor:
        """Frozen features (rows, F): of what is known before the decision (``context``) or of the whole example."""
        ...

    def known_state(self, states: Tensor, examples: Examples) -> Tensor:
        """Mean (rows, d) of the hidden states in ``losses``, (n, tokens, d), over what is known before the decision."""
        ...

    def metric(self, model: nn.Module, name: str, examples: Examples) -> Tensor:
        """A task metric of each example (rows,), higher is better, without a gradient."""
        ...

    def describe(self, examples: Examples, row: int) -> dict[str, Any]:
        """Parts of one example to look at, text or pictures (H, W) or (H, W, 3) uint8; the last one is the target."""
        ...

    def outcome(self, model: nn.Module, examples: Examples) -> dict[str, Any]:
        """What the model makes of one example (one row), as parts to look at."""
        ...


def take(examples: Examples, rows: Tensor) -> Examples:
    """Select rows of encoded examples."""
    return {name: value[rows] for name, value in examples.items()}


def domain_class(name: str) -> type[Domain]:
    """The class of a registered domain: its unit, price, metrics and defaults, without a backbone.

    Raises:
        ValueError: If ``name`` is not registered.
    """
    if name not in DOMAINS:
        raise ValueError(f"domain={name!r}: expected one of {', '.join(sorted(DOMAINS))}")
    module, _, attribute = DOMAINS[name].partition(":")
    kind: type[Domain] = getattr(import_module(module), attribute)
    return kind


def make_domain(name: str, settings: Mapping[str, Any], *, backbone_source: str) -> Domain:
    """Build a registered domain.

    Raises:
        ValueError: If ``name`` is not registered or ``settings`` are not the domain's.
    """
    kind = domain_class(name)
    try:
        domain: Domain = kind.build(backbone_source, **settings)
    except TypeError as error:
        raise ValueError(f"domain={dict(settings)}: not the settings of {name!r} ({error})") from error
    return domain


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each target: logits (..., V), which are used up without a gradient, targets (...)."""
    if logits.requires_grad:
        flat = nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
        return flat.view_as(targets)
    logits = logits.float()  # in place from here: these are the largest tensors of a step
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    largest = logits.amax(-1, keepdim=True)
    return logits.sub_(largest).exp_().sum(-1).log_().add_(largest[..., 0]).sub_(chosen)


def rows_of(examples: Examples) -> int:
    """Number of examples."""
    return len(next(iter(examples.values())))


def to_device(examples: Examples, device: torch.device | str) -> Examples:
    """Move encoded examples."""
    return {name: value.to(device) for name, value in examples.items()}
