"""Sheets of samples: reproducible, personal, and never drawn from the real image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dsa_gym.bundle import Bundle
from dsa_gym.experiments.samples import adapters, draw, sample_sheet


def test_sheet(image_bundle: Path) -> None:
    bundle = Bundle.open(image_bundle)
    user = bundle.users[bundle.manifest["groups"].index("test")]
    sheet = sample_sheet(bundle, user, count=3, steps=3)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3 and sheet.shape[2] == 3
    assert np.array_equal(sheet, sample_sheet(bundle, user, count=3, steps=3))
    assert not np.array_equal(sheet, sample_sheet(bundle, user, count=3, steps=3, seed=1))


def test_adapters_are_the_users_and_change_the_samples(image_bundle: Path) -> None:
    bundle = Bundle.open(image_bundle)
    model, labels = bundle.model(), torch.tensor([0, 1])
    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    active = adapters(bundle, model, 2, labels)
    assert torch.equal(active.phi[0], bundle.phi[2])
    assert active.gates is not None and active.gates.shape == (2, len(bundle.shape.sites), bundle.shape.rank)
    active.phi = active.phi + torch.randn(active.phi.shape, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(draw(model, labels, noise, active, steps=3), draw(model, labels, noise, None, steps=3))


@pytest.mark.parametrize(
    ("user", "count", "message"),
    [("hand-000", 3, "user='hand-000': not in the bundle; did you mean 'hand-00"), ("hand-0001", 0, "count=0")],
)
def test_bad_input(image_bundle: Path, user: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_sheet(Bundle.open(image_bundle), user, count=count)


def test_other_domain(bundle_folder: Path) -> None:
    with pytest.raises(ValueError, match="is of domain 'text', expected 'image'"):
        sample_sheet(Bundle.open(bundle_folder), "anyone")
