"""Pre-training on images: who is held out, what is measured, a run that failed is the same run, it learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsa_gym import storage
from dsa_gym.backbone import Backbone
from dsa_gym.data import DataError, UserImages, split_users
from dsa_gym.domains import rows_of, take
from dsa_gym.domains.image import ImageDomain, ImageExample
from dsa_gym.generators.hands import HandConfig, draw_hands, write_hands
from dsa_gym.pretrain import image as pretrain
from dsa_gym.pretrain.image import ImagePretrainConfig, build_model, pretrain_image

HANDS = HandConfig(users=12, characters=4, per_user=5, size=16)
CONFIG = ImagePretrainConfig(
    batch_size=8, steps=8, learning_rate=1e-3, width=8, layers=1, heads=2, timesteps=50, validation=0.2
)
Result = tuple[Path, dict[str, Any]]


def writers(config: HandConfig) -> list[UserImages]:
    drawn = draw_hands(config)
    return [
        UserImages(str(name), drawn.image[drawn.user == name], tuple(drawn.condition[drawn.user == name].tolist()))
        for name in np.unique(drawn.user)
    ]


USERS = writers(HANDS)


def pretrained(out: Path, users: Sequence[UserImages] = USERS, **settings: Any) -> dict[str, Any]:
    return pretrain_image(users, out, replace(CONFIG, **settings), checkpoint_every=3)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A whole run: its folder and what it returned."""
    out = tmp_path_factory.mktemp("unbroken")
    return out, pretrained(out)


def weights(folder: Path) -> bytes:
    return (folder / "diffusion_pytorch_model.safetensors").read_bytes()


def groups_of(users: Sequence[UserImages] = USERS) -> dict[str, list[str]]:
    names = [user.user for user in users]
    return split_users(names, validation=CONFIG.validation, test=CONFIG.test, seed=CONFIG.seed)


