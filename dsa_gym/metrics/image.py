"""Image metrics: Fréchet distance between sets of images, agreement with captions, and a small trained judge.

Images are uint8, of shape (rows, H, W), (rows, H, W, C) or (rows, C, H, W) with one channel or three, at least 16
pixels wide and high; arrays and tensors are taken alike.

The published FID needs the weights of one Inception network. Where they are missing, or where images are small drawings
that Inception has never seen, the same distance between the features of another network is useful, but it is another
number: results always say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from dsa_gym import storage

__all__ = [
    "FeatureExtractor",
    "FrechetResult",
    "clip_score",
    "clip_scores",
    "frechet_distance",
    "train_feature_extractor",
]

INCEPTION = "inception-v3"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_BATCH = 256
_SMALLEST = 16
_FORMAT = "dsa-gym feature extractor 1"


@dataclass(frozen=True)
class FrechetResult:
    """A Fréchet distance and what it was measured with.

    Attributes:
        value: The distance, 0 or more; lower is better.
        extractor: Name of the network whose features were compared; ``"inception-v3"`` for the published FID only.
    """

    value: float
    extractor: str

    @property
    def label(self) -> str:
        """What to write beside the number: ``FID[inception-v3]``, or ``FD[NAME]`` for any other network."""
        return f"{'FID' if self.extractor == INCEPTION else 'FD'}[{self.extractor}]"

    def __str__(self) -> str:
        return f"{self.label} = {self.value:.4g}"


class FeatureExtractor(nn.Module):
    """A small convolutional network: features for the Fréchet distance, and a classifier of its training labels.

    Attributes:
        name: What results call it.
        channels: 1 for grey images, 3 for colour.
        classes: Number of classes.
    """

    num_features = 64

    def __init__(self, name: str, *, channels: int, classes: int, generator: torch.Generator) -> None:
        """Make an untrained network.

        Args:
            name: See the class; any text but ``"inception-v3"``.
            channels: 1 or 3.
            classes: At least 2.
            generator: CPU generator that the weights are drawn with.

        Raises:
            ValueError: If an argument is out of range.
        """
        super().__init__()
        if not name or name == INCEPTION:
            raise ValueError(
                f"name={name!r}: expected a name, and {INCEPTION!r} is that of the published FID's network"
            )
        if channels not in (1, 3) or classes < 2:
            raise ValueError(f"channels={channels}, classes={classes}: expected 1 or 3 channels and 2 or more classes")
        self.name, self.channels, self.classes = name, channels, classes
        seed = int(torch.randint(1 << 62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # modules draw their weights from the global generator
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(channels, 32, 3, stride=2, padding=1),
                nn.GELU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1),
                nn.GELU(),
                nn.Conv2d(64, 64, 3, padding=1),
                nn.GELU(),
                nn.AdaptiveAvgPool2d(3),
                nn.Flatten(),
                nn.Linear(64 * 9, self.num_features),
            )
            self.head = nn.Linear(self.num_features, classes)

    def features(self, images: Tensor | np.ndarray) -> Tensor:
        """Features (rows, 64) of uint8 images, in any of the module's layouts.

        Raises:
            ValueError: If the images are not as the module says, or have other channels than the network.
        """
        batch = _batch(images, "images")
        if batch.shape[1] != self.channels:
            raise ValueError(f"images: have {batch.shape[1]} channels, but extractor {self.name!r} has {self.channels}")
        output: Tensor = self.body(batch.to(self.head.weight.device).float() / 127.5 - 1)
        return output

    def forward(self, images: Tensor | np.ndarray) -> Tensor:
        """Logits (rows, classes); arguments and errors are those of :meth:`features`."""
        output: Tensor = self.head(F.gelu(self.features(images)))
        return output

    @torch.no_grad()
    def accuracy(self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
        """Share of images, 0 to 1, whose most likely class is their label (rows,).

        Raises:
            ValueError: If images and labels do not fit each other or the network.
        """
        batch = _batch(images, "images")
        wanted = _labels(labels, len(batch))
        if int(wanted.max()) >= self.classes:
            raise ValueError(f"labels: expected 0 to {self.classes - 1}, got {int(wanted.max())}")
        guesses = torch.cat([self(part).argmax(1).cpu() for part in batch.split(_BATCH)])
        return float((guesses == wanted).double().mean())

    def save(self, path: Path) -> None:
        """Write the network as safetensors, with its name and sizes in the header."""
        metadata = {"format": _FORMAT, "name": self.name, "channels": str(self.channels), "classes": str(self.classes)}
        storage.write_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: Path) -> FeatureExtractor:
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or holds something else.
        """
        metadata = storage.read_metadata(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path}: expected a {_FORMAT!r}, got {metadata.get('format')!r}")
        try:
            extractor = cls(
                metadata["name"],
                channels=int(metadata["channels"]),
                classes=int(metadata["classes"]),
                generator=torch.Generator(),
            )
            extractor.load_state_dict(storage.read_tensors(path))
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no complete feature extractor: {_first_line(error)}") from error
        return extractor.eval().requires_grad_(False)


