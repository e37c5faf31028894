"""States that no mask can change: losses are the same with them, and nothing below the first adapter is run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_gym.backbone import Backbone
from dsa_gym.bundle import Bundle
from dsa_gym.domains import Examples, take
from dsa_gym.domains.text import TextDomain
from dsa_gym.frozen_states import FrozenStates
from dsa_gym.masks import GRANULARITIES
from dsa_gym.model import AdaptedModel
from dsa_gym.pathways import AdapterShape
from dsa_gym.population import Population
from dsa_gym.problem import GatingProblem

INPUTS = 6
Build = Callable[..., tuple[AdaptedModel, Examples]]


@pytest.fixture(scope="module")
def build(population: Population, backbone_folder: Path, domain: TextDomain) -> Build:
    def make(**sites: Any) -> tuple[AdaptedModel, Examples]:
        backbone = Backbone.load(backbone_folder, **sites)
        shape = AdapterShape(backbone.sites, rank=4, pathways=2, dropout=0.0)
        return AdaptedModel(backbone, domain, shape), take(population.examples, torch.arange(INPUTS))

    return make


def phi_of(model: AdaptedModel) -> Tensor:
    return torch.randn(INPUTS, model.shape.size, generator=torch.Generator().manual_seed(0)) * 0.5


@pytest.mark.parametrize("sites", [{}, {"layers": [-1]}, {"kinds": ["feed_forward"]}])
def test_what_is_below_the_first_adapter_is_run_once(build: Build, sites: dict[str, Any]) -> None:
    model, examples = build(**sites)
    first, root = model.shape.sites[0], model.backbone.model
    frozen = [root.get_submodule(path) for path in (*model.backbone.blocks[: first.layer], first.module)]
    calls = [0] * len(frozen)
    losses = FrozenStates(model, INPUTS, 2**20)
    inputs, phi = torch.arange(INPUTS), phi_of(model)
    masks = [torch.randint(0, 2, (INPUTS, len(model.shape.sites), 4)).float() for _ in range(3)]
    losses.losses(inputs, examples, phi, masks[0], None)
    for index, module in enumerate(frozen):
        inner = next(child for child in module.modules() if not list(child.children()))

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        inner.register_forward_hook(count)
    for mask in masks:
        expected = model.losses(examples, phi, mask)
        before = list(calls)
        torch.testing.assert_close(losses.losses(inputs, examples, phi, mask, None), expected, rtol=0, atol=1e-6)
        assert calls == before and min(calls) > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@settings(max_examples=10)
@given(data=st.data())
def test_any_masks_on_any_inputs_in_any_order(granularity: str, bundle_folder: Path, data: st.DataObject) -> None:
    bundle = Bundle.open(bundle_folder, verify=False)
    plain = GatingProblem(bundle, "test", granularity=granularity, cache_bytes=0, state_bytes=0)
    size = 32 * 31 * 4 * 2  # of one input's states at least
    limit = data.draw(st.integers(1, 6)) * size
    problem = GatingProblem(bundle, "test", granularity=granularity, cache_bytes=0, state_bytes=limit)
    problem.__dict__["model"] = plain.model
    for _ in range(4):
        inputs = np.array(data.draw(st.lists(st.integers(0, len(plain) - 1), min_size=1, max_size=4)))
        seed = data.draw(st.integers(0, 2**32 - 1))
        gates = np.random.default_rng(seed).integers(0, 2, (len(inputs), plain.gates)).astype(np.uint8)
        np.testing.assert_allclose(problem.losses(inputs, gates), plain.losses(inputs, gates), rtol=0, atol=1e-6)
    held = problem._states._states
    assert sum(states.numel() * states.element_size() for states in held) <= limit


def test_modules_that_are_called_twice_are_left_alone(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that runs the model twice on different tokens would be wrong with the states of one of them."""
    model, examples = build()
    once = model.domain.losses

    def twice(backbone: Any, rows: Examples, *, parts: bool = False) -> Tensor:
        other = rows | {"tokens": rows["tokens"].flip(0).roll(1, 1)}
        return once(backbone, rows, parts=parts) - once(backbone, other, parts=parts)

    monkeypatch.setattr(model.domain, "losses", twice)
    losses, phi = FrozenStates(model, INPUTS, 2**20), phi_of(model)
    mask = torch.ones(INPUTS, len(model.shape.sites), 4)
    for _ in range(2):
        found = losses.losses(torch.arange(INPUTS), examples, phi, mask, None)
        torch.testing.assert_close(found, model.losses(examples, phi, mask), rtol=0, atol=1e-6)
    assert losses.slots == 0


def test_a_module_that_fails_leaves_the_model_as_it_was(
    build: Build,
) -> None:
    model, examples = build()
    losses, phi = FrozenStates(model, INPUTS, 2**20), phi_of(model)
    mask = torch.ones(INPUTS, len(model.shape.sites), 4)
    expected = losses.losses(torch.arange(INPUTS), examples, phi, mask, None)
    with pytest.raises(ValueError, match="phi: "):
        losses.losses(torch.arange(INPUTS), examples, phi[:, 1:], mask, None)
    torch.testing.assert_close(model.losses(examples, phi, mask), expected, rtol=0, atol=1e-6)
