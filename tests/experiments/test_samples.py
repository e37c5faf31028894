"""Sheets of samples and their judge: reproducible, personal, and never drawn from the real image."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsa_gym.bundle import Bundle
from dsa_gym.experiments import samples
from dsa_gym.experiments.samples import adapters, draw, judge_style, sample_sheet
from dsa_gym.metrics.image import train_feature_extractor
from dsa_gym.model import AdaptedModel
from dsa_gym.pathways import ActiveAdapters


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


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that has learned little, where what it knows does not matter."""
    monkeypatch.setattr(samples, "train_feature_extractor", partial(train_feature_extractor, steps=20))


@pytest.mark.usefixtures("short_training")
def test_judge(image_bundle: Path) -> None:
    bundle = Bundle.open(image_bundle)
    result = judge_style(bundle, seed=3, per_user=4, steps=2)
    assert json.loads(json.dumps(result)) == result
    held_out, support = bundle.rows("test"), bundle.rows("support")
    users = bundle.user[held_out].unique()
    assert result["chance"] == pytest.approx(1 / len(users))
    assert result["counts"] == {
        "users": len(users),
        "learned": int(torch.isin(bundle.user[support], users).sum()) + len(held_out) // 2,
        "real": len(held_out) // 2,
        "unadapted": 4 * len(users),
        "personalised": 4 * len(users),
    }
    assert set(result["accuracy"]) == {"real", "unadapted", "personalised", "gain"}
    for part in result["accuracy"].values():
        assert part["low"] <= part["mean"] <= part["high"]
    assert all(value > 0 for value in result["frechet"].values())
    assert "seed 3" in result["extractor"]["accuracy"] and "seed 3" in result["extractor"]["frechet"]
    assert judge_style(bundle, seed=3, per_user=4, steps=2) == result
    assert judge_style(bundle, seed=4, per_user=4, steps=2)["frechet"] != result["frechet"]


def test_judge_of_samples_that_are_known(image_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank samples are right by chance; a user's own images are as good as real. It learned from none of these."""
    bundle, learned, noises = Bundle.open(image_bundle), [], []
    test, images = bundle.rows("test"), bundle.examples["image"]
    own = {user: test[bundle.user[test] == user][1::2] for user in bundle.user[test].unique().tolist()}
    for shade, user in enumerate(own):  # so plain a hand that the judge must know it
        images[bundle.user == user, :, :8] = 100 * shade

    def train(pictures: Tensor, labels: Tensor, **settings: Any) -> Any:
        learned.append(pictures)
        return train_feature_extractor(pictures, labels, steps=60, **settings)

    def stub(_: AdaptedModel, labels: Tensor, noise: Tensor, active: ActiveAdapters | None, *, steps: int) -> Tensor:
        noises.append(noise)
        if active is None:
            return torch.full_like(noise, 255, dtype=torch.uint8)
        user = next(user for user in own if torch.equal(bundle.phi[user], active.phi[0]))
        assert torch.equal(labels, bundle.examples["label"][own[user]].long())
        return images[own[user]]

    monkeypatch.setattr(samples, "train_feature_extractor", train)
    monkeypatch.setattr(samples, "draw", stub)
    per_user = len(next(iter(own.values())))
    result = judge_style(bundle, per_user=per_user)
    accuracy = {name: part["mean"] for name, part in result["accuracy"].items()}
    assert accuracy["unadapted"] == pytest.approx(result["chance"])
    assert result["accuracy"]["personalised"] == result["accuracy"]["real"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert accuracy["gain"] == pytest.approx(1 - result["chance"])
    assert result["frechet"]["personalised"] == pytest.approx(0, abs=1e-3) and result["frechet"]["unadapted"] > 0.1
    assert all(torch.equal(*pair) for pair in zip(noises[0::2], noises[1::2], strict=True))
    assert not torch.equal(noises[0], noises[2])
    held = {images[row].numpy().tobytes() for rows in own.values() for row in rows}
    assert not held & {picture.numpy().tobytes() for picture in learned[0]}


@pytest.mark.usefixtures("short_training")
def test_judge_repeats_conditions(image_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, asked = Bundle.open(image_bundle), []
    real = draw

    def record(model: AdaptedModel, labels: Tensor, *rest: Any, **settings: Any) -> Tensor:
        asked.append(labels)
        return real(model, labels, *rest, **settings)

    monkeypatch.setattr(samples, "draw", record)
    test = bundle.rows("test")
    first = test[bundle.user[test] == bundle.user[test].min()][1::2]
    judge_style(bundle, per_user=len(first) + 1, steps=1)
    labels = bundle.examples["label"][first].long()
    assert torch.equal(asked[0], torch.cat([labels, labels[:1]])) and torch.equal(asked[0], asked[1])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda user: user == user[0], "has 1 test user, expected two or more"),
        (
            lambda user: (user != user[0]) | (torch.arange(len(user)) == 0),
            r"test user 'hand-\d+' has 1 held-out image, expected one to learn from and one to judge",
        ),
    ],
)
def test_judge_needs_images(image_bundle: Path, monkeypatch: pytest.MonkeyPatch, kept: Any, message: str) -> None:
    bundle = Bundle.open(image_bundle)
    rows = {split: bundle.rows(split) for split in ("support", "test")}
    rows["test"] = rows["test"][kept(bundle.user[rows["test"]])]
    monkeypatch.setattr(bundle, "rows", rows.get)
    with pytest.raises(ValueError, match=message):
        judge_style(bundle)


def test_judge_refuses(image_bundle: Path, bundle_folder: Path) -> None:
    with pytest.raises(ValueError, match="per_user=0: expected a positive"):
        judge_style(Bundle.open(image_bundle), per_user=0)
    with pytest.raises(ValueError, match="is of domain 'text', expected 'image'"):
        judge_style(Bundle.open(bundle_folder))
