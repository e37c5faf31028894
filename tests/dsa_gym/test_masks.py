"""Gates and masks: every granularity against a loop over sites, pathways and parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_gym.masks import GRANULARITIES, MaskSpace
from dsa_gym.model import all_gates
from dsa_gym.pathways import AdapterShape, Site


@st.composite
def shapes(draw: st.DrawFn) -> AdapterShape:
    """Geometries with sites of different widths, any number of them in a layer, and layers without."""
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    layers = sorted(draw(st.lists(st.integers(0, 5), min_size=len(widths), max_size=len(widths))))
    sites = tuple(
        Site(f"{i}", layer, "attention", width) for i, (layer, width) in enumerate(zip(layers, widths, strict=True))
    )
    pathways = draw(st.integers(1, 3))
    return AdapterShape(sites, rank=pathways * draw(st.integers(1, 3)), pathways=pathways)


def draw_gates(space: MaskSpace, seed: int, rows: int = 3) -> Tensor:
    return torch.randint(0, 2, (rows, space.gates), generator=torch.Generator().manual_seed(seed))


def slow_component_mask(shape: AdapterShape, granularity: str, gates: list[int]) -> list[list[int]]:
    """Which components of which site one row of gates switches on."""
    layers = sorted({site.layer for site in shape.sites})
    mask = []
    for index, site in enumerate(shape.sites):
        row = []
        for component in range(shape.rank):
            pathway = component // (shape.rank // shape.pathways)
            gate = {
                "pathway": pathway,
                "layer": layers.index(site.layer) * shape.pathways + pathway,
                "site": index * shape.pathways + pathway,
                "component": index * shape.rank + component,
            }[granularity]
            row.append(gates[gate])
        mask.append(row)
    return mask


def parameter_mask(shape: AdapterShape, space: MaskSpace, gates: Tensor) -> Tensor:
    """The mask over all parameters (rows, P), written through the documented matrices."""
    expanded = space.expand(gates)
    if space.elementwise:
        return expanded
    full = torch.zeros(len(gates), shape.size, dtype=gates.dtype)
    for site in range(len(shape.sites)):
        up, down = shape.matrices(full, site)
        for row in range(len(gates)):
            for component in range(shape.rank):
                up[row, :, component] = expanded[row, site, component]
                down[row, component, :] = expanded[row, site, component]
    return full


@pytest.mark.parametrize("granularity", GRANULARITIES)
@settings(max_examples=25)
@given(shape=shapes(), seed=st.integers(0, 100))
def test_expansion_count_and_sizes(granularity: str, shape: AdapterShape, seed: int) -> None:
    space = MaskSpace(shape, granularity)
    gates = draw_gates(space, seed)
    if granularity == "element":
        assert torch.equal(space.expand(gates), gates)
        assert space.gates == shape.size
    else:
        expected = [slow_component_mask(shape, granularity, row.tolist()) for row in gates]
        assert space.expand(gates).tolist() == expected
    assert int(space.sizes.sum()) == shape.size
    assert len(space.sizes) == space.gates
    assert torch.equal(space.active_parameters(gates), parameter_mask(shape, space, gates).sum(1))
    assert space.active_parameters(torch.ones(1, space.gates)).item() == shape.size
    assert space.active_parameters(torch.zeros(1, space.gates, dtype=torch.bool)).item() == 0


@settings(max_examples=25)
@given(shape=shapes(), seed=st.integers(0, 100))
def test_refinement_is_the_same_mask(shape: AdapterShape, seed: int) -> None:
    for i, coarse in enumerate(GRANULARITIES):
        space = MaskSpace(shape, coarse)
        gates = draw_gates(space, seed)
        wanted = parameter_mask(shape, space, gates)
        for fine in GRANULARITIES[i:]:
            finer = MaskSpace(shape, fine)
            refined = space.refine(gates, finer)
            assert refined.shape == (len(gates), finer.gates)
            assert torch.equal(parameter_mask(shape, finer, refined), wanted)
            assert torch.equal(finer.active_parameters(refined), space.active_parameters(gates))


SHAPE = AdapterShape((Site("a", 0, "attention", 3), Site("b", 2, "feed_forward", 5)), rank=4, pathways=2)


@pytest.mark.parametrize(
    ("granularity", "sizes"),
    [
        ("pathway", [32, 32]),
        ("layer", [12, 12, 20, 20]),
        ("site", [12, 12, 20, 20]),
        ("component", [6, 6, 6, 6, 10, 10, 10, 10]),
        ("element", [1] * 64),
    ],
)
def test_sizes_of_sites_of_different_widths(granularity: str, sizes: list[int]) -> None:
    assert MaskSpace(SHAPE, granularity).sizes.tolist() == sizes


def test_expansion_is_differentiable() -> None:
    space = MaskSpace(SHAPE, "pathway")
    gates = torch.ones(1, 2, requires_grad=True)
    weight = torch.arange(8.0).view(1, 2, 4)
    (space.expand(gates) * weight).sum().backward()
    assert gates.grad is not None
    assert gates.grad.tolist() == [[0.0 + 1 + 4 + 5, 2.0 + 3 + 6 + 7]]


@pytest.mark.parametrize("granularity", ["", "Pathway", "parameter"])
def test_unknown_granularity(granularity: str) -> None:
    with pytest.raises(ValueError, match=f"granularity='{granularity}': expected one of pathway, layer"):
        MaskSpace(SHAPE, granularity)


def test_masks_cannot_be_made_coarser() -> None:
    fine, coarse = MaskSpace(SHAPE, "site"), MaskSpace(SHAPE, "pathway")
    with pytest.raises(ValueError, match="finer='pathway': masks of granularity 'site'"):
        fine.refine(torch.ones(1, fine.gates), coarse)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(shape=shapes(), seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_shares_of_components(granularity: str, shape: AdapterShape, seed: int) -> None:
    space = MaskSpace(shape, granularity)
    gates = draw_gates(space, seed).float()
    mask = space.refine(gates, MaskSpace(shape, "element"))
    component = shape.component_of()
    share = [[row[component == index].mean() for index in range(len(shape.sites) * shape.rank)] for row in mask]
    expected = torch.tensor(share).view(len(gates), len(shape.sites), shape.rank)
    torch.testing.assert_close(space.component_shares(gates), expected)


def test_move_to_a_device_is_fluent() -> None:
    space = MaskSpace(SHAPE, "layer")
    assert space.to("cpu") is space


def test_all_gates_counts_in_binary() -> None:
    assert all_gates(MaskSpace(SHAPE, "pathway")).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    every = all_gates(MaskSpace(SHAPE, "component"))
    assert every.dtype == torch.uint8
    assert len(every.unique(dim=0)) == 2**8
    assert (every.long() @ (2 ** torch.arange(8))).tolist() == list(range(2**8))
    with pytest.raises(ValueError, match=r"granularity='element': 2\^64 masks"):
        all_gates(MaskSpace(SHAPE, "element"))


@settings(max_examples=25)
@given(shape=shapes())
def test_features_of_a_gate_are_the_mean_of_its_parts(shape: AdapterShape) -> None:
    """Of a coarse gate: the parameters' features, but for the size, which is a logarithm."""
    parts = MaskSpace(shape, "element").features
    for granularity in GRANULARITIES[:-1]:
        space = MaskSpace(shape, granularity)
        assert space.features.shape == (space.gates, parts.shape[1]) and space.features.dtype == torch.float32
        for gate in range(space.gates):
            one_on = torch.eye(space.gates)[[gate]]
            own = parameter_mask(shape, space, one_on)[0].bool()
            # a component's features count once, however wide its site is
            component = shape.component_of()[own].unique()
            first = [int((shape.component_of() == c).nonzero()[0]) for c in component]
            torch.testing.assert_close(space.features[gate, :-1], parts[first][:, :-1].mean(0))
            values = torch.arange(float(shape.size))
            torch.testing.assert_close(space.gate_means(values)[gate], values[own].mean())
        share = torch.pow(float(shape.size), space.features[:, -1]) if shape.size > 1 else torch.ones(space.gates)
        torch.testing.assert_close(share, space.sizes / shape.size, rtol=1e-4, atol=1e-6)


def test_features_tell_gates_apart() -> None:
    sites = tuple(Site(f"{i}", i // 2, ("attention", "feed_forward")[i % 2], 4) for i in range(6))
    for granularity in GRANULARITIES[:-1]:
        features = MaskSpace(AdapterShape(sites, rank=6, pathways=2), granularity).features
        assert len(features.unique(dim=0)) == len(features)
