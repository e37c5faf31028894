"""Image generation: an example is an image with a condition; a diffusion model makes it out again under noise.

The noise and the timesteps at which an example is scored are part of the encoded example, so its loss is a fixed number
for a given model and mask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsa_gym import storage
from dsa_gym.backbone import Backbone, import_diffusers, resolve_source
from dsa_gym.domains import Examples

CONDITIONS = "conditions.json"
"""In the backbone's folder: the list of its conditions; the index is the class label."""

PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""What a model may predict, as diffusers names it: the noise, the image, or the velocity (Salimans & Ho, 2022)."""

BANK = 1024
"""Noise images that examples draw from: an index is stored in place of the noise."""


BLOCKS = 7
"""Blocks per side of the view of what is unusual about a drawing."""

UNUSUAL_SCALE = 3.0
"""Its size beside that of the states: principal components are to keep some of both."""


class ImageExample(NamedTuple):
    """A raw example.

    Attributes:
        image: uint8 (H, W) or (H, W, 3); 255 is the paper.
        condition: Name of what the image shows.
    """

    image: NDArray[np.uint8]
    condition: str


class ImageDomain:
    """Denoising of images by a class-conditional DiT (Peebles & Xie, 2023) with the loss of DDPM (Ho et al., 2020).

    With the image ``x_0`` in [-1, 1] and the noise ``eps``, the model sees ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t)
    eps``, the timestep t and the condition. What it predicts gives an estimate of the image, whose mean squared error
    is the loss. (The error of ``eps`` itself is almost all from low noise, where the image shows how it is drawn, and
    nothing is left for a person's habits to explain. A model that predicts ``eps`` is a bad judge of ``x_0`` at high
    noise, because its errors are divided by ``sqrt(abar_t)``: take one that predicts the velocity.) Every example has
    several draws of (t, eps): draw j of n has its t in the j-th of n equal parts of ``levels``, so the last is the
    noisiest. Its ``x_t`` is what is known before the decision.

    Attributes:
        conditions: Names of the conditions; the index is the class label.
        channels: 1 or 3.
        size: Height and width S of the images in pixels.
        draws: Draws per example.
        levels: Where the draws' timesteps lie, as shares of the schedule.
        scale: The error is that of means over blocks of ``scale`` x ``scale`` pixels (as in the multiscale loss of
            Hoogeboom et al., 2023); 1 for pixels. Where two drawings of a thing never lie on one another pixel by
            pixel, only larger blocks show how dark, large or placed a person's are.
        seed: Seed of the noise and of the draws.
        scheduler: The ``DDPMScheduler`` of diffusers.
        alphas: ``abar_t`` of its T timesteps, (T,).
    """

    name = "image"
    unit = "squared error"
    l0_penalty: float = 1e-7  # everything of 32,768 parameters costs about 0.003
    metrics: tuple[str, ...] = ("psnr",)
    written_metrics: tuple[str, ...] = ()
    defaults: dict[str, Any] = {
        "splits": {
            "min_examples": 10,
            "inputs": {"train": 6, "seen": 3, "validation": 4, "test": 8},
            "support_inputs": 3,
        },
        # losses are small beside those in nats: so is the weight of the load balance, and inner steps are longer
        "library": {
            "algorithm": "fomaml",
            "inner_lr": 3.0,
            "steps": 400,
            "users": 32,
            "support": 2,
            "query": 4,
            "learning_rate": 5e-3,
            "validate_every": 50,
            "gate": {"balance": 0.002},
        },
        "adapt_batch": 4,
    }

    def __init__(
        self,
        scheduler: Any,
        conditions: Sequence[str],
        *,
        channels: int,
        size: int,
        draws: int = 2,
        levels: Sequence[float] = (0.6, 0.95),
        scale: int = 1,
        seed: int = 0,
    ) -> None:
        """Set the noise; see the class for the arguments.

        Raises:
            ValueError: If ``draws`` or ``seed`` is out of range, or the schedule is not of a model that predicts noise.
        """
        alphas: Tensor = scheduler.alphas_cumprod
        if draws < 2 or draws % 2 or draws > len(alphas):
            raise ValueError(f"draws={draws}: expected an even number from 2 to the {len(alphas)} timesteps")
        if len(levels) != 2 or not 0 <= levels[0] < levels[1] <= 1 or (levels[1] - levels[0]) * len(alphas) < draws:
            raise ValueError(
                f"levels={list(levels)}: expected two shares of the schedule, ascending, wide enough for draws"
            )
        if scale < 1 or size % scale:
            raise ValueError(f"scale={scale}: expected a divisor of the images' size, {size}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed}: expected an integer from 0 to 2^32 - 1")
        if scheduler.config.prediction_type not in PREDICTIONS:
            raise ValueError(
                f"prediction_type={scheduler.config.prediction_type!r}: expected one of {', '.join(PREDICTIONS)}"
            )
        if len(alphas) > 2**15 or not ((alphas > 0) & (alphas < 1)).all():
            raise ValueError("scheduler: expected at most 32,768 timesteps, each with some image and some noise")
        self.scheduler, self.alphas, self.conditions = scheduler, alphas, tuple(conditions)
        self.channels, self.size, self.draws, self.scale, self.seed = channels, size, draws, scale, seed
        self.levels = (float(levels[0]), float(levels[1]))
        self._label = {condition: label for label, condition in enumerate(self.conditions)}

    @classmethod
    def build(cls, backbone_source: str, **settings: Any) -> ImageDomain:
        """Make the domain with the conditions, the noise schedule and the image size that belong to a backbone.

        Raises:
            ValueError: If a file is missing or not understood, or diffusers is not installed.
        """
        folder = Path(resolve_source(backbone_source))
        config, conditions = _read(folder, "config.json"), _read(folder, CONDITIONS)
        if not isinstance(conditions, list) or not conditions or not all(isinstance(name, str) for name in conditions):
            raise ValueError(f"{folder / CONDITIONS}: expected a list of names, one for each class label")
        if len(set(conditions)) < len(conditions):
            raise ValueError(f"{folder / CONDITIONS}: names a condition twice")
        channels, size = (
            config.get(key) if isinstance(config, dict) else None for key in ("in_channels", "sample_size")
        )
        if channels not in (1, 3) or not isinstance(size, int):
            raise ValueError(
                f"{folder / 'config.json'}: in_channels={channels!r}, sample_size={size!r}; expected a model of pixels "
                "(1 or 3 channels) and the images' height"
            )
        return cls(_read_scheduler(folder), conditions, channels=channels, size=size, **settings)

    def settings(self) -> dict[str, Any]:
        """The constructor arguments, without what belongs to the backbone."""
        return {"draws": self.draws, "levels": list(self.levels), "scale": self.scale, "seed": self.seed}

    def check(self, backbone: Backbone) -> None:
        """Refuse all but a class-conditional DiT of these images and conditions.

        Raises:
            ValueError: With the reason.
        """
        config, kind = backbone.config, type(backbone.model).__name__
        prefix = f"backbone={backbone.source!r}: "
        if kind != "DiTTransformer2DModel":
            raise ValueError(
                f"{prefix}{kind} cannot serve the image domain; expected a class-conditional DiTTransformer2DModel of "
                "diffusers that works on pixels (no text encoder or autoencoder, which others need, is part of it)"
            )
        found = (config.in_channels, config.sample_size)
        if found != (self.channels, self.size):
            raise ValueError(
                f"{prefix}its images have (channels, size)={found}, those of the domain {(self.channels, self.size)}"
            )
        if (config.out_channels or self.channels) not in (self.channels, 2 * self.channels):
            raise ValueError(
                f"{prefix}out_channels={config.out_channels}; expected {self.channels}, or {2 * self.channels} if it "
                "predicts a variance too"
            )
        if config.num_embeds_ada_norm < len(self.conditions):
            raise ValueError(
                f"{prefix}it has {config.num_embeds_ada_norm} classes, expected one for each of the "
                f"{len(self.conditions)} conditions"
            )

    def encode(self, raw: Sequence[ImageExample]) -> tuple[Examples, Tensor]:
        """Encode images; those whose condition the backbone does not know are left out.

        Returns:
            ``image`` uint8 (rows, C, S, S), ``label`` int32 (rows,), ``timestep`` and ``noise`` int16 (rows, draws),
            the latter an index into :attr:`noise_bank`; and the indices of the usable examples, int64.

        Raises:
            ValueError: If an image has another shape or type; the message names the example.
        """
        shape = (self.size, self.size, 3)[: 2 if self.channels == 1 else 3]
        for index, (image, _) in enumerate(raw):
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(
                    f"example {index}: an image of {image.dtype} {image.shape}, the backbone needs uint8 {shape}"
                )
        kept = [index for index, example in enumerate(raw) if example.condition in self._label]
        images = np.zeros((len(kept), self.channels, self.size, self.size), np.uint8)
        draws = np.zeros((2, len(kept), self.draws), np.int16)
        for row, index in enumerate(kept):
            image, condition = raw[index]
            images[row] = image if self.channels == 1 else image.transpose(2, 0, 1)
            draws[:, row] = self._draw(images[row], condition)
        label = torch.tensor([self._label[raw[index].condition] for index in kept], dtype=torch.int32)
        timestep, noise = torch.from_numpy(draws)
        examples = {"image": torch.from_numpy(images), "label": label, "timestep": timestep, "noise": noise}
        return examples, torch.tensor(kept, dtype=torch.int64)

    def _draw(self, image: NDArray[np.uint8], condition: str) -> NDArray[np.int64]:
        """Timesteps and noise indices (2, draws) of an example: a function of what it is, not of where it stands."""
        example = hashlib.sha256(json.dumps([self.seed, condition]).encode("ascii") + image.tobytes())
        first, last = (round(level * len(self.alphas)) for level in self.levels)
        edges = [first + (last - first) * draw // self.draws for draw in range(self.draws + 1)]
        numbers = np.zeros((2, self.draws), np.int64)
        for draw, (begin, end) in enumerate(pairwise(edges)):
            digest = example.copy()
            digest.update(draw.to_bytes(4, "little"))
            place, noise = (int.from_bytes(digest.digest()[at : at + 8], "little") for at in (0, 8))
            numbers[:, draw] = begin + place % (end - begin), noise % BANK
        return numbers

    @cached_property
    def noise_bank(self) -> Tensor:
        """Standard normal noise (1024, C, S, S)."""
        # the legacy stream: NumPy promises not to change it between versions, so stored indices keep their meaning
        stream = np.random.RandomState(self.seed)
        noise = stream.standard_normal((BANK, self.channels, self.size, self.size)).astype(np.float32)
        with torch.inference_mode(False):  # it may first be needed in inference, then in training
            return torch.from_numpy(noise)

    def losses(self, model: nn.Module, examples: Examples, *, parts: bool = False) -> Tensor:
        """Mean squared error of the denoised image, per block of pixels, over all draws."""
        noised, timestep = self._noised(examples)
        label = examples["label"].long().repeat_interleave(self.draws)  # draws of an example stay adjacent
        error = self._denoised(model, noised, timestep, label) - self._clean(examples)
        if self.scale > 1:
            error = nn.functional.avg_pool2d(error, self.scale)
        share = error.square().flatten(1).mean(1).view(-1, self.draws) / self.draws
        if parts:
            return torch.stack([share[:, 0::2].sum(1), share[:, 1::2].sum(1)], dim=1)
        return share.sum(1)

    def features(self, model: nn.Module, examples: Examples, *, context: bool) -> Tensor:
        """States of the middle and the last block, over patches, and for a whole example how it departs from the usual.

        The context has the means over the noisiest draw, (rows, 2d). A whole example has means and deviations over the
        clean image at a small t, and the means over 7 x 7 blocks of what the image is more than the model makes of
        pure noise: where and how darkly this person draws it, other than people do, (rows, 4d + 49C).
        """
        label = examples["label"].long()
        if context:
            images, timestep = self._noised(examples, slice(-1, None))
        else:
            images, timestep = _scaled(examples["image"]), torch.full_like(label, len(self.alphas) // 20)
        blocks = list(model.get_submodule("transformer_blocks").children())
        states: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _module, _inputs, output: states.append(output.float()))
            for block in (blocks[(len(blocks) - 1) // 2], blocks[-1])
        ]
        try:
            self._predict(model, images, timestep, label)
        finally:
            for hook in hooks:
                hook.remove()
        means = [state.mean(1) for state in states]
        if context:
            return torch.cat(means, dim=1)
        spread = [state.std(1, correction=0) for state in states]
        last, noise = torch.full_like(label, len(self.alphas) - 1), self.noise_bank[:1].to(label.device)
        unusual = images - self._denoised(model, noise.expand_as(images), last, label)
        view = nn.functional.adaptive_avg_pool2d(unusual, BLOCKS).flatten(1)
        return torch.cat([*means, *spread, UNUSUAL_SCALE * view], dim=1)

    def known_state(self, states: Tensor, examples: Examples) -> Tensor:
        """Mean state over the patches of the noisiest draw (rows, d)."""
        noisiest: Tensor = states.unflatten(0, (-1, self.draws))[:, -1]
        return noisiest.float().mean(1)

    def describe(self, examples: Examples, row: int) -> dict[str, str | NDArray[np.uint8]]:
        """The condition and the image of one example."""
        return {
            "condition": self.conditions[int(examples["label"][row])],
            "image": _picture(examples["image"][row]),
        }

    @torch.no_grad()
    def metric(self, model: nn.Module, name: str, examples: Examples) -> Tensor:
        """Score of each example (rows,), higher is better.

        ``"psnr"``: peak signal-to-noise ratio in dB of the image that one step makes of the noisiest draw; at most
        59 dB, the error of rounding to 8 bits.

        Raises:
            ValueError: If there is no such metric.
        """
        if name not in self.metrics:
            raise ValueError(f"metric={name!r}: expected one of {', '.join(self.metrics)}")
        noised, timestep = self._noised(examples, slice(-1, None))
        denoised = self._denoised(model, noised, timestep, examples["label"].long()).clamp(-1, 1)
        error = (denoised - _scaled(examples["image"])).square().flatten(1).mean(1)
        return 10.0 * torch.log10(4.0 / error.clamp(min=1 / (12 * 127.5**2)))

    @torch.no_grad()
    def outcome(self, model: nn.Module, examples: Examples) -> dict[str, str | NDArray[np.uint8]]:
        """What the model makes of the noisiest draw of one example in one step."""
        noised, timestep = self._noised(examples, slice(-1, None))
        denoised = self._denoised(model, noised, timestep, examples["label"].long())
        return {"noised": _picture(_to_bytes(noised)[0]), "denoised": _picture(_to_bytes(denoised)[0])}

    @torch.no_grad()
    def generate(
        self, model: nn.Module, labels: Tensor, noise: Tensor, *, steps: int = 50, guidance: float = 1.0
    ) -> Tensor:
        """Draw images with DDIM (Song et al., 2021), which is deterministic given the noise.

        Args:
            model: The backbone's model, possibly adapted (rows grouped by user).
            labels: Class labels (rows,), int64.
            noise: Standard normal noise (rows, C, S, S).
            steps: Steps, evenly spaced over the schedule.
            guidance: Weight of classifier-free guidance (Ho & Salimans, 2022); 1 is none. Anything else needs a model
                that was trained with label dropout.

        Returns:
            uint8 (rows, C, S, S).

        Raises:
            ValueError: If ``noise``, ``labels`` or ``steps`` do not fit the domain.
        """
        shape = (len(labels), self.channels, self.size, self.size)
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise: {tuple(noise.shape)} for {len(labels)} labels, expected {shape}")
        if ((labels < 0) | (labels >= len(self.conditions))).any():
            raise ValueError(f"labels={labels.tolist()}: expected class labels from 0 to {len(self.conditions) - 1}")
        if not 1 <= steps <= len(self.alphas):
            raise ValueError(f"steps={steps}: expected 1 to the {len(self.alphas)} timesteps")
        scheduler = import_diffusers().DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=noise.device)
        images = noise.float()
        for timestep in scheduler.timesteps:
            predicted = self._guided(model, images, timestep.expand(len(labels)), labels, guidance)
            images = scheduler.step(predicted, timestep, images).prev_sample
        return _to_bytes(images)

    def _guided(self, model: nn.Module, noised: Tensor, timestep: Tensor, labels: Tensor, guidance: float) -> Tensor:
        if guidance == 1.0:
            return self._predict(model, noised, timestep, labels)
        # DiT keeps the embedding of "no condition" behind those of the classes; the two of a row stay adjacent
        unknown = torch.full_like(labels, model.config.num_embeds_ada_norm)  # type: ignore[arg-type, union-attr]
        pairs = torch.stack([labels, unknown], dim=1).flatten()
        doubled = self._predict(model, noised.repeat_interleave(2, 0), timestep.repeat_interleave(2), pairs)
        with_condition, without = doubled.unflatten(0, (-1, 2)).unbind(1)
        guided: Tensor = without + guidance * (with_condition - without)
        return guided

    def _clean(self, examples: Examples) -> Tensor:
        """``x_0`` of every draw (rows * draws, C, S, S); those of an example are adjacent."""
        return _scaled(examples["image"]).repeat_interleave(self.draws, 0)

    def _noised(self, examples: Examples, draws: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """``x_t`` (rows * draws, C, S, S) and ``t`` (rows * draws,); the draws of an example are adjacent."""
        timestep = examples["timestep"][:, draws].long()
        if self.noise_bank.device != timestep.device:
            self.noise_bank, self.alphas = self.noise_bank.to(timestep.device), self.alphas.to(timestep.device)
        noise = self.noise_bank[examples["noise"][:, draws].long()]
        alphas = self.alphas[timestep][..., None, None, None]
        noised = alphas.sqrt() * _scaled(examples["image"])[:, None] + (1 - alphas).sqrt() * noise
        return noised.flatten(0, 1), timestep.flatten()

    def _denoised(self, model: nn.Module, noised: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """The model's estimate of ``x_0`` (n, C, S, S), from what it predicts."""
        predicted = self._predict(model, noised, timestep, label)
        if self.scheduler.config.prediction_type == "sample":
            return predicted
        alphas = self.alphas[timestep][:, None, None, None]
        if self.scheduler.config.prediction_type == "v_prediction":
            return alphas.sqrt() * noised - (1 - alphas).sqrt() * predicted
        return (noised - (1 - alphas).sqrt() * predicted) / alphas.sqrt()

    def _predict(self, model: nn.Module, noised: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """What the model predicts for images (n, C, S, S), float32."""
        dtype = next(model.parameters()).dtype
        output = model(hidden_states=noised.to(dtype), timestep=timestep, class_labels=label, return_dict=False)[0]
        # a model with a learned variance has it in further channels
        predicted: Tensor = output[:, : self.channels].float()
        return predicted


def _scaled(images: Tensor) -> Tensor:
    """Bytes to [-1, 1]; the paper is 1."""
    return images.float() / 127.5 - 1


def _to_bytes(images: Tensor) -> Tensor:
    """Inverse of :func:`_scaled`, rounded; what is out of range is clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _picture(image: Tensor) -> NDArray[np.uint8]:
    """A picture (H, W) or (H, W, 3) of an image (C, H, W)."""
    picture: NDArray[np.uint8] = image.permute(1, 2, 0).squeeze(-1).cpu().numpy()
    return picture


def _read(folder: Path, name: str) -> Any:
    try:
        return storage.read_json(folder / name)
    except FileNotFoundError as error:
        raise ValueError(
            f"backbone={str(folder)!r}: has no {name}; the image domain needs a folder with the weights and "
            f"config.json of a DiT, its scheduler_config.json and {CONDITIONS}, the list of its conditions"
        ) from error


def _read_scheduler(folder: Path) -> Any:
    _read(folder, "scheduler_config.json")
    diffusers = import_diffusers()
    try:
        return diffusers.DDPMScheduler.from_pretrained(folder)
    except Exception as error:  # diffusers builds a schedule of whatever the file says, and fails in any way
        raise ValueError(f"{folder / 'scheduler_config.json'}: no schedule of a DDPM ({error})") from error