def test_what_is_written(unbroken: Result) -> None:
    out, result = unbroken
    backbone = Backbone.load(out)
    domain = ImageDomain.build(str(out))
    domain.check(backbone)
    assert list(domain.conditions) == sorted({name for user in USERS for name in user.conditions})
    assert (domain.channels, domain.size, len(domain.alphas)) == (1, 16, 50)
    stored = storage.read_tensors(out / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    record = storage.read_json(out / "pretrain.json")
    assert result.items() <= record.items()
    assert (record["users"], record["conditions"], record["data"]) == (12, 4, {})
    assert record["config"]["width"] == 8
    assert record["trained_users"] == groups_of()["train"]
    assert record["parameters"] == sum(p.numel() for p in backbone.model.parameters())
    assert {"dsa-gym", "torch"} <= record["versions"].keys()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: diffusers")
    assert f"Trained on {5 * len(record['trained_users'])} images of {len(record['trained_users'])} users" in card
    assert f"{result['unseen']:.4f} on users it was not trained on" in card
    assert "{" not in card


def test_losses_are_those_of_the_weights_as_shipped(unbroken: Result) -> None:
    out, result = unbroken
    model, domain, groups = Backbone.load(out).model, ImageDomain.build(str(out)), groups_of()
    for name, group in (("validation_loss", "validation"), ("seen", "train"), ("unseen", "test")):
        raw = [
            ImageExample(image, condition)
            for user in USERS
            if user.user in groups[group]
            for image, condition in zip(user.images, user.conditions, strict=True)
        ]
        examples, _ = domain.encode(raw)
        assert rows_of(examples) == 5 * len(groups[group])
        with torch.no_grad():
            losses = [float(domain.losses(model, take(examples, torch.tensor([row])))) for row in range(len(raw))]
        assert result[name] == pytest.approx(np.mean(losses), rel=1e-4)


def test_held_out_users_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a user's pictures are all of one shade of grey, and without noise the model is shown them as they are
    users = [UserImages(f"user{i}", np.full((3, 16, 16), 20 * i, np.uint8), ("a", "b", "c")) for i in range(12)]
    shown: list[torch.Tensor] = []

    def watched(config: ImagePretrainConfig, **sizes: Any) -> Any:
        model = build_model(config, **sizes)

        def look(module: torch.nn.Module, _arguments: Any, inputs: dict[str, Any]) -> None:
            if module.training:
                shown.append(inputs["hidden_states"].detach().clone())

        model.register_forward_pre_hook(look, with_kwargs=True)
        return model

    monkeypatch.setattr(pretrain, "build_model", watched)
    monkeypatch.setattr(torch, "randn", lambda *shape: torch.zeros(shape))
    scheduler = pretrain.import_diffusers().DDPMScheduler
    monkeypatch.setattr(scheduler, "__init__", _almost_clean(scheduler.__init__))
    pretrained(tmp_path, users, steps=20)
    train = groups_of(users)["train"]
    assert storage.read_json(tmp_path / "pretrain.json")["trained_users"] == train
    greys = {round((float(image.mean()) + 1) * 127.5) for batch in shown for image in batch}
    assert greys == {20 * int(name.removeprefix("user")) for name in train}


def _almost_clean(original: Any) -> Any:
    def init(self: Any, **settings: Any) -> None:
        original(self, **settings)
        self.alphas_cumprod = 1 - 1e-5 * torch.arange(1, len(self.alphas_cumprod) + 1)

    return init


def test_files_and_what_reading_left_out_are_on_record(tmp_path: Path) -> None:
    file = tmp_path / "hands.npz"
    write_hands(HANDS, file)
    report = {"skipped": {"corrupt": 2}}
    pretrain_image(USERS, tmp_path / "out", replace(CONFIG, steps=1), data_files=[file], report=report)
    record = storage.read_json(tmp_path / "out" / "pretrain.json")
    assert record["data"] == {"hands.npz": storage.sha256(file)}
    assert record["read"] == report


def test_images_in_colour(tmp_path: Path) -> None:
    users = [UserImages(user.user, np.stack([user.images] * 3, axis=-1), user.conditions) for user in USERS]
    pretrained(tmp_path, users, steps=1)
    domain = ImageDomain.build(str(tmp_path))
    assert domain.channels == 3
    domain.check(Backbone.load(tmp_path))


def test_a_second_run_is_equal(unbroken: Result, tmp_path: Path) -> None:
    out, result = unbroken
    torch.manual_seed(1234)  # a run owes nothing to what its process did before
    assert pretrained(tmp_path) == result
    assert weights(tmp_path) == weights(out)
    records = [storage.read_json(folder / "pretrain.json") | {"seconds": 0} for folder in (out, tmp_path)]
    assert records[0] == records[1]


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_a_run_that_failed_goes_on_bit_for_bit(
    unbroken: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    steps = 0
    original = torch.nn.functional.mse_loss

    def counting(output: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt
        return original(output, noise)

    monkeypatch.setattr(torch.nn.functional, "mse_loss", counting)
    with pytest.raises(KeyboardInterrupt):
        pretrained(tmp_path)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    steps = 100
    assert pretrained(tmp_path) == unbroken[1]
    assert steps - 100 == CONFIG.steps - (stop - 1) // 3 * 3  # it went on from the last checkpoint
    assert weights(tmp_path) == weights(unbroken[0])


def test_another_run_is_not_overwritten(unbroken: Result) -> None:
    out, _ = unbroken
    before = weights(out)
    read_otherwise = [*USERS[:-1], UserImages(USERS[-1].user, 255 - USERS[-1].images, USERS[-1].conditions)]
    for users, settings in ((USERS, {"seed": 1}), (USERS, {"timesteps": 60}), (USERS[1:], {}), (read_otherwise, {})):
        with pytest.raises(ValueError, match="holds a run with another configuration or data"):
            pretrained(out, users, **settings)
    assert weights(out) == before


def test_loss_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "mse_loss", lambda *_: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0: lower learning_rate"):
        pretrained(tmp_path)


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    larger = UserImages("larger", np.zeros((1, 20, 20), np.uint8), ("character-000",))
    with pytest.raises(ValueError, match=r"images of shapes \[\(16, 16\), \(20, 20\)\], expected one shape"):
        pretrained(tmp_path / "shapes", [*USERS, larger])
    with pytest.raises(ValueError, match=r"images of shapes \[\], expected one shape"):
        pretrained(tmp_path / "none", [])
    wide = [UserImages(user.user, user.images[:, :8], user.conditions) for user in USERS]
    with pytest.raises(ValueError, match=r"an image of uint8 \(8, 16\), the backbone needs uint8 \(8, 8\)"):
        pretrained(tmp_path / "wide", wide)
    with pytest.raises(ValueError, match="patch=5: expected a divisor of the images' size, 16"):
        pretrained(tmp_path / "patch", patch=5)
    with pytest.raises(DataError, match="2 users are too few"):
        pretrained(tmp_path / "few", USERS[:2])
    assert not any(tmp_path.iterdir())  # a refused attempt claims no folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"patch": 0}, "patch=0: expected a positive integer"),
        ({"timesteps": -1}, "timesteps=-1"),
        ({"width": 10, "heads": 4}, "width=10: expected a multiple of heads=4"),
        ({"validation": 0.0}, "validation=0.0"),
        ({"test": math.nan}, "test=nan"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImagePretrainConfig(**settings)


def test_it_learns(tmp_path: Path) -> None:
    """An untrained DiT predicts no noise at all; a trained one does better on people whom it has not seen."""
    users = writers(replace(HANDS, users=40, per_user=8))
    config = replace(CONFIG, batch_size=32, width=32, layers=2, learning_rate=3e-3)
    result = {steps: pretrain_image(users, tmp_path / str(steps), replace(config, steps=steps)) for steps in (1, 200)}
    assert result[200]["unseen"] < 0.25 * result[1]["unseen"]
