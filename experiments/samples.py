"""Sheets of drawn images: a user's real ones, the unadapted model's, the personalised and gated model's."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from dsa_gym.bundle import Bundle
from dsa_gym.domains import take
from dsa_gym.model import AdaptedModel
from dsa_gym.pathways import ActiveAdapters

SCALE, GAP, LABEL = 3, 4, 16
"""Pixels of the sheet for one of an image; between images; for a row's name."""


def sample_sheet(bundle: Bundle, user: str, *, count: int = 10, seed: int = 0, steps: int = 50) -> NDArray[np.uint8]:
    """Draw the conditions of a user's held-out images, from the same noise without and with the user's adapter.

    Args:
        bundle: A bundle of the image domain.
        user: Name of the user.
        count: Most images per row.
        seed: Seeds the noise that sampling starts from.
        steps: Steps of DDIM.

    Returns:
        The sheet (H, W, 3): rows ``real``, ``unadapted`` and ``personalised``.

    Raises:
        ValueError: If the bundle is of another domain, the user is unknown or ``count`` is not positive.
    """
    if bundle.domain != "image":
        raise ValueError(f"bundle: is of domain {bundle.domain!r}, expected 'image'")
    if user not in bundle.users:
        close = difflib.get_close_matches(user, bundle.users, n=1)
        raise ValueError(f"user={user!r}: not in the bundle{f'; did you mean {close[0]!r}?' if close else ''}")
    if count < 1:
        raise ValueError(f"count={count}: expected a positive number of images")
    index = bundle.users.index(user)
    held_out = torch.cat([bundle.rows(split) for split in ("seen", "validation", "test")])
    rows = held_out[bundle.user[held_out] == index][:count]
    model = bundle.model()
    real = take(bundle.examples, rows)
    labels = real["label"].long()
    noise = torch.randn(real["image"].shape, generator=torch.Generator().manual_seed(seed))
    drawn = {
        "real": real["image"],
        "unadapted": draw(model, labels, noise, None, steps=steps),
        "personalised": draw(model, labels, noise, adapters(bundle, model, index, labels), steps=steps),
    }
    return _sheet({f"{name} ({user})" if name == "real" else name: images for name, images in drawn.items()})


def draw(model: AdaptedModel, labels: Tensor, noise: Tensor, active: ActiveAdapters | None, *, steps: int) -> Tensor:
    """Images uint8 (rows, C, S, S) of class labels (rows,), from noise (rows, C, S, S)."""
    domain: Any = model.domain
    with model.backbone.adapted(active) as adapted:
        images: Tensor = domain.generate(adapted, labels, noise, steps=steps)
    return images


def adapters(bundle: Bundle, model: AdaptedModel, user: int, labels: Tensor) -> ActiveAdapters:
    """A user's adapters under the reference gate, which knows the user and what is to be drawn, but no image.

    The gate's context is that of a blank paper under the most noise that the domain scores.
    """
    domain: Any = model.domain
    shape = (len(labels), domain.channels, domain.size, domain.size)
    last = round(domain.levels[1] * len(domain.alphas)) - 1
    blank = {
        "image": torch.full(shape, 255, dtype=torch.uint8),
        "label": labels.int(),
        "timestep": torch.full((len(labels), domain.draws), last, dtype=torch.int16),
        "noise": torch.zeros(len(labels), domain.draws, dtype=torch.int16),
    }
    context = bundle.projection("context")(model.features(blank, context=True))
    gate = bundle.reference_gate()
    with torch.no_grad():
        gates = gate.decide(gate(bundle.observations["user"][user].expand(len(labels), -1), context))
    return ActiveAdapters(bundle.shape, bundle.phi[user : user + 1], bundle.space.expand(gates.float()))


def _sheet(rows: dict[str, Tensor]) -> NDArray[np.uint8]:
    """Rows of images under their names."""
    count, _, size, _ = next(iter(rows.values())).shape
    pitch = size * SCALE + GAP
    sheet = Image.new("RGB", (count * pitch + GAP, len(rows) * (pitch + LABEL) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (name, images) in enumerate(rows.items()):
        top = line * (pitch + LABEL) + GAP
        pen.text((GAP, top), name, fill="black")
        for column, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).convert("RGB")
            picture = picture.resize((size * SCALE, size * SCALE), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * pitch + GAP, top + LABEL))
    return np.asarray(sheet)
