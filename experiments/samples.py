"""Drawn images beside a user's real ones, from the unadapted and from the personalised and gated model.

A sheet to look at, and a judge of whether the samples are in the hand of the user whose adapter drew them.
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsa_gym import storage
from dsa_gym.bundle import Bundle
from dsa_gym.domains import take
from dsa_gym.ladder import bootstrap, interval
from dsa_gym.metrics.image import FeatureExtractor, frechet_distance, train_feature_extractor
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
    _require_images(bundle)
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


def _require_images(bundle: Bundle) -> None:
    if bundle.domain != "image":
        raise ValueError(f"bundle: is of domain {bundle.domain!r}, expected 'image'")


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
    phi, own = bundle.parameters(torch.tensor([user]))
    return ActiveAdapters(bundle.shape, phi, bundle.space.expand(gates.float()), own)


def judge_style(bundle: Bundle, *, seed: int = 0, per_user: int = 8, steps: int = 20) -> dict[str, Any]:
    """Ask a classifier of the test users' real images who drew the samples.

    It learns from the users' support images and every second held-out one. The others are its ceiling and give the
    samples their conditions, in turn. A user has as many samples of the unadapted model, which knows nothing of the
    user: what is right of them is luck, or told by the conditions.

    Args:
        bundle: A bundle of the image domain.
        seed: Seeds the classifier, the noise that sampling starts from and the bootstrap.
        per_user: Samples of each user and model.
        steps: Steps of DDIM.

    Returns:
        ``accuracy`` of ``real``, ``unadapted`` and ``personalised`` images, share 0 to 1, and ``gain`` of the last over
        the one before, each a mean with its 95 % interval over users; ``chance``; ``frechet`` of both kinds of samples
        to the real images, in the classifier's features; what ``extractor`` names; counts, settings and versions.

    Raises:
        ValueError: If the bundle is of another domain, has no two test users or no two held-out images of one of them,
            or ``per_user`` or ``steps`` is out of range.
        ImportError: If torchmetrics is missing.
    """
    _require_images(bundle)
    if per_user < 1:
        raise ValueError(f"per_user={per_user}: expected a positive number of samples")
    learned, held_out = _halves(bundle)
    users, user = bundle.user[held_out].unique(), bundle.user
    images = bundle.examples["image"]
    name = f"drawers of {len(users)} test users, seed {seed}"
    labels = torch.searchsorted(users, user[learned])
    judge = train_feature_extractor(images[learned], labels, name=name, seed=seed)
    own = [held_out[user[held_out] == each] for each in users]
    conditions = torch.stack([rows[torch.arange(per_user) % len(rows)] for rows in own])  # (users, per_user)
    sets = {"real": images[held_out], **_samples(bundle, users, conditions, seed=seed, steps=steps)}
    drawers = {key: user[held_out] if key == "real" else users.repeat_interleave(per_user) for key in sets}
    right = {key: _right(judge, pictures, torch.searchsorted(users, drawers[key])) for key, pictures in sets.items()}
    right["gain"] = right["personalised"] - right["unadapted"]
    drawers["gain"] = drawers["personalised"]
    accuracy = {
        key: interval(float(value.mean()), bootstrap({key: value}, drawers[key].numpy(), seed=seed)[key])
        for key, value in right.items()
    }
    samples = ("unadapted", "personalised")
    return {
        "bundle": bundle.manifest["data"],
        "accuracy": accuracy,
        "chance": 1 / len(users),
        "frechet": {key: frechet_distance(sets["real"], sets[key], features=judge).value for key in samples},
        "extractor": {"accuracy": name, "frechet": f"FD[{name}]"},
        "counts": {"users": len(users), "learned": len(learned)} | {key: len(value) for key, value in sets.items()},
        "settings": {"seed": seed, "per_user": per_user, "steps": steps},
        "versions": storage.versions(),
    }


def show_style(result: dict[str, Any], console: Console) -> None:
    """Print the table of :func:`judge_style`."""
    counts = result["counts"]
    table = Table(title=f"accuracy of a classifier of {counts['users']} users (chance {result['chance']:.3f})")
    for name in ("images", "accuracy", "Fréchet distance"):
        table.add_column(name)
    for name, value in result["accuracy"].items():
        distance = f"{result['frechet'][name]:.3f}" if name in result["frechet"] else ""
        table.add_row(name, f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]", distance)
    console.print(table)
    console.print(f"classifier and features: {result['extractor']['accuracy']}; not the published FID")


def _halves(bundle: Bundle) -> tuple[Tensor, Tensor]:
    """Rows of the test users to learn from, support and every second held-out one, and the others, int64."""
    support, test = bundle.rows("support"), bundle.rows("test")
    users = bundle.user[test].unique()
    if len(users) < 2:
        raise ValueError(f"bundle: has {len(users)} test user, expected two or more to tell apart")
    learned, held_out = [support[torch.isin(bundle.user[support], users)]], []
    for user in users.tolist():
        rows = test[bundle.user[test] == user]
        if len(rows) < 2:
            raise ValueError(
                f"bundle: test user {bundle.users[user]!r} has {len(rows)} held-out image, expected one to learn from "
                "and one to judge; prepare it with more test inputs"
            )
        learned.append(rows[0::2])
        held_out.append(rows[1::2])
    return torch.cat(learned), torch.cat(held_out)


def _samples(bundle: Bundle, users: Tensor, conditions: Tensor, *, seed: int, steps: int) -> dict[str, Tensor]:
    """Samples (users * per_user, C, S, S) of both models from one noise; conditions are rows (users, per_user)."""
    model, generator = bundle.model(), torch.Generator().manual_seed(seed)
    drawn: dict[str, list[Tensor]] = {"unadapted": [], "personalised": []}
    # one user at a time bounds the memory; the steps of the samplers dwarf the loop
    for user, rows in zip(users.tolist(), conditions, strict=True):
        labels = bundle.examples["label"][rows].long()
        noise = torch.randn(bundle.examples["image"][rows].shape, generator=generator)
        drawn["unadapted"].append(draw(model, labels, noise, None, steps=steps))
        active = adapters(bundle, model, user, labels)
        drawn["personalised"].append(draw(model, labels, noise, active, steps=steps))
    return {name: torch.cat(images) for name, images in drawn.items()}


def _right(judge: FeatureExtractor, images: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """1 where the judge's guess is the label, else 0, (rows,)."""
    guesses = torch.cat([judge(part).argmax(1) for part in images.split(256)])
    return (guesses == labels).double().numpy()


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
