"""Pre-training of the image backbone: ``dsa-gym pretrain image --data FILE --out DIR``.

A class-conditional diffusion transformer on pixels (DiT; Peebles and Xie, 2023) under the noise of a DDPM (Ho et al.,
2020), which predicts the velocity ``sqrt(abar_t) eps - sqrt(1 - abar_t) x_0`` (Salimans and Ho, 2022). Some users are
held out altogether, so that a bundle made of the same file has people whom nothing was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_gym import storage
from dsa_gym.backbone import import_diffusers
from dsa_gym.data import UserImages
from dsa_gym.domains.image import CONDITIONS, ImageDomain, ImageExample
from dsa_gym.pretrain.loop import UsersConfig, claim, fit


@dataclass(frozen=True)
class ImagePretrainConfig(UsersConfig):
    """What the backbone is and how it is trained, see :class:`~dsa_gym.pretrain.loop.UsersConfig`.

    Attributes:
        patch: Height and width of a patch in pixels; divides the images' size.
        timesteps: Noise levels of the DDPM.
    """

    batch_size: int = 64
    steps: int = 3000
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    width: int = 96
    layers: int = 4
    heads: int = 4
    patch: int = 4
    timesteps: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        super().__post_init__()
        for name in ("patch", "timesteps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive integer")


def build_model(config: ImagePretrainConfig, *, channels: int, size: int, classes: int) -> Any:
    """Return a DiT for images (channels, size, size) of ``classes`` conditions.

    Raises:
        ValueError: If ``config.patch`` does not divide ``size``, or diffusers is not installed.
    """
    if size % config.patch:
        raise ValueError(f"patch={config.patch}: expected a divisor of the images' size, {size}")
    return import_diffusers().DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=config.layers,
        sample_size=size,
        patch_size=config.patch,
        num_embeds_ada_norm=classes,
        activation_fn="gelu",  # several times faster than its tanh approximation here
    )


def pretrain_image(
    users: Sequence[UserImages],
    out: Path,
    config: ImagePretrainConfig | None = None,
    *,
    data_files: Sequence[Path] = (),
    report: dict[str, Any] | None = None,
    checkpoint_every: int = 250,
) -> dict[str, Any]:
    """Pre-train the backbone and write it to ``out`` as a diffusers folder with its schedule and its conditions.

    Args:
        users: Their images, all of one shape, and what these show.
        out: Folder for weights (fp16 safetensors), ``scheduler_config.json``, ``conditions.json``, ``README.md`` (model
            card) and ``pretrain.json``.
        config: Size and schedule.
        data_files: Where ``users`` came from, for the record.
        report: What reading them left out, for the record.
        checkpoint_every: Optimiser steps between checkpoints and measurements on the validation users.

    Returns:
        ``seen`` and ``unseen``: mean squared error of the denoised image, for users trained on and not, and
        ``validation_loss``; all at the noise levels that :class:`ImageDomain` fixes.

    Raises:
        ValueError: For images that cannot be used, or an ``out`` that holds another run.
        FloatingPointError: If the loss is not finite; the last checkpoint stays.
    """
    config = config or ImagePretrainConfig()
    out = Path(out)
    shapes = {user.images.shape[1:] for user in users}
    if len(shapes) != 1:
        raise ValueError(f"users: images of shapes {sorted(shapes)}, expected one shape")
    shape = shapes.pop()
    channels = 1 if len(shape) == 2 else shape[2]
    conditions = sorted({condition for user in users for condition in user.conditions})
    groups = config.split([user.user for user in users])
    scheduler = import_diffusers().DDPMScheduler(num_train_timesteps=config.timesteps, prediction_type="v_prediction")
    domain = ImageDomain(scheduler, conditions, channels=channels, size=shape[0])
    examples = {name: domain.encode(_examples(users, groups[name]))[0] for name in groups}
    torch.manual_seed(config.seed)
    model = build_model(config, channels=channels, size=shape[0], classes=len(conditions))
    ordered = sorted(users, key=lambda user: user.user)
    content = storage.digest(
        part for u in ordered for part in (json.dumps([u.user, u.conditions]).encode("ascii"), u.images.tobytes())
    )
    key = {"config": asdict(config), "data": storage.checksums(data_files), "users": len(users), "content": content}
    claim(out, key)
    images, labels = examples["train"]["image"].float() / 127.5 - 1, examples["train"]["label"].long()
    alphas: Tensor = scheduler.alphas_cumprod

    def loss(generator: np.random.Generator) -> Tensor:
        chosen = torch.from_numpy(generator.integers(0, len(images), config.batch_size))
        timestep = torch.from_numpy(generator.integers(0, config.timesteps, config.batch_size))
        noise = torch.randn(len(chosen), *images.shape[1:])  # fit has seeded it
        share = alphas[timestep][:, None, None, None]
        noised = share.sqrt() * images[chosen] + (1 - share).sqrt() * noise
        output = model(hidden_states=noised, timestep=timestep, class_labels=labels[chosen], return_dict=False)[0]
        return torch.nn.functional.mse_loss(output, share.sqrt() * noise - (1 - share).sqrt() * images[chosen])

    @torch.no_grad()
    def measure(group: str, most: int) -> float:
        model.eval()
        rows = torch.arange(len(examples[group]["label"]))[:most]
        part = [domain.losses(model, {n: v[r] for n, v in examples[group].items()}) for r in rows.split(256)]
        model.train()
        return float(torch.cat(part).mean())

    model.train()
    state_file = out / "checkpoint" / "state.safetensors"
    seconds = fit(
        model,
        loss,
        config,
        state_file,
        checkpoint_every=checkpoint_every,
        validate=lambda: measure("validation", 512),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())  # measured as shipped
    result: dict[str, Any] = {
        "validation_loss": measure("validation", 1 << 30),
        "seen": measure("train", 1024),
        "unseen": measure("test", 1 << 30),
    }
    model.eval().half().save_pretrained(out)
    scheduler.save_pretrained(out)
    storage.write_json(out / CONDITIONS, conditions)
    parameters = sum(p.numel() for p in model.parameters())
    record = {**result, **key, "trained_users": groups["train"], "conditions": len(conditions), "read": report or {}}
    record |= {"parameters": parameters, "seconds": round(seconds, 1), "versions": storage.versions()}
    storage.write_json(out / "pretrain.json", record)
    card = _MODEL_CARD.format(
        **asdict(config),
        **result,
        parameters=parameters,
        conditions=len(conditions),
        size=shape[0],
        images=len(images),
        users=len(groups["train"]),
    )
    storage.write_text(out / "README.md", card)
    return result


def _examples(users: Sequence[UserImages], chosen: Sequence[str]) -> list[ImageExample]:
    members = set(chosen)
    return [
        ImageExample(image, condition)
        for user in users
        if user.user in members
        for image, condition in zip(user.images, user.conditions, strict=True)
    ]


_MODEL_CARD = """---
library_name: diffusers
license: apache-2.0
---
# dsa-gym image backbone

A class-conditional diffusion transformer (DiT) of {parameters:,} parameters ({layers} layers, width {width}, {heads}
heads, patches of {patch} pixels) over images of {size} x {size} pixels and {conditions} conditions, the frozen model of
the image domain. It is small on purpose: personalisation research that runs on two cores.

- Trained on {images:,} images of {users} users: at most {steps} steps of {batch_size} images, {timesteps} noise levels,
  AdamW, peak learning rate {learning_rate}, weight decay {weight_decay}, seed {seed}; the weights are those that were
  best on the validation users ({validation:.0%}).
- Mean squared error of the denoised image, fp16 weights as shipped: {unseen:.4f} on users it was not trained on,
  {seen:.4f} on those that it was.
- Re-made by `dsa-gym pretrain image`; `pretrain.json` has the configuration, the checksums and the versions.
"""
