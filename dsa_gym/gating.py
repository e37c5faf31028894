"""The gating network g(x, u; psi) and the relaxations that let a gradient through its binary decisions.

Trained together with the library it is the bundle's *reference* gate; trained alone over a frozen bundle it is the
``gumbel`` agent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

RELAXATIONS = ("topk", "binary")


@dataclass(frozen=True)
class GateConfig:
    """How logits become gates.

    Attributes:
        relaxation: ``"topk"``: in each group of pathways exactly ``active`` are on, by Gumbel-top-k (Kool et al.,
            2019) with a softmax as the relaxed gate (Jang et al., 2017; Maddison et al., 2017). ``"binary"``: each
            gate is a binary concrete variable of its own.
        active: Pathways on per group, ``"topk"`` only.
        hidden: Width of the two hidden layers.
        dropout: Dropout rate on the hidden layers, in training only.
        temperature: Relaxation temperature at the start.
        final_temperature: Temperature at the end; geometric in between.
        noise: Scale of the Gumbel or logistic noise in training, 1 for the exact distribution.
        balance: Weight of the load-balance loss.
    """

    relaxation: str = "topk"
    active: int = 2
    hidden: int = 64
    dropout: float = 0.1
    temperature: float = 1.0
    final_temperature: float = 0.5
    noise: float = 1.0
    balance: float = 0.05

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        if self.relaxation not in RELAXATIONS:
            raise ValueError(f"relaxation={self.relaxation!r}: expected one of {', '.join(RELAXATIONS)}")
        if self.active < 1:
            raise ValueError(f"active={self.active}: expected at least one pathway on")
        if self.hidden < 1:
            raise ValueError(f"hidden={self.hidden}: expected a positive width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected a rate in [0, 1)")
        for name in ("temperature", "final_temperature"):
            if not 0 < getattr(self, name) < float("inf"):  # False for NaN too
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number")
        for name in ("noise", "balance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: expected a number of at least 0")

    def temperature_at(self, progress: float) -> float:
        """Temperature after a share ``progress`` in [0, 1] of the training."""
        share = min(max(progress, 0.0), 1.0)
        return float(self.temperature ** (1 - share) * self.final_temperature**share)


class GatingNetwork(nn.Module):
    """psi: a small perceptron from the observation of (user, input) to gate logits.

    It sees what an agent sees: the whitened user embedding and the whitened context of the input.
    """

    def __init__(self, user_dim: int, context_dim: int, gates: int, group: int, config: GateConfig) -> None:
        """Build the network.

        Args:
            user_dim: Size of the user embedding.
            context_dim: Size of the context.
            gates: Number of gates G.
            group: Gates per group (the pathways); ``topk`` switches ``config.active`` on in each.
            config: Relaxation and sizes.

        Raises:
            ValueError: If ``gates`` is not a multiple of ``group`` or a group is smaller than ``config.active``.
        """
        super().__init__()
        if group < 1 or gates % group:
            raise ValueError(f"gates={gates}: expected a multiple of group={group}")
        if config.relaxation == "topk" and config.active > group:
            raise ValueError(f"active={config.active}: expected at most the {group} pathways of a group")
        self.config, self.gates, self.group = config, gates, group
        self.layers = nn.Sequential(
            nn.Linear(user_dim + context_dim, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, gates),
        )

    def forward(self, user: Tensor, context: Tensor) -> Tensor:
        """Gate logits (rows, G) of user embeddings (rows, user_dim) and contexts (rows, context_dim)."""
        return self.layers(torch.cat([user, context], dim=-1))  # type: ignore[no-any-return]

    def decide(self, logits: Tensor) -> Tensor:
        """Deterministic binary gates (rows, G) as float."""
        if self.config.relaxation == "binary":
            return (logits > 0).to(logits.dtype)
        return _hard_topk(logits.view(-1, self.gates // self.group, self.group), self.config.active).view_as(logits)

    def sample(self, logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
        """Draw binary gates (rows, G) whose gradient is that of the relaxed ones (straight-through)."""
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-6, 1 - 1e-6)
        if self.config.relaxation == "binary":
            logistic = torch.log(uniform) - torch.log1p(-uniform)
            noisy = logits + self.config.noise * logistic
            soft = torch.sigmoid(noisy / temperature)
            return (noisy > 0).to(soft.dtype) + (soft - soft.detach())  # in this order exactly binary
        noisy = (logits - self.config.noise * torch.log(-torch.log(uniform))).view(-1, self.group)
        soft = self.config.active * torch.softmax(noisy / temperature, dim=-1)
        hard = _hard_topk(noisy, self.config.active)
        return (hard + (soft - soft.detach())).view_as(logits)

    def load_balance(self, logits: Tensor, gates: Tensor) -> Tensor:
        """Load-balance loss, scalar: 1 when all pathways are used alike, up to their number when one is.

        For ``topk`` this is the loss of the Switch transformer (Fedus et al., 2022), ``n sum_i f_i p_i`` with f the
        share of decisions and p the mean probability of pathway i; for ``binary`` the same over mean activations.
        """
        grouped = logits.view(-1, self.gates // self.group, self.group)
        if self.config.relaxation == "binary":
            probability = torch.sigmoid(grouped).mean(0)
            probability = probability / probability.sum(-1, keepdim=True).clamp_min(1e-6)
        else:
            probability = torch.softmax(grouped, dim=-1).mean(0)
        share = gates.detach().view_as(grouped).mean(0)
        share = share / share.sum(-1, keepdim=True).clamp_min(1e-6)
        return self.group * (share * probability).sum(-1).mean()


def _hard_topk(scores: Tensor, active: int) -> Tensor:
    """One at the ``active`` largest scores of the last axis, zero elsewhere."""
    return torch.zeros_like(scores).scatter_(-1, scores.topk(active, dim=-1).indices, 1.0)
