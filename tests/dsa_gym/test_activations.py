"""The fast GELU is PyTorch's, in every precision, with its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from dsa_gym.activations import TanhGELU, use_fast_gelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gradient", [False, True])
def test_is_pytorchs(dtype: torch.dtype, gradient: bool) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, 1e10, -1e10, 1e30, -1e30])]).to(dtype)
    x.requires_grad_(gradient)
    before = x.detach().clone()
    found, expected = TanhGELU()(x), nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)
    if gradient:
        theirs = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), x), theirs, equal_nan=True)


def test_replaces_only_what_is_the_same_function() -> None:
    names = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu_fast": True, "gelu": False, "relu": False}
    model = nn.ModuleDict({name: nn.Sequential(ACT2FN[name]) for name in names})
    x = torch.randn(100)
    expected = {name: model[name](x) for name in names}
    use_fast_gelu(model)
    for name, replaced in names.items():
        assert isinstance(model[name][0], TanhGELU) == replaced  # type: ignore[index]
        torch.testing.assert_close(model[name](x), expected[name], rtol=1e-6, atol=1e-6)
