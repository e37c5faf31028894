"""The adapter parameters: their geometry, the shared library phi_meta, and the forward of one site.

All parameters of one adapter are one flat vector of P numbers; user adapters are the rows of a ``(users, P)`` matrix. A
site's matrices are views into it, so that sparse changes, masks, norms and stored records all speak of the same P.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """A place where an adapter sits.

    Attributes:
        module: Path of the module in the backbone whose output is changed.
        layer: Index of the transformer block.
        kind: ``"attention"`` or ``"feed_forward"``.
        width: Size d of the hidden states there.
    """

    module: str
    layer: int
    kind: str
    width: int


@dataclass(frozen=True)
class AdapterShape:
    """Geometry of the bottleneck adapters of all sites (Houlsby et al., 2019, with a ReLU).

    Attributes:
        sites: Where the adapters sit, in order of execution.
        rank: Components r of each site.
        pathways: Number of pathways; each owns ``rank / pathways`` neighbouring components of every site.
        dropout: Dropout rate on the adapter's output, in training only.
    """

    sites: tuple[Site, ...]
    rank: int = 32
    pathways: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Check the geometry.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        if not self.sites:
            raise ValueError("sites=(): an adapter needs at least one site")
        if self.pathways < 1 or self.rank < 1 or self.rank % self.pathways:
            raise ValueError(f"rank={self.rank}: expected a positive multiple of pathways={self.pathways}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected a rate in [0, 1)")

    @cached_property
    def size(self) -> int:
        """P, the number of adapter parameters of all sites: ``W_up`` of every site, then ``W_down`` of every site."""
        return 2 * self.half

    @cached_property
    def half(self) -> int:
        """P / 2, where the down-projections begin in the flat vector."""
        return sum(site.width * self.rank for site in self.sites)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each site's matrices begin within either half of the flat vector."""
        ends = itertools.accumulate((site.width * self.rank for site in self.sites), initial=0)
        return tuple(ends)[:-1]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The distinct transformer blocks that have a site, ascending."""
        return tuple(sorted({site.layer for site in self.sites}))

    def matrices(self, phi: Tensor, site: int, users: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The matrices of one site in flat parameters: views, or copies of chosen rows.

        Args:
            phi: Flat parameters (users, P).
            site: Index of the site.
            users: Rows to take, int64; None for all as they are.

        Returns:
            ``W_up`` (users, d, r) and ``W_down`` (users, r, d).
        """
        begin, width = self.offsets[site], self.sites[site].width
        end = begin + width * self.rank
        up, down = phi[:, begin:end], phi[:, self.half + begin : self.half + end]
        if users is not None:
            up, down = up.index_select(0, users), down.index_select(0, users)
        return up.view(-1, width, self.rank), down.view(-1, self.rank, width)

    def component_of(self) -> Tensor:
        """Index ``site * rank + component`` of every flat parameter, int64 (P,)."""
        components = [torch.arange(self.rank) + index * self.rank for index in range(len(self.sites))]
        pairs = list(zip(components, self.sites, strict=True))
        up = [component.repeat(site.width) for component, site in pairs]
        down = [component.repeat_interleave(site.width) for component, site in pairs]
        return torch.cat(up + down)


class PathwayLibrary(nn.Module):
    """phi_meta: the adapter parameters that all users share.

    ``W_up`` starts Gaussian with variance ``1 / d`` and ``W_down`` at zero, so a new library changes nothing.

    Attributes:
        phi: Flat parameters (P,).
    """

    def __init__(self, shape: AdapterShape, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        phi = torch.zeros(1, shape.size)
        for index, site in enumerate(shape.sites):
            up, _ = shape.matrices(phi, index)
            up.normal_(0.0, 1.0 / math.sqrt(site.width), generator=generator)
        self.phi = nn.Parameter(phi[0])


CACHED = 2**21
"""Numbers (8 MiB in fp32) that are still in a processor's cache when the last site multiplies them."""


@dataclass
class ActiveAdapters:
    """What the backbone's hooks apply during one forward.

    Attributes:
        shape: Geometry.
        phi: Flat parameters (users, P); the rows of the batch are grouped by user, equally many each.
        users: Row of ``phi`` of each user of the batch, int64; None if ``phi`` holds just them. A few numbers are taken
            at once; of many, each site's, so that they are still in the processor's cache when they are multiplied.
        gates: Component mask (rows, sites, rank) or None for all on. Masking a component's activation is masking its
            column of ``W_up`` and its row of ``W_down``.
        training: Whether dropout is on.
    """

    shape: AdapterShape
    phi: Tensor
    gates: Tensor | None = None
    users: Tensor | None = None
    training: bool = False

    def __post_init__(self) -> None:
        """Take the users' rows if they are small."""
        if self.users is not None and self.users.numel() * self.phi.shape[1] <= CACHED:
            self.phi, self.users = self.phi.index_select(0, self.users), None

    def __call__(self, hidden: Tensor, site: int) -> Tensor:
        """Return ``h + Dropout(relu(h W_up) W_down)`` of an output (rows, tokens, d) or (rows * tokens, d)."""
        # parameters and gates may be wider than a backbone in half precision
        up, down = (matrix.to(hidden.dtype) for matrix in self.shape.matrices(self.phi, site, self.users))
        users, rank, width = up.shape[0], self.shape.rank, hidden.shape[-1]
        if users == 1:
            grouped, up, down = hidden.reshape(-1, width), up[0], down[0]
        else:
            grouped = hidden.reshape(users, -1, width)
        units = torch.relu(grouped @ up)
        if self.gates is not None:
            gate = self.gates[:, site].to(hidden.dtype)  # (rows, rank)
            units = (units.reshape(gate.shape[0], -1, rank) * gate[:, None]).view_as(units)
        if self.training and self.shape.dropout:
            return hidden + nn.functional.dropout(units @ down, self.shape.dropout).view_as(hidden)
        # one kernel for product and residual
        add = torch.addmm(grouped, units, down) if users == 1 else torch.baddbmm(grouped, units, down)
        return add.view_as(hidden)