def train_feature_extractor(
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    name: str,
    seed: int,
    steps: int = 400,
    batch: int = 64,
    learning_rate: float = 2e-3,
    shift: int = 2,
) -> FeatureExtractor:
    """Train a feature extractor to classify images (AdamW, cosine schedule, random shifts).

    Args:
        images: Training images.
        labels: Their classes, integers from 0; each class should have images (rows,).
        name: What results call the network. Say what it was trained on.
        seed: Another seed is another network; the same one is the same on one machine.
        steps: Optimizer steps.
        batch: Images per step.
        learning_rate: Highest learning rate.
        shift: Every image is moved by up to so many pixels each way, its border repeated.

    Returns:
        The network, in eval mode, on the CPU.

    Raises:
        ValueError: If images and labels do not fit each other, or a setting is out of range.
    """
    pixels = _batch(images, "images")
    wanted = _labels(labels, len(pixels))
    if steps < 1 or batch < 1 or shift < 0 or not learning_rate > 0:
        raise ValueError(
            f"steps={steps}, batch={batch}, learning_rate={learning_rate}, shift={shift}: expected positive numbers, "
            "and 0 or more for shift"
        )
    generator = torch.Generator().manual_seed(seed)
    classes = int(wanted.max()) + 1
    extractor = FeatureExtractor(name, channels=pixels.shape[1], classes=classes, generator=generator)
    optimizer = torch.optim.AdamW(extractor.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(pixels), (batch,), generator=generator)
        loss = F.cross_entropy(extractor(_shifted(pixels[rows], shift, generator)), wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return extractor.eval().requires_grad_(False)


def frechet_distance(
    real: Tensor | np.ndarray,
    fake: Tensor | np.ndarray,
    *,
    features: Literal["inception"] | nn.Module,
    weights: Path | None = None,
) -> FrechetResult:
    """Fréchet distance between two sets of images (Heusel et al., 2017): lower is more alike.

    ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) for the means m and covariances S of their features. It has a bias
    that shrinks with the number of images: compare only numbers from equally many, and use several times as many
    images as there are features (64 of a :class:`FeatureExtractor`, 2048 of Inception).

    Args:
        real: Real images, at least 2.
        fake: Generated images, at least 2; the size may differ.
        features: ``"inception"`` for the published FID, a :class:`FeatureExtractor`, or any other module with a
            string attribute ``name`` that maps uint8 images (rows, C, H, W) to features (rows, F).
        weights: torch-fidelity's file of Inception weights, for ``"inception"``; by default where PyTorch Hub keeps it.
            It is never downloaded.

    Returns:
        The distance with the extractor's name.

    Raises:
        ValueError: If images or extractor are not as above, or the features are not finite.
        FileNotFoundError: If the Inception weights are missing.
        ImportError: If torchmetrics, or for Inception torch-fidelity, is missing.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError('frechet_distance needs torchmetrics: pip install "dsa-gym[metrics]"') from error
    extractor = _extractor(features, weights)
    sets = {"real": _batch(real, "real"), "fake": _batch(fake, "fake")}
    for name, images in sets.items():
        if len(images) < 2:
            raise ValueError(f"{name}: expected at least 2 images, a covariance needs them, got {len(images)}")
    encoded = {name: extractor.encode(images, name) for name, images in sets.items()}
    if encoded["real"].shape[1] != encoded["fake"].shape[1]:
        raise ValueError(
            f"features: {extractor.name!r} gives {encoded['real'].shape[1]} features of real and "
            f"{encoded['fake'].shape[1]} of fake images; expected as many of both"
        )
    # torchmetrics gets the features in place of the images, whose extractor is then the identity
    distance = FrechetInceptionDistance(feature=_Identity(encoded["real"].shape[1]))
    for name, values in encoded.items():
        distance.update(values, real=name == "real")
    # the matrix root's rounding can make equal sets slightly negative
    return FrechetResult(max(0.0, float(distance.compute())), extractor.name)


def clip_scores(images: Tensor | np.ndarray, captions: Sequence[str], *, model: str | Path) -> Tensor:
    """CLIP score of each image with its caption: 100 max(cos(image, caption), 0) of their CLIP embeddings.

    The weight of Hessel et al. (2021) is 2.5; 100 is torchmetrics' and makes the score a percentage. The model stays
    loaded for the next call. Captions that are longer than its window are cut.

    Args:
        images: Images, resized and cropped as the model's own preprocessing says, by Pillow.
        captions: One text per image (rows,).
        model: Folder or Hugging Face Hub id of a CLIP model, such as ``openai/clip-vit-base-patch16``.

    Returns:
        float32 (rows,), 0 to 100, on the CPU.

    Raises:
        ValueError: If images and captions do not fit each other, or the model cannot be loaded.
    """
    pixels = _batch(images, "images")
    if isinstance(captions, str) or len(captions) != len(pixels) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"captions: expected a list of {len(pixels)} texts, one per image, got {captions!r:.60}")
    clip = _Clip.load(str(model))
    parts = range(0, len(pixels), _BATCH)
    return torch.cat([clip.scores(pixels[i : i + _BATCH], list(captions[i : i + _BATCH])) for i in parts])


def clip_score(images: Tensor | np.ndarray, captions: Sequence[str], *, model: str | Path) -> float:
    """Mean of :func:`clip_scores`, which has the arguments and errors."""
    return float(clip_scores(images, captions, model=model).mean())


@dataclass(frozen=True)
class _Extractor:
    """A network that gives features, and what results call it."""

    name: str
    network: nn.Module

    @torch.no_grad()
    def encode(self, images: Tensor, argument: str) -> Tensor:
        """Features of a set of images, in batches (rows, F) float64 on the CPU."""
        place = next(self.network.parameters(), torch.zeros(())).device
        training = self.network.training
        self.network.eval()
        try:
            run = self.network.features if isinstance(self.network, FeatureExtractor) else self.network
            values = torch.cat([run(part.to(place)).double().cpu() for part in images.split(_BATCH)])
        finally:
            self.network.train(training)
        if values.dim() != 2 or len(values) != len(images) or not torch.isfinite(values).all():
            raise ValueError(
                f"{argument}: extractor {self.name!r} should give finite features of shape ({len(images)}, F), got "
                f"shape {tuple(values.shape)}"
            )
        return values


class _Identity(nn.Identity):
    """What torchmetrics needs to take features as they are: the identity, and how many there will be."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class _Inception(nn.Module):
    """torch-fidelity's Inception with the resizing of the original FID: colour or grey images to (rows, 2048)."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from torch_fidelity import FeatureExtractorInceptionV3  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError(
                "features='inception' needs torch-fidelity (pip install torch-fidelity) besides its file of weights "
                f"{INCEPTION_FILE}; pass a trained FeatureExtractor to do without"
            ) from error
        self.inner = FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=str(weights))

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.inner(images.expand(-1, 3, -1, -1))[0]
        return output


def _extractor(features: Literal["inception"] | nn.Module, weights: Path | None) -> _Extractor:
    """The network that is asked for."""
    if isinstance(features, nn.Module):
        name = getattr(features, "name", None)
        if not isinstance(name, str) or not name or name == INCEPTION:
            raise ValueError(
                f"features: {type(features).__name__} must have a string attribute 'name' other than {INCEPTION!r}, "
                f"which results show; got {name!r}"
            )
        return _Extractor(name, features)
    if features != "inception":
        raise ValueError(f"features={features!r}: expected 'inception', a FeatureExtractor or another named nn.Module")
    path = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: features='inception' needs torch-fidelity's {INCEPTION_FILE}, which is not "
            "downloaded; give its place as weights, or pass a trained FeatureExtractor"
        )
    # the check that PyTorch Hub makes: torch-fidelity unpickles the file, and another one may do anything
    if storage.sha256(path)[:8] != INCEPTION_FILE[-12:-4]:
        raise ValueError(f"weights={str(path)!r}: not torch-fidelity's {INCEPTION_FILE}, its SHA-256 differs")
    return _Extractor(INCEPTION, _Inception(path))


@dataclass(frozen=True)
class _Clip:
    """A CLIP model with its preprocessing."""

    model: Any
    processor: Any
    tokenizer: Any

    @staticmethod
    @lru_cache(maxsize=1)
    def load(source: str) -> _Clip:
        """Load a model from a folder or the Hub."""
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            # Pillow's resizing whether or not torchvision is installed, so that scores do not depend on it
            processor = AutoImageProcessor.from_pretrained(source, backend="pil")
            tokenizer = AutoTokenizer.from_pretrained(source)
            loaded: Any = CLIPModel.from_pretrained(source, output_loading_info=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"model={source!r}: no CLIP model can be loaded ({_first_line(error)}); expected a folder with model, "
                "tokenizer and image processor, or a Hub id"
            ) from error
        model, loading = loaded
        if loading["missing_keys"]:
            raise ValueError(f"model={source!r}: tensors are missing, first {min(loading['missing_keys'])!r}")
        return _Clip(model.eval().requires_grad_(False), processor, tokenizer)

    @torch.no_grad()
    def scores(self, images: Tensor, captions: list[str]) -> Tensor:
        """CLIP score per example (rows,) of images (rows, C, H, W)."""
        colour = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()  # (rows, H, W, 3)
        window = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=window, return_tensors="pt")
        output = self.model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=self.processor([Image.fromarray(array) for array in colour], return_tensors="pt")[
                "pixel_values"
            ],
        )
        cosine = F.cosine_similarity(output.image_embeds, output.text_embeds)
        return 100 * cosine.clamp(min=0).float()


def _batch(images: Tensor | np.ndarray, argument: str) -> Tensor:
    """Images of any of the module's layouts as uint8 (rows, C, H, W) on the CPU or where they were."""
    # a copy of an array: torch warns of read-only ones and cannot take reversed ones
    byte = str(images.dtype) in ("uint8", "torch.uint8")
    batch = torch.as_tensor(images if isinstance(images, Tensor) else images.copy()) if byte else torch.empty(0)
    if batch.dim() == 3:
        batch = batch[:, None]
    elif batch.dim() == 4 and batch.shape[1] not in (1, 3):
        batch = batch.permute(0, 3, 1, 2)
    if batch.dim() != 4 or batch.shape[1] not in (1, 3) or not len(batch):
        raise ValueError(
            f"{argument}: expected uint8 of shape (rows, H, W), (rows, H, W, C) or (rows, C, H, W) with 1 or 3 "
            f"channels, got {images.dtype} of shape {tuple(images.shape)}"
        )
    if min(batch.shape[2:]) < _SMALLEST:
        raise ValueError(
            f"{argument}: expected at least {_SMALLEST} x {_SMALLEST} pixels, got {batch.shape[2]} x {batch.shape[3]}"
        )
    return batch


def _labels(labels: Tensor | np.ndarray, rows: int) -> Tensor:
    """Labels as int64 (rows,)."""
    wanted = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    if wanted.shape != (rows,) or wanted.dtype.kind not in "iu":
        raise ValueError(f"labels: expected integers of shape ({rows},), got {wanted.dtype} of shape {wanted.shape}")
    if wanted.min() < 0:
        raise ValueError(f"labels: expected integers from 0, got {wanted.min()}")
    return torch.from_numpy(wanted.astype(np.int64))


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image (rows, C, H, W) by up to ``most`` pixels each way, repeating its border."""
    rows, _, height, width = images.shape
    by = torch.randint(-most, most + 1, (2, rows, 1), generator=generator)
    down = (torch.arange(height) + by[0]).clamp(0, height - 1)  # (rows, H)
    right = (torch.arange(width) + by[1]).clamp(0, width - 1)  # (rows, W)
    moved = images[torch.arange(rows)[:, None, None], :, down[:, :, None], right[:, None, :]]  # (rows, H, W, C)
    return moved.permute(0, 3, 1, 2)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
