"""Adaptation of users: their sparse change delta_u, fitted on support under ``||delta_u||_0 <= k``.

All users of a batch are fitted at once: the change is a (users, P) matrix, every row sees its own user's examples
only, and Adam is elementwise, so the batch equals one user at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("dense", "topk", "iht", "magnitude", "fisher", "snip", "random")

SupportLoss = Callable[[Tensor, torch.Generator], Tensor]
"""``loss(phi, generator) -> (users,)``: mean loss in nats of a batch drawn from each user's own support."""


@dataclass(frozen=True)
class AdaptationConfig:
    """How delta_u is found.

    Attributes:
        method: ``dense``: no constraint. ``topk``: dense, keep the k largest changes, re-train them. ``iht``:
            iterative hard thresholding (Blumensath and Davies, 2009), projecting after every step. ``magnitude``,
            ``fisher``, ``snip``,
            ``random``: the support of delta is chosen first, by ``|phi_meta|``, by the mean squared gradient (diagonal
            Fisher; Sung et al., 2021), by ``|phi_meta * gradient|`` (Lee et al., 2019) or at random (one draw for all
            users), then trained.
        share: k as a share of the P parameters.
        steps: Adam steps; ``topk`` takes as many again after the selection.
        learning_rate: Adam's step size.
        score_batches: Batches that ``fisher`` and ``snip`` average their gradients over.
        seed: Seeds the draw of support batches and the random choices.
    """

    method: str = "topk"
    share: float = 0.1
    steps: int = 30
    learning_rate: float = 1e-3
    score_batches: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: expected one of {', '.join(METHODS)}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: expected k as a share of the adapter's parameters, in [0, 1]")
        if self.steps < 0 or self.score_batches < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"steps={self.steps}, score_batches={self.score_batches}, learning_rate={self.learning_rate}: expected "
                "steps >= 0, score_batches >= 1 and learning_rate > 0"
            )


def adapt_users(phi_meta: Tensor, users: int, loss: SupportLoss, config: AdaptationConfig) -> Tensor:
    """Fit every user's change on support.

    Args:
        phi_meta: Shared parameters (P,), the point that adaptation starts from.
        users: Users of the batch.
        loss: Support loss of each user as a function of ``phi_u`` (users, P).
        config: Method, budget and schedule.

    Returns:
        delta (users, P) with at most ``round(share * P)`` non-zeros in each row, all of them for ``dense``.

    Raises:
        FloatingPointError: If a user's loss is not finite.
    """
    generator = torch.Generator().manual_seed(config.seed)
    delta = torch.zeros(users, phi_meta.numel(), device=phi_meta.device)
    k = round(config.share * phi_meta.numel())
    if config.method == "dense":
        return _train(phi_meta, delta, loss, config, generator)
    if config.method == "iht":
        return _train(phi_meta, delta, loss, config, generator, budget=k)
    if config.method == "topk":
        delta = keep_largest(_train(phi_meta, delta, loss, config, generator), k)
        return _train(phi_meta, delta, loss, config, generator, support=delta != 0)
    scores = _scores(phi_meta, users, loss, config, generator)
    return _train(phi_meta, delta, loss, config, generator, support=_largest(scores, k))


def keep_largest(delta: Tensor, k: int) -> Tensor:
    """Keep the k entries of each row (users, P) that are largest in magnitude, zero the rest."""
    return delta * _largest(delta.abs(), k)


def _largest(scores: Tensor, k: int) -> Tensor:
    """Boolean (users, P): the k largest scores of each row."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(1, scores.topk(k, dim=1).indices, True)


def _gradient(phi_meta: Tensor, delta: Tensor, loss: SupportLoss, generator: torch.Generator) -> Tensor:
    """Every user's own gradient (users, P) of a support batch."""
    delta = delta.detach().requires_grad_()
    losses = loss(phi_meta + delta, generator)
    if not torch.isfinite(losses).all():
        broken = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        raise FloatingPointError(f"support loss of users {broken} is not finite: lower learning_rate")
    return torch.autograd.grad(losses.sum(), delta)[0]


def _train(
    phi_meta: Tensor,
    delta: Tensor,
    loss: SupportLoss,
    config: AdaptationConfig,
    generator: torch.Generator,
    *,
    support: Tensor | None = None,
    budget: int | None = None,
) -> Tensor:
    """Adam on delta (users, P), within a fixed support or projected on ``budget`` entries after every step."""
    delta = delta.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([delta], lr=config.learning_rate)
    for _ in range(config.steps):
        gradient = _gradient(phi_meta, delta, loss, generator)
        delta.grad = gradient if support is None else gradient * support
        optimizer.step()
        if budget is not None:
            with torch.no_grad():
                delta.copy_(keep_largest(delta, budget))
    return delta.detach()


def _scores(
    phi_meta: Tensor, users: int, loss: SupportLoss, config: AdaptationConfig, generator: torch.Generator
) -> Tensor:
    """What the selection rules rank parameters by, (users, P)."""
    if config.method == "magnitude":
        return phi_meta.detach().abs().expand(users, -1)
    if config.method == "random":
        # one draw for all, or a user's support would depend on who else is in the batch
        return torch.rand(phi_meta.numel(), generator=generator).to(phi_meta.device).expand(users, -1)
    zero = torch.zeros(users, phi_meta.numel(), device=phi_meta.device)
    gradients = [_gradient(phi_meta, zero, loss, generator) for _ in range(config.score_batches)]
    if config.method == "fisher":
        return torch.stack([gradient.square() for gradient in gradients]).mean(0)
    return (torch.stack(gradients).mean(0) * phi_meta.detach()).abs()
