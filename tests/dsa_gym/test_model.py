"""The adapted model: many users and masks in one batch are what each of them is alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsa_gym.backbone import Backbone
from dsa_gym.domains import Examples, rows_of, take
from dsa_gym.masks import GRANULARITIES, MaskSpace
from dsa_gym.model import AdaptedModel, all_gates
from dsa_gym.pathways import AdapterShape
from dsa_gym.population import Population

USERS, EACH = 3, 2


@pytest.fixture
def examples(population: Population) -> Examples:
    return take(population.examples, torch.arange(USERS * EACH))


@pytest.fixture
def phi(tiny: AdaptedModel) -> Tensor:
    return torch.randn(USERS, tiny.shape.size, generator=torch.Generator().manual_seed(0)) * 0.5


def random_gates(space: MaskSpace, rows: int) -> Tensor:
    return torch.randint(0, 2, (rows, space.gates), generator=torch.Generator().manual_seed(1)).float()


@pytest.mark.parametrize("granularity", [*GRANULARITIES, None])
def test_batch_equals_one_by_one(tiny: AdaptedModel, examples: Examples, phi: Tensor, granularity: str | None) -> None:
    mask = None
    if granularity is not None:
        space = MaskSpace(tiny.shape, granularity)
        mask = space.expand(random_gates(space, USERS * EACH))
    together = tiny.losses(examples, phi, mask)
    assert together.shape == (USERS * EACH,)
    for row in range(USERS * EACH):
        alone = tiny.losses(
            take(examples, torch.tensor([row])),
            phi[row // EACH : row // EACH + 1],
            None if mask is None else mask[row : row + 1],
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_one_user_serves_any_number_of_rows(tiny: AdaptedModel, examples: Examples, phi: Tensor) -> None:
    rows = rows_of(examples)
    shared = tiny.losses(examples, phi[:1])
    torch.testing.assert_close(shared, tiny.losses(examples, phi[:1].expand(rows, -1)), rtol=0, atol=1e-5)
    # the elementwise path with one user
    ones = torch.ones(rows, tiny.shape.size)
    torch.testing.assert_close(tiny.losses(examples, phi[:1], ones), shared, rtol=0, atol=1e-5)


def test_parts_sum_to_the_loss(tiny: AdaptedModel, examples: Examples, phi: Tensor) -> None:
    for parameters in (None, phi):
        parts = tiny.losses(examples, parameters, parts=True)
        assert parts.shape == (USERS * EACH, 2)
        assert (parts > 0).all()
        torch.testing.assert_close(parts.sum(1), tiny.losses(examples, parameters), rtol=0, atol=1e-5)


def test_all_mask_losses(tiny: AdaptedModel, examples: Examples, phi: Tensor) -> None:
    space = MaskSpace(tiny.shape, "pathway")
    masks = space.expand(all_gates(space))
    some = take(examples, torch.arange(3))
    # a batch size that cuts through a row's masks
    table = tiny.all_mask_losses(some, phi[:1], masks, batch_size=5)
    assert table.shape == (3, 4, 2)
    for index, mask in enumerate(masks):
        alone = tiny.losses(some, phi[:1], mask.expand(3, -1, -1), parts=True)
        torch.testing.assert_close(table[:, index], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(table[:, 0].sum(1), tiny.losses(some, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize("granularity", ["pathway", "layer", "site", "component"])
def test_parameter_masks_equal_component_masks_that_agree(
    tiny: AdaptedModel, examples: Examples, phi: Tensor, granularity: str
) -> None:
    space, fine = MaskSpace(tiny.shape, granularity), MaskSpace(tiny.shape, "element")
    gates = random_gates(space, USERS * EACH)
    by_component = tiny.losses(examples, phi, space.expand(gates))
    by_element = tiny.losses(examples, phi, fine.expand(space.refine(gates, fine)))
    torch.testing.assert_close(by_component, by_element, rtol=0, atol=1e-5)
    assert not torch.allclose(by_component, tiny.losses(examples, phi))


def test_nothing_on_is_the_bare_backbone(tiny: AdaptedModel, examples: Examples, phi: Tensor) -> None:
    bare = tiny.losses(examples, None)
    for granularity in ("pathway", "element"):
        space = MaskSpace(tiny.shape, granularity)
        mask = space.expand(torch.zeros(USERS * EACH, space.gates))
        assert torch.equal(tiny.losses(examples, phi, mask), bare)


def test_every_user_gets_an_own_gradient(tiny: AdaptedModel, examples: Examples, phi: Tensor) -> None:
    phi.requires_grad_()
    losses = tiny.losses(examples, phi)
    (gradient,) = torch.autograd.grad(losses.sum(), phi)
    for user in range(USERS):
        own = phi[user : user + 1].detach().requires_grad_()
        rows = torch.arange(user * EACH, (user + 1) * EACH)
        (alone,) = torch.autograd.grad(tiny.losses(take(examples, rows), own).sum(), own)
        torch.testing.assert_close(gradient[user : user + 1], alone, rtol=1e-3, atol=1e-6)


def test_features_do_not_depend_on_the_batch_size(tiny: AdaptedModel, examples: Examples) -> None:
    for context in (False, True):
        whole = tiny.features(examples, context=context)
        assert whole.shape == (USERS * EACH, 48 if context else 32)
        torch.testing.assert_close(tiny.features(examples, context=context, batch_size=4), whole, rtol=0, atol=1e-5)


def test_dropout_in_training_only(tiny: AdaptedModel, examples: Examples, phi: Tensor) -> None:
    shape = dataclasses.replace(tiny.shape, dropout=0.5)
    model = AdaptedModel(tiny.backbone, tiny.domain, shape)
    assert torch.equal(model.losses(examples, phi), tiny.losses(examples, phi))
    torch.manual_seed(0)
    assert not torch.equal(model.losses(examples, phi, training=True), tiny.losses(examples, phi))


def test_sites_must_be_those_of_the_backbone(tiny: AdaptedModel, backbone_folder: Path) -> None:
    other = Backbone.load(backbone_folder, layers=[0])
    with pytest.raises(ValueError, match="shape: its sites are not those of the backbone"):
        AdaptedModel(other, tiny.domain, tiny.shape)
    assert AdaptedModel(other, tiny.domain, AdapterShape(other.sites, rank=2, pathways=1)).shape.size == 128


def test_shapes_that_do_not_fit(tiny: AdaptedModel, examples: Examples, phi: Tensor) -> None:
    size = tiny.shape.size
    with pytest.raises(ValueError, match=rf"phi: \(4, {size}\) for 6 examples of 4 users, expected \(users, {size}\)"):
        tiny.losses(examples, torch.zeros(4, size))
    with pytest.raises(ValueError, match=r"phi: \(3, 7\)"):
        tiny.losses(examples, torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"mask: \(3, 4, 4\), expected \(6, 4, 4\) or"):
        tiny.losses(examples, phi, torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match=r"mask: \(6, 2\)"):
        tiny.losses(examples, phi, torch.ones(6, 2))
