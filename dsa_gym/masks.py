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

import torch
from torch import Tensor

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

    def active_parameters(self, gates: Tensor) -> Tensor:
        """Exact ``||m||_0`` of binary gates (rows, G) as int64 (rows,)."""
        return (gates.to(torch.int64) * self.sizes).sum(-1)

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
