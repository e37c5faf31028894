"""Observations: whitened, bounded and the same in every fit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_gym.observations import LIMIT, fit_projection


def samples(count: int, features: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """Correlated features of very different scales, none of them far out."""
    generator = torch.Generator().manual_seed(seed)
    rank = features if rank is None else rank
    factors = torch.rand(count, rank, generator=generator, dtype=torch.float64) - 0.5
    mixing = torch.randn(rank, features, generator=generator, dtype=torch.float64)
    return factors * torch.logspace(0, 1, rank, dtype=torch.float64) @ mixing + 7.0


@settings(max_examples=25)
@given(features=st.integers(1, 6), dim=st.integers(1, 8), seed=st.integers(0, 100))
def test_whitened_on_what_it_was_fitted_on(features: int, dim: int, seed: int) -> None:
    data = samples(200, features, seed)
    observations = fit_projection(data, dim)(data)
    assert observations.shape == (200, dim)
    assert observations.dtype == torch.float32
    used = min(dim, features)
    torch.testing.assert_close(observations.mean(0), torch.zeros(dim), atol=1e-4, rtol=0)
    wanted = torch.zeros(dim, dim)
    wanted[:used, :used] = torch.eye(used)
    torch.testing.assert_close(
        observations.T.cov() if dim > 1 else observations.var(0)[None], wanted, atol=1e-3, rtol=0
    )


def test_components_are_ordered_by_variance() -> None:
    data = samples(500, 6)
    projection = fit_projection(data, 6)
    # a direction is divided by the deviation along it: the longer, the smaller the variance
    lengths = projection.directions.norm(dim=0)
    assert (lengths.diff() >= 0).all()


def test_bounded() -> None:
    data = samples(50, 4)
    projection = fit_projection(data, 3)
    far = projection(data * 1e6)
    assert far.abs().max() == LIMIT


@pytest.mark.parametrize(("count", "rank"), [(60, 2), (4, 6)])
def test_columns_beyond_the_rank_are_zero(count: int, rank: int) -> None:
    data = samples(count, 6, rank=rank)
    usable = min(rank, count - 1)
    projection = fit_projection(data, 5)
    assert projection.directions[:, :usable].any(0).all()
    assert not projection.directions[:, usable:].any()
    assert not projection(data + torch.randn(count, 6, generator=torch.Generator().manual_seed(0)))[:, usable:].any()


def test_constant_features_give_zeros() -> None:
    projection = fit_projection(torch.full((10, 3), 4.2), 2)
    assert not projection.directions.any()
    assert torch.equal(projection(torch.randn(5, 3)), torch.zeros(5, 2))


def test_sign_is_fixed() -> None:
    data = samples(100, 4)
    first = fit_projection(data, 4)
    # the order of the samples changes the rounding of the decomposition, and can flip its signs
    again = fit_projection(data.flip(0), 4)
    torch.testing.assert_close(first.directions, again.directions, rtol=1e-3, atol=1e-6)
    strongest = first.directions.gather(0, first.directions.abs().argmax(0)[None])
    assert (strongest > 0).all()


def test_deterministic_and_of_the_fit_only() -> None:
    data = samples(100, 4)
    first, again = fit_projection(data, 2), fit_projection(data.clone(), 2)
    assert torch.equal(first.directions, again.directions)
    row = first(data[:1])
    torch.testing.assert_close(row, first(data)[:1])


@pytest.mark.parametrize(("count", "dim"), [(1, 2), (0, 2), (5, 0), (5, -1)])
def test_bad_arguments(count: int, dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim={dim} of {count} samples"):
        fit_projection(torch.zeros(count, 3), dim)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite(value: float) -> None:
    data = samples(10, 3)
    data[4, 1] = value
    with pytest.raises(ValueError, match=r"features: samples \[4\] are not finite"):
        fit_projection(data, 2)
