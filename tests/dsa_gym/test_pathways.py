"""Adapter geometry, the shared library, and the forward of a site against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_gym.pathways import ActiveAdapters, AdapterShape, PathwayLibrary, Site


def make_shape(widths: list[int], rank: int, pathways: int = 1, dropout: float = 0.0) -> AdapterShape:
    """Sites of given widths, two per layer."""
    sites = tuple(
        Site(f"site{i}", i // 2, ("attention", "feed_forward")[i % 2], width) for i, width in enumerate(widths)
    )
    return AdapterShape(sites, rank=rank, pathways=pathways, dropout=dropout)


def slow_forward(
    shape: AdapterShape,
    site: int,
    hidden: Tensor,
    phi: Tensor,
    components: Tensor | None,
    elements: Tensor | None,
) -> Tensor:
    """``h + relu(h W_up) W_down`` row by row and component by component, from the documented flat layout.

    Args:
        shape: Geometry.
        site: Index of the site.
        hidden: (rows, tokens, d).
        phi: (users, P).
        components: (rows, sites, rank) or None.
        elements: (rows, P) or None.
    """
    rows, width, rank = hidden.shape[0], shape.sites[site].width, shape.rank
    before = sum(s.width * rank for s in shape.sites[:site])
    half = sum(s.width * rank for s in shape.sites)
    result = hidden.clone()
    for row in range(rows):
        flat = phi[row // (rows // len(phi))]
        if elements is not None:
            flat = flat * elements[row]
        for c in range(rank):
            if components is not None and not components[row, site, c]:
                continue
            column = torch.stack([flat[before + i * rank + c] for i in range(width)])
            line = torch.stack([flat[half + before + c * width + i] for i in range(width)])
            unit = torch.relu(hidden[row] @ column)  # (tokens,)
            result[row] += unit[:, None] * line
    return result


@st.composite
def forwards(draw: st.DrawFn) -> tuple[AdapterShape, int, Tensor, Tensor, torch.Generator, bool]:
    widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    shape = make_shape(widths, draw(st.integers(1, 4)))
    users, per_user = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    site = draw(st.integers(0, len(widths) - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    hidden = torch.randn(users * per_user, draw(st.integers(1, 3)), widths[site], generator=generator)
    phi = torch.randn(users, shape.size, generator=generator)
    return shape, site, hidden, phi, generator, draw(st.booleans())


@settings(max_examples=60)
@given(case=forwards())
def test_site_equals_a_loop_over_rows(case: tuple) -> None:
    shape, site, hidden, phi, generator, flat = case
    rows = hidden.shape[0]
    gates = torch.randint(0, 2, (rows, len(shape.sites), shape.rank), generator=generator)
    elements = torch.randint(0, 2, (rows, shape.size), generator=generator)
    # some architectures (OPT) fold the tokens into the rows
    given_hidden = hidden.flatten(0, 1) if flat else hidden
    each = phi.repeat_interleave(rows // len(phi), 0)
    for adapters, reference in (
        (ActiveAdapters(shape, phi), slow_forward(shape, site, hidden, phi, None, None)),
        (ActiveAdapters(shape, phi, gates.float()), slow_forward(shape, site, hidden, phi, gates, None)),
        (
            ActiveAdapters(shape, phi, gates.to(torch.uint8)),
            slow_forward(shape, site, hidden, phi, gates, None),
        ),
        (ActiveAdapters(shape, each * elements), slow_forward(shape, site, hidden, phi, None, elements)),
    ):
        torch.testing.assert_close(adapters(given_hidden, site).view_as(hidden), reference, rtol=1e-4, atol=1e-5)


def test_masking_a_component_is_masking_its_parameters() -> None:
    shape = make_shape([4, 6], rank=3)
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(1, shape.size, generator=generator)
    hidden = torch.randn(5, 2, 6, generator=generator)
    gates = torch.randint(0, 2, (5, 2, 3), generator=generator).float()
    elements = gates.flatten(1)[:, shape.component_of()]
    by_component = ActiveAdapters(shape, phi, gates)(hidden, 1)
    by_element = ActiveAdapters(shape, phi.expand(5, -1) * elements)(hidden, 1)
    torch.testing.assert_close(by_component, by_element)


def test_gradient_reaches_each_users_own_parameters() -> None:
    shape = make_shape([3], rank=2)
    phi = torch.randn(2, shape.size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    out = ActiveAdapters(shape, phi)(hidden, 0)
    (gradient,) = torch.autograd.grad(out[:2].sum(), phi)
    assert gradient[0].any()
    assert not gradient[1].any()


def test_flat_layout() -> None:
    shape = make_shape([2, 3], rank=4, pathways=2)
    assert (shape.half, shape.size, shape.offsets, shape.layers) == (20, 40, (0, 8), (0,))
    phi = torch.arange(40.0)[None]
    up, down = shape.matrices(phi, 1)
    assert up.shape == (1, 3, 4)
    assert down.shape == (1, 4, 3)
    assert torch.equal(up.flatten(), torch.arange(8.0, 20.0))
    assert torch.equal(down.flatten(), torch.arange(28.0, 40.0))
    # views: what is written there is written into the flat parameters
    up.zero_()
    assert not phi[0, 8:20].any()


@pytest.mark.parametrize("widths", [[3], [2, 3, 4], [5, 5]])
def test_component_of_names_column_and_row(widths: list[int]) -> None:
    shape = make_shape(widths, rank=3)
    owner = shape.component_of()[None].float()
    for site in range(len(widths)):
        up, down = shape.matrices(owner, site)
        for c in range(3):
            assert (up[0, :, c] == site * 3 + c).all()
            assert (down[0, c] == site * 3 + c).all()


def test_new_library_changes_nothing_and_is_seeded() -> None:
    shape = make_shape([64, 16], rank=32)
    library = PathwayLibrary(shape, torch.Generator().manual_seed(0))
    again = PathwayLibrary(shape, torch.Generator().manual_seed(0))
    assert torch.equal(library.phi, again.phi)
    assert library.phi.requires_grad
    assert not library.phi[shape.half :].any()
    for site, width in enumerate((64, 16)):
        up, _ = shape.matrices(library.phi[None].detach(), site)
        assert up.var() == pytest.approx(1 / width, rel=0.15)
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ActiveAdapters(shape, library.phi[None])(hidden, 0), hidden)


def test_dropout_is_on_in_training_only() -> None:
    shape = make_shape([50], rank=2, dropout=0.5)
    generator = torch.Generator().manual_seed(0)
    phi, hidden = torch.randn(1, shape.size, generator=generator), torch.randn(8, 4, 50, generator=generator)
    full = ActiveAdapters(shape, phi)(hidden, 0) - hidden
    torch.manual_seed(0)
    dropped = ActiveAdapters(shape, phi, training=True)(hidden, 0) - hidden
    active = full.abs() > 1e-3
    assert (dropped[active] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    kept = active & (dropped != 0)
    torch.testing.assert_close(dropped[kept], 2 * full[kept], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0, "pathways": 1}, "rank=0: expected a positive multiple of pathways=1"),
        ({"rank": 6, "pathways": 4}, "rank=6: expected a positive multiple of pathways=4"),
        ({"rank": 6, "pathways": 0}, "pathways=0"),
        ({"rank": 2, "pathways": 1, "dropout": 1.0}, "dropout=1.0"),
        ({"rank": 2, "pathways": 1, "dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_bad_geometry(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterShape((Site("a", 0, "attention", 4),), **arguments)
    with pytest.raises(ValueError, match=r"sites=\(\)"):
        AdapterShape(())
