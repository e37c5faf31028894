import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from dsa_gym import storage
from dsa_gym.metrics import (
    FeatureExtractor,
    FrechetResult,
    clip_score,
    clip_scores,
    frechet_distance,
    image,
    train_feature_extractor,
)


class Pixels(nn.Module):
    """The first pixels as features, so that sets with given features can be made."""

    name = "pixels"

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4].float()


def bars(rows: int, seed: int, size: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Grey drawings (rows, size, size) of a horizontal (0), vertical (1) or diagonal (2) bar somewhere, with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    drawings = rng.integers(0, 60, (rows, size, size))
    y, x = np.mgrid[:size, :size]
    for drawing, label in zip(drawings, labels, strict=True):
        across = (y, x, (x + y) / 2)[label]
        drawing[np.abs(across - rng.integers(5, size - 5)) < 1.5] += 180
    return drawings.astype(np.uint8), labels


@pytest.fixture(scope="module")
def judge() -> FeatureExtractor:
    """A classifier of bars."""
    return train_feature_extractor(*bars(300, seed=1), name="bars", seed=0, steps=60, batch=32)


@pytest.fixture
def untrained(generator: torch.Generator) -> FeatureExtractor:
    return FeatureExtractor("untrained", channels=3, classes=5, generator=generator)


def noise(rows: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, *shape), dtype=np.uint8)


def test_training_recognises_new_images(judge: FeatureExtractor) -> None:
    assert judge.accuracy(*bars(300, seed=2)) > 0.95
    images, labels = bars(300, seed=2)
    assert judge.accuracy(images, (labels + 1) % 3) < 0.05


def test_training_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone() -> None:
    images, labels = bars(20, seed=1)

    def weights(seed: int) -> list[float]:
        trained = train_feature_extractor(images, labels, name="a", seed=seed, steps=2, batch=4)
        return trained.head.bias.tolist()

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert weights(0) == first
    assert weights(1) != first


@pytest.mark.parametrize("size", [(16, 16), (28, 28), (64, 31)])
def test_features_of_any_size(size: tuple[int, int], untrained: FeatureExtractor) -> None:
    images = torch.as_tensor(noise(3, 3, *size))
    assert untrained.features(images).shape == (3, 64)
    assert untrained(images).shape == (3, 5)


def test_layouts_are_the_same_images(untrained: FeatureExtractor, generator: torch.Generator) -> None:
    colour = noise(3, 20, 24, 3)
    expected = untrained.features(torch.as_tensor(colour).permute(0, 3, 1, 2))
    torch.testing.assert_close(untrained.features(colour), expected)
    grey = FeatureExtractor("grey", channels=1, classes=2, generator=generator)
    images = noise(3, 20, 24)
    for other in (images[:, None], images[..., None]):
        torch.testing.assert_close(grey.features(other), grey.features(images))


def test_arrays_may_be_read_only_or_reversed(untrained: FeatureExtractor) -> None:
    images = noise(3, 20, 24, 3)
    expected = untrained.features(images)
    images.flags.writeable = False
    torch.testing.assert_close(untrained.features(images[::-1]), expected.flip(0))


