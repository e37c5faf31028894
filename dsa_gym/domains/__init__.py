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
        """Loss of each example in nats (rows,), differentiable.

        With ``parts`` the shares (rows, 2) that the even and the odd scored elements have in it: they sum to the loss.
        """
        ...

    def features(self, model: nn.Module, examples: Examples, *, context: bool) -> Tensor:
        """Frozen features (rows, F): of what is known before the decision (``context``) or of the whole example."""
        ...

    def describe(self, examples: Examples, row: int) -> dict[str, str]:
        """Readable parts of one example, in the order to show them (for text: prompt and continuation)."""
        ...


def take(examples: Examples, rows: Tensor) -> Examples:
    """Select rows of encoded examples."""
    return {name: value[rows] for name, value in examples.items()}


def make_domain(name: str, settings: Mapping[str, Any], *, backbone_source: str) -> Domain:
    """Build a registered domain.

    Raises:
        ValueError: If ``name`` is not registered or ``settings`` are not the domain's.
    """
    if name not in DOMAINS:
        raise ValueError(f"domain={name!r}: expected one of {', '.join(sorted(DOMAINS))}")
    module, _, attribute = DOMAINS[name].partition(":")
    try:
        domain: Domain = getattr(import_module(module), attribute).build(backbone_source, **settings)
    except TypeError as error:
        raise ValueError(f"domain={dict(settings)}: not the settings of {name!r} ({error})") from error
    return domain


def rows_of(examples: Examples) -> int:
    """Number of examples."""
    return len(next(iter(examples.values())))


def to_device(examples: Examples, device: torch.device | str) -> Examples:
    """Move encoded examples."""
    return {name: value.to(device) for name, value in examples.items()}
