"""Gates and masks: G binary decisions expanded to the P adapter parameters they switch.

Granularities refine one another, over the same parameters:

| granularity | one gate switches | G |
|---|---|---|
| ``pathway`` | a pathway at all sites | pathways |
| ``layer`` | a pathway at the sites of one layer | layers x pathways |
| ``site`` | a pathway at one site | sites x pathways |
| ``component`` | one rank-1 unit of one site | sites x rank |
| ``element`` | one parameter | P |
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dsa_gym.pathways import AdapterShape

GRANULARITIES = ("pathway", "layer", "site", "component", "element")


class MaskSpace:
    """The gates of one granularity over one adapter geometry.

    Attributes:
        granularity: One of :data:`GRANULARITIES`.
        gates: G, the number of gates.
        sizes: Adapter parameters that each gate switches, int64 (G,); they sum to P.
    """

    def __init__(self, shape: AdapterShape, granularity: str) -> None:
        """Lay the gates over the parameters.

        Raises:
            ValueError: If ``granularity`` is unknown.
        """
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r}: expected one of {', '.join(GRANULARITIES)}")
        self.shape, self.granularity = shape, granularity
        widths = torch.tensor([site.width for site in shape.sites])
        if granularity == "element":
            self._index = torch.arange(shape.size)
            self.gates, self.sizes = shape.size, torch.ones(shape.size, dtype=torch.int64)
            return
        self._index = _component_gates(shape, granularity)  # (sites, rank)
        self.gates = int(self._index.max()) + 1
        per_component = (2 * widths)[:, None].expand_as(self._index)
        self.sizes = torch.zeros(self.gates, dtype=torch.int64).index_add_(
            0, self._index.flatten(), per_component.flatten()
        )

    def to(self, device: torch.device | str) -> MaskSpace:
        """Move the index tensors to a device."""
        self._index, self.sizes = self._index.to(device), self.sizes.to(device)
        return self

    @property
    def elementwise(self) -> bool:
        """Whether masks act on single parameters (rows, P) instead of components (rows, sites, rank)."""
        return self.granularity == "element"

    def expand(self, gates: Tensor) -> Tensor:
        """Spread gates (rows, G) to a component mask (rows, sites, rank), or (rows, P) for ``element``."""
        if self.elementwise:
            return gates
        return gates[:, self._index]

    def component_shares(self, gates: Tensor) -> Tensor:
        """Share of each component's parameters that gates (rows, G) in [0, 1] switch on, (rows, sites, rank)."""
        mask = self.expand(gates)
        if not self.elementwise:
            return mask
        component, grid = self.shape.component_of().to(mask.device), (len(self.shape.sites), self.shape.rank)
        on = mask.new_zeros(len(mask), grid[0] * grid[1]).index_add_(1, component, mask)
        return (on / torch.bincount(component)).view(-1, *grid)

    def active_parameters(self, gates: Tensor) -> Tensor:
        """Exact ``||m||_0`` of binary gates (rows, G) as int64 (rows,)."""
        return (gates.to(torch.int64) * self.sizes).sum(-1)

    @cached_property
    def features(self) -> Tensor:
        """What the geometry says of each gate, float32 (G, F), with F the same for all granularities.

        Of a component: sinusoids of its layer's relative depth and of its relative place in its pathway, one-hot codes
        of the kind of its site and of its pathway. A gate has the mean over its components, and the logarithm of the
        share of all parameters that it switches.
        """
        shape = self.shape
        sites, each = len(shape.sites), shape.rank // shape.pathways
        order = {layer: i for i, layer in enumerate(shape.layers)}
        depth = torch.tensor([order[site.layer] for site in shape.sites]) / max(1, len(order) - 1)
        kinds = torch.tensor([site.kind == "attention" for site in shape.sites]).long()
        place = torch.arange(shape.rank) % each / max(1, each - 1)
        of_site = torch.cat([_sinusoids(depth), one_hot(kinds, 2)], dim=1)
        of_rank = torch.cat([_sinusoids(place), one_hot(torch.arange(shape.rank) // each, shape.pathways)], dim=1)
        described = torch.cat(
            [
                of_site[:, None].expand(-1, shape.rank, -1),
                of_rank[None].expand(sites, -1, -1),
            ],
            dim=2,
        ).flatten(0, 1)  # (sites * rank, F - 1)
        if self.elementwise:
            mean = described[shape.component_of()]
        else:
            index = self._index.flatten().cpu()
            total = torch.zeros(self.gates, described.shape[1]).index_add_(0, index, described)
            mean = total / index.bincount(minlength=self.gates)[:, None]
        share = self.sizes.cpu().float() / shape.size
        return torch.cat([mean, share.log()[:, None] / math.log(shape.size)], dim=1)

    def gate_means(self, values: Tensor) -> Tensor:
        """Mean over the parameters of each gate, (G,), of values (P,)."""
        if self.elementwise:
            return values
        index = self._index.flatten().cpu()[self.shape.component_of()]
        return torch.zeros(self.gates, dtype=values.dtype).index_add_(0, index, values) / self.sizes.cpu()

    def refine(self, gates: Tensor, finer: MaskSpace) -> Tensor:
        """Express gates (rows, G) of this granularity in a finer one, (rows, finer.G).

        Raises:
            ValueError: If ``finer`` is coarser than this granularity.
        """
        if GRANULARITIES.index(finer.granularity) < GRANULARITIES.index(self.granularity):
            raise ValueError(
                f"finer={finer.granularity!r}: masks of granularity {self.granularity!r} cannot be expressed in it"
            )
        if finer.granularity == self.granularity:
            return gates
        spread = self.expand(gates).flatten(1)  # (rows, sites * rank)
        if finer.elementwise:
            return spread[:, self.shape.component_of().to(spread.device)]
        first = _first_position(finer._index.flatten(), finer.gates)
        return spread[:, first]


def _component_gates(shape: AdapterShape, granularity: str) -> Tensor:
    """Gate index of every component, int64 (sites, rank)."""
    sites, rank, pathways = len(shape.sites), shape.rank, shape.pathways
    pathway = (torch.arange(rank) // (rank // pathways)).expand(sites, rank)
    if granularity == "component":
        return torch.arange(sites * rank).view(sites, rank)
    if granularity == "pathway":
        return pathway.clone()
    if granularity == "layer":
        order = {layer: i for i, layer in enumerate(shape.layers)}
        group = torch.tensor([order[site.layer] for site in shape.sites])
    else:
        group = torch.arange(sites)
    return group[:, None] * pathways + pathway


def _first_position(index: Tensor, count: int) -> Tensor:
    """For each gate the position of its first component, int64 (count,)."""
    positions = torch.arange(len(index), device=index.device)
    empty = torch.full((count,), len(index), device=index.device)
    return empty.scatter_reduce(0, index, positions, "amin")


def _sinusoids(position: Tensor) -> Tensor:
    """Sines and cosines of positions in [0, 1] (n,), half a turn, one and two, (n, 6)."""
    angle = math.pi * position[:, None] * torch.tensor([1.0, 2.0, 4.0])
    return torch.cat([angle.sin(), angle.cos()], dim=1)