def test_a_network_survives_saving(judge: FeatureExtractor, tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    judge.save(path)
    loaded = FeatureExtractor.load(path)
    assert (loaded.name, loaded.channels, loaded.classes, loaded.training) == ("bars", 1, 3, False)
    images, _ = bars(10, seed=3)
    assert torch.equal(loaded(images), judge(images))


def test_files_that_hold_something_else_are_refused(judge: FeatureExtractor, tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    with pytest.raises(FileNotFoundError, match="judge"):
        FeatureExtractor.load(path)
    storage.write_tensors(path, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"judge.safetensors: expected a 'dsa-gym feature extractor 1', got None"):
        FeatureExtractor.load(path)
    judge.save(path)
    metadata, tensors = storage.read_metadata(path), storage.read_tensors(path)
    for change in ({"channels": "two"}, {"classes": "4"}, {"name": "inception-v3"}):
        storage.write_tensors(path, tensors, {**metadata, **change})
        with pytest.raises(ValueError, match=r"judge.safetensors is no complete feature extractor"):
            FeatureExtractor.load(path)


@pytest.mark.parametrize(
    ("images", "labels", "settings", "message"),
    [
        (noise(2, 20, 20), [0], {}, r"labels: expected integers of shape \(2,\), got int64 of shape \(1,\)"),
        (noise(2, 20, 20), [0, -1], {}, "labels: expected integers from 0, got -1"),
        (noise(2, 20, 20), [0.0, 1.0], {}, "labels: .*float64"),
        (noise(2, 20, 20), [0, 0], {}, "classes=1: expected"),
        (noise(2, 15, 20), [0, 1], {}, "images: expected at least 16 x 16 pixels, got 15 x 20"),
        (noise(2, 20, 20).astype(float), [0, 1], {}, "images: expected uint8 .*float64"),
        (noise(2, 20, 20, 4), [0, 1], {}, r"images: .*got uint8 of shape \(2, 20, 20, 4\)"),
        (noise(0, 20, 20), [], {}, r"images: .*\(0, 20, 20\)"),
        (noise(2, 20, 20), [0, 1], {"steps": 0}, "steps=0"),
        (noise(2, 20, 20), [0, 1], {"learning_rate": math.nan}, "learning_rate=nan"),
        (noise(2, 20, 20), [0, 1], {"name": "inception-v3"}, "name='inception-v3': expected a name"),
        (noise(2, 20, 20), [0, 1], {"name": ""}, "name='': expected a name"),
    ],
)
def test_training_refuses(images: np.ndarray, labels: list[int], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_feature_extractor(images, np.array(labels), **{"name": "a", "seed": 0, "steps": 1, **settings})


def test_accuracy_and_features_refuse_what_does_not_fit(judge: FeatureExtractor) -> None:
    images, labels = bars(4, seed=0)
    with pytest.raises(ValueError, match="labels: expected 0 to 2, got 3"):
        judge.accuracy(images, np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"labels: expected integers of shape \(4,\)"):
        judge.accuracy(images, labels[:3])
    with pytest.raises(ValueError, match="images: have 3 channels, but extractor 'bars' has 1"):
        judge.features(noise(4, 20, 20, 3))


def gaussians() -> tuple[np.ndarray, np.ndarray]:
    """Two sets whose first pixels are different Gaussians, correlated."""
    rng = np.random.default_rng(0)
    sets = np.zeros((2, 400, 16, 16), dtype=np.uint8)
    for index, (mean, mix) in enumerate(((100, rng.normal(size=(4, 4))), (120, rng.normal(size=(4, 4))))):
        sets[index, :, 0, :4] = (mean + 8 * rng.normal(size=(400, 4)) @ mix).clip(0, 255)
    return sets[0], sets[1]


def test_frechet_distance_is_the_closed_form_of_two_gaussians() -> None:
    real, fake = gaussians()
    first, second = (pixels[:, 0, :4].astype(np.float64) for pixels in (real, fake))
    s1, s2 = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    result = frechet_distance(real, fake, features=Pixels())
    assert result.value == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(fake, real, features=Pixels()).value == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(real, real[::-1], features=Pixels()).value == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    real, _ = gaussians()
    fake = real.copy()
    fake[:, 0, :4] += 3
    assert frechet_distance(real, fake, features=Pixels()).value == pytest.approx(4 * 3**2, rel=1e-6)


def test_a_trained_extractor_tells_more_and_less_alike_sets_apart(judge: FeatureExtractor) -> None:
    real, labels = bars(400, seed=4)
    alike, _ = bars(400, seed=5)
    one_class, _ = (real[labels == 0], labels)
    near, far = (frechet_distance(real, other, features=judge) for other in (alike, one_class))
    assert 5 * near.value < far.value
    assert str(near).startswith("FD[bars] = ")


def test_results_name_the_extractor() -> None:
    assert str(FrechetResult(12.345, "pixels")) == "FD[pixels] = 12.35"
    assert str(FrechetResult(12.345, "inception-v3")) == "FID[inception-v3] = 12.35"


def test_frechet_distance_leaves_the_extractor_as_it_was() -> None:
    class Modal(nn.Module):
        name = "modal"

        def forward(self, images: Tensor) -> Tensor:
            assert not self.training
            return Pixels()(images)

    extractor = Modal().train()
    frechet_distance(*gaussians(), features=extractor)
    assert extractor.training


class Flat(nn.Flatten):
    name = "flat"


class Broken(nn.Module):
    name = "broken"

    def __init__(self, shape: tuple[int, ...], value: float) -> None:
        super().__init__()
        self.shape, self.value = shape, value

    def forward(self, images: Tensor) -> Tensor:
        return torch.full((len(images), *self.shape), self.value)


@pytest.mark.parametrize(
    ("real", "fake", "features", "message"),
    [
        (noise(1, 20, 20), noise(3, 20, 20), Pixels(), "real: expected at least 2 images.*got 1"),
        (noise(3, 20, 20), noise(3, 20), Pixels(), r"fake: .*\(3, 20\)"),
        (noise(3, 20, 20), noise(3, 18, 20), Flat(), "features: 'flat' gives 400 features of real and 360 of fake"),
        (noise(3, 20, 20), noise(3, 20, 20), nn.Identity(), "features: Identity must have a string attribute 'name'"),
        (noise(3, 20, 20), noise(3, 20, 20), "vgg", "features='vgg': expected 'inception'"),
        (noise(3, 20, 20), noise(3, 20, 20), Broken((2, 2), 0.0), r"real: extractor 'broken' .*\(3, 2, 2\)"),
        (noise(3, 20, 20), noise(3, 20, 20), Broken((2,), math.nan), "real: extractor 'broken' .*finite"),
    ],
)
def test_frechet_distance_refuses(real: np.ndarray, fake: np.ndarray, features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(real, fake, features=features)


def test_no_other_network_can_pass_for_inception() -> None:
    impostor = Pixels()
    impostor.name = "inception-v3"
    with pytest.raises(ValueError, match="'name' other than 'inception-v3'"):
        frechet_distance(noise(3, 20, 20), noise(3, 20, 20), features=impostor)


def test_inception_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(3, 20, 20)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*weights-inception-2015-12-05-6726825d.pth"):
        frechet_distance(images, images, features="inception")
    path = tmp_path / "other.pth"
    path.write_bytes(b"not Inception")
    with pytest.raises(ValueError, match=r"weights=.*other.pth.*its SHA-256 differs"):
        frechet_distance(images, images, features="inception", weights=path)
    monkeypatch.setattr(storage, "sha256", lambda _: "6726825d")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="features='inception' needs torch-fidelity"):
        frechet_distance(images, images, features="inception", weights=path)


def test_inception_gets_colour_images_and_the_users_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand(nn.Module):
        """Has the interface of torch-fidelity's class, which needs 100 MB of weights."""

        def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert (features, feature_extractor_weights_path) == (["2048"], str(path))

        def forward(self, images: Tensor) -> tuple[Tensor]:
            assert images.shape[1:] == (3, 16, 16)
            return (images.flatten(1)[:, :4],)

    path = tmp_path / "weights.pth"
    path.write_bytes(b"")
    monkeypatch.setattr(storage, "sha256", lambda _: "6726825d")
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    monkeypatch.setattr(sys.modules["torch_fidelity"], "FeatureExtractorInceptionV3", Stand, raising=False)
    result = frechet_distance(*gaussians(), features="inception", weights=path)
    assert result == FrechetResult(frechet_distance(*gaussians(), features=Pixels()).value, "inception-v3")
    assert result.label == "FID[inception-v3]"


def test_missing_torchmetrics_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r'frechet_distance needs torchmetrics: pip install "dsa-gym\[metrics\]"'):
        frechet_distance(noise(3, 20, 20), noise(3, 20, 20), features=Pixels())


CAPTIONS = ["a cat", "a tall dog", "cat", "dog dog dog"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP with 32 x 32 images, a window of 8 tokens and single letters as its vocabulary."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=8, **layers, **ends)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
        for parameter in model.parameters():
            if parameter.dim() > 1:  # larger than by default, so that embeddings point all ways
                nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def cosines(folder: Path, images: np.ndarray) -> list[float]:
    """Cosine of each image's and caption's embedding, one by one and without the image processor."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    found = []
    for array, caption in zip(images, CAPTIONS, strict=True):
        pixels = (torch.tensor(array).permute(2, 0, 1) / 255 - mean) / deviation
        ids = tokenizer(caption)["input_ids"]
        ids = [*ids[:7], 53]  # the window, with its end
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(pixels[None]).pooler_output)[0]
            read = model.text_projection(model.text_model(torch.tensor([ids])).pooler_output)[0]
        found.append(float(seen @ read / (seen.norm() * read.norm())))
    return found


def test_clip_score_is_the_cosine(clip: Path) -> None:
    images = noise(4, 32, 32, 3) // np.array([1, 2, 4, 8], dtype=np.uint8)[:, None, None, None]
    expected = cosines(clip, images)
    assert min(expected) < 0 < max(expected)
    scores = clip_scores(images, CAPTIONS, model=clip)
    assert scores.tolist() == pytest.approx([100 * max(cosine, 0) for cosine in expected], abs=1e-3)
    assert clip_score(images, CAPTIONS, model=str(clip)) == pytest.approx(scores.mean().item())


def test_clip_scores_of_grey_and_larger_images(clip: Path) -> None:
    grey = noise(4, 40, 64)
    colour = np.repeat(grey[..., None], 3, axis=3)
    torch.testing.assert_close(clip_scores(grey, CAPTIONS, model=clip), clip_scores(colour, CAPTIONS, model=clip))


def test_clip_scores_do_not_depend_on_the_batch(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(4, 32, 32, 3)
    whole = clip_scores(images, CAPTIONS, model=clip)
    monkeypatch.setattr(image, "_BATCH", 3)
    torch.testing.assert_close(clip_scores(images, CAPTIONS, model=clip), whole)


@pytest.mark.parametrize("captions", [["a"], [], "abcd", ["a", "b", "c", None]])
def test_clip_score_refuses_captions_that_do_not_fit(captions: Any) -> None:
    with pytest.raises(ValueError, match="captions: expected a list of 4 texts, one per image"):
        clip_scores(noise(4, 32, 32, 3), captions, model="unused")


def test_clip_score_refuses_folders_without_a_complete_model(clip: Path, tmp_path: Path) -> None:
    images = noise(4, 32, 32, 3)
    with pytest.raises(ValueError, match=r"model='.*nowhere': no CLIP model can be loaded"):
        clip_scores(images, CAPTIONS, model=tmp_path / "nowhere")
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = storage.read_tensors(clip / "model.safetensors")
    del tensors["visual_projection.weight"]
    storage.write_tensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ValueError, match=r"tensors are missing, first 'visual_projection.weight'"):
        clip_scores(images, CAPTIONS, model=tmp_path)
