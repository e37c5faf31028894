"""The adapted model ``y = M(x; theta, phi_u * g(x, u; psi))``: losses of many users under many masks at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsa_gym.backbone import Backbone
from dsa_gym.domains import Domain, Examples, rows_of, take
from dsa_gym.masks import MaskSpace
from dsa_gym.pathways import ActiveAdapters, AdapterShape


class AdaptedModel:
    """A frozen backbone, a domain and an adapter geometry.

    Attributes:
        backbone: theta.
        domain: Turns examples into a loss.
        shape: Geometry of the adapters.
    """

    def __init__(self, backbone: Backbone, domain: Domain, shape: AdapterShape) -> None:
        """Put the three together.

        Raises:
            ValueError: If the backbone cannot serve the domain or the geometry is not the backbone's.
        """
        domain.check(backbone)
        if shape.sites != backbone.sites:
            raise ValueError("shape: its sites are not those of the backbone; build it from backbone.sites")
        self.backbone, self.domain, self.shape = backbone, domain, shape

    def losses(
        self,
        examples: Examples,
        phi: Tensor | None,
        mask: Tensor | None = None,
        *,
        users: Tensor | None = None,
        training: bool = False,
        parts: bool = False,
    ) -> Tensor:
        """Loss of each example, in the domain's unit.

        Args:
            examples: Rows grouped by user, equally many for each user.
            phi: Flat adapter parameters (users, P); None for the bare backbone.
            mask: Component mask (rows, sites, rank), parameter mask (rows, P), or None for everything on.
            users: Row of ``phi`` of each user of the batch, int64; None if ``phi`` holds just them, in order.
            training: Whether the adapters' dropout is on.
            parts: Return the shares that even and odd scored elements have in the loss, (rows, 2); they sum to it.

        Returns:
            Losses (rows,), or (rows, 2) with ``parts``.

        Raises:
            ValueError: If ``phi`` or ``mask`` do not fit the rows or the geometry.
        """
        with self.backbone.adapted(self._adapters(examples, phi, mask, users, training)) as model:
            return self.domain.losses(model, examples, parts=parts)

    @torch.no_grad()
    def metric(
        self, name: str, examples: Examples, phi: Tensor | None, mask: Tensor | None = None, users: Tensor | None = None
    ) -> Tensor:
        """Task metric of each example (rows,), see :meth:`Domain.metric`; the other arguments are those of losses."""
        with self.backbone.adapted(self._adapters(examples, phi, mask, users)) as model:
            return self.domain.metric(model, name, examples)

    def outcome(self, examples: Examples, phi: Tensor | None, mask: Tensor | None = None) -> dict[str, Any]:
        """What the adapted model makes of one example, see :meth:`Domain.outcome`."""
        with self.backbone.adapted(self._adapters(examples, phi, mask, None)) as model:
            return self.domain.outcome(model, examples)

    def _adapters(
        self,
        examples: Examples,
        phi: Tensor | None,
        mask: Tensor | None,
        users: Tensor | None,
        training: bool = False,
    ) -> ActiveAdapters | None:
        if phi is None:
            return None
        self._check(rows_of(examples), phi, mask, len(phi) if users is None else len(users))
        if mask is not None and mask.ndim == 2:
            own = phi if users is None else phi[users]
            rows = mask.shape[0] // own.shape[0]
            phi, users, mask = (own.repeat_interleave(rows, 0) if rows > 1 else own) * mask, None, None
        return ActiveAdapters(self.shape, phi, mask, users, training)

    def _check(self, rows: int, phi: Tensor, mask: Tensor | None, users: int) -> None:
        """Refuse shapes that broadcasting would take for something else."""
        size = self.shape.size
        if phi.ndim != 2 or phi.shape[1] != size or not users or rows % users:
            raise ValueError(
                f"phi: {tuple(phi.shape)} for {rows} examples of {users} users, expected (users, {size}) "
                f"with a number of users that divides {rows}"
            )
        component = (rows, len(self.shape.sites), self.shape.rank)
        if mask is not None and tuple(mask.shape) not in (component, (rows, size)):
            raise ValueError(f"mask: {tuple(mask.shape)}, expected {component} or {(rows, size)}")

    @torch.inference_mode()
    def features(self, examples: Examples, *, context: bool, batch_size: int = 256) -> Tensor:
        """Frozen features (rows, F) of the bare backbone, see :meth:`Domain.features`."""
        pieces = []
        with self.backbone.adapted(None) as model:
            for rows in torch.arange(rows_of(examples)).split(batch_size):
                part = take(examples, rows)
                pieces.append(self.domain.features(model, part, context=context))
        return torch.cat(pieces)

    @torch.inference_mode()
    def all_mask_losses(self, example: Examples, phi: Tensor, masks: Tensor, *, batch_size: int = 256) -> Tensor:
        """Losses of one user's examples under every one of many masks.

        Args:
            example: Rows of one user.
            phi: That user's parameters (1, P).
            masks: Component masks (M, sites, rank).
            batch_size: Rows per forward.

        Returns:
            Shares of even and odd scored elements, (rows, M, 2).
        """
        rows, count = rows_of(example), len(masks)
        row = torch.arange(rows * count) // count
        column = torch.arange(rows * count) % count
        pieces = [
            self.losses(
                take(example, row[start : start + batch_size]),
                phi,
                masks[column[start : start + batch_size]],
                parts=True,
            )
            for start in range(0, rows * count, batch_size)
        ]
        return torch.cat(pieces).view(rows, count, 2)


def all_gates(space: MaskSpace) -> Tensor:
    """Every mask of a space as binary gates (2^G, G), uint8; bit i of the row number is gate i.

    Raises:
        ValueError: If there are more than 2^16.
    """
    if space.gates > 16:
        raise ValueError(
            f"granularity={space.granularity!r}: 2^{space.gates} masks cannot be enumerated (at most 2^16)"
        )
    codes = torch.arange(2**space.gates)
    return (codes[:, None] >> torch.arange(space.gates) & 1).to(torch.uint8)
