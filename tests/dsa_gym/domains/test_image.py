"""Images: fixed draws, the loss of DDPM, a context without the clean image, and drawing images."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsa_gym.backbone import SHIPPED, Backbone
from dsa_gym.domains import Examples, rows_of, take
from dsa_gym.domains.image import BANK, PREDICTIONS, ImageDomain, ImageExample
from dsa_gym.model import AdaptedModel
from dsa_gym.pathways import ActiveAdapters, AdapterShape

CONDITIONS = ["circle", "square", "star", "moon"]
SIZE = 16
_CONFIG: dict[str, Any] = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=1,
    num_layers=2,
    sample_size=SIZE,
    patch_size=4,
    num_embeds_ada_norm=5,
)
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Makes a folder with a small random DiT; arguments change its configuration, ``schedule`` that of its noise."""

    def make(schedule: dict[str, Any] | None = None, conditions: Any = CONDITIONS, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("dit")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = diffusers.DiTTransformer2DModel(**_CONFIG | changes)
            for parameter in model.parameters():
                # larger than the initial values, so that hidden states, and so adapters, move the output
                nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(folder)
        diffusers.DDPMScheduler(**schedule or {}).save_pretrained(folder)
        (folder / "conditions.json").write_text(json.dumps(conditions))
        return folder

    return make


@pytest.fixture(scope="module")
def folder(write: Write) -> Path:
    return write()


@pytest.fixture(scope="module")
def domain(folder: Path) -> ImageDomain:
    return ImageDomain.build(str(folder))


@pytest.fixture
def adapted(folder: Path, domain: ImageDomain) -> AdaptedModel:
    """An adapted model with four sites, rank 4 in two pathways, and no dropout."""
    backbone = Backbone.load(folder)
    return AdaptedModel(backbone, domain, AdapterShape(backbone.sites, rank=4, pathways=2, dropout=0.0))


def draw(count: int, *, channels: int = 1, seed: int = 0) -> list[ImageExample]:
    """Random images with known conditions."""
    rng = np.random.default_rng(seed)
    shape = (SIZE, SIZE) if channels == 1 else (SIZE, SIZE, channels)
    return [
        ImageExample(rng.integers(0, 256, shape, dtype=np.uint8), CONDITIONS[rng.integers(4)]) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def examples(domain: ImageDomain) -> Examples:
    return domain.encode(draw(6))[0]


def random_phi(model: AdaptedModel, users: int) -> Tensor:
    return torch.randn(users, model.shape.size, generator=torch.Generator().manual_seed(0)) * 0.3


def reference_losses(domain: ImageDomain, model: nn.Module, examples: Examples) -> Tensor:
    """The loss of every draw (rows, draws), one at a time, in float64 apart from the model."""
    betas = np.linspace(0.0001, 0.02, 1000)
    kept = np.cumprod(1 - betas)
    bank = np.random.RandomState(domain.seed).standard_normal((1024, domain.channels, SIZE, SIZE))
    losses = torch.zeros(rows_of(examples), domain.draws, dtype=torch.float64)
    for row in range(rows_of(examples)):
        clean = examples["image"][row].numpy() / 127.5 - 1
        for j in range(domain.draws):
            t, noise = int(examples["timestep"][row, j]), bank[examples["noise"][row, j]]
            noised = torch.from_numpy(np.sqrt(kept[t]) * clean + np.sqrt(1 - kept[t]) * noise).float()[None]
            label = examples["label"][row : row + 1].long()
            with torch.no_grad():
                predicted = model(noised, timestep=torch.tensor([t]), class_labels=label).sample
            output = predicted[0, : domain.channels].double().numpy()
            signal, sigma = np.sqrt(kept[t]), np.sqrt(1 - kept[t])
            image = {
                "epsilon": (noised[0].double().numpy() - sigma * output) / signal,
                "sample": output,
                "v_prediction": signal * noised[0].double().numpy() - sigma * output,
            }[domain.scheduler.config.prediction_type]
            error = (image - clean).reshape(domain.channels, SIZE // domain.scale, domain.scale, -1, domain.scale)
            losses[row, j] = np.mean(error.mean((2, 4)) ** 2)
    return losses


def test_encode(domain: ImageDomain) -> None:
    raw = draw(5)
    raw[1] = raw[1]._replace(condition="dragon")
    examples, kept = domain.encode(raw)
    assert kept.tolist() == [0, 2, 3, 4]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in examples.items()} == {
        "image": (torch.uint8, (4, 1, SIZE, SIZE)),
        "label": (torch.int32, (4,)),
        "timestep": (torch.int16, (4, 2)),
        "noise": (torch.int16, (4, 2)),
    }
    for row, index in enumerate(kept.tolist()):
        assert np.array_equal(examples["image"][row, 0].numpy(), raw[index].image)
        shown = domain.describe(examples, row)
        assert list(shown) == ["condition", "image"]
        assert shown["condition"] == raw[index].condition == CONDITIONS[examples["label"][row]]
        assert np.array_equal(shown["image"], raw[index].image)


def test_encode_nothing(domain: ImageDomain) -> None:
    for raw in ([], [ImageExample(np.zeros((SIZE, SIZE), np.uint8), "dragon")]):
        examples, kept = domain.encode(raw)
        assert kept.shape == (0,) and examples["image"].shape == (0, 1, SIZE, SIZE)
        assert examples["timestep"].shape == examples["noise"].shape == (0, 2)


@given(order=st.permutations(range(5)))
def test_draws_do_not_depend_on_the_place(domain: ImageDomain, order: list[int]) -> None:
    raw = draw(5)
    examples, _ = domain.encode(raw)
    permuted, _ = domain.encode([raw[i] for i in order])
    for name, value in take(examples, torch.tensor(order)).items():
        assert torch.equal(permuted[name], value)


def test_draws_depend_on_image_condition_and_seed(domain: ImageDomain) -> None:
    image, condition = ImageExample(np.zeros((SIZE, SIZE), np.uint8), "star")
    other = image.copy()
    other[3, 4] = 1
    drawn = [
        domain.encode([ImageExample(*example)])[0]
        for example in ((image, condition), (other, condition), (image, "moon"))
    ]
    reseeded = ImageDomain(domain.scheduler, CONDITIONS, channels=1, size=SIZE, seed=1)
    drawn.append(reseeded.encode([ImageExample(image, condition)])[0])
    assert len({tuple(e["timestep"][0].tolist() + e["noise"][0].tolist()) for e in drawn}) == 4
    assert not torch.equal(domain.noise_bank, reseeded.noise_bank)


def test_draws_are_what_they_were(domain: ImageDomain) -> None:
    """Bundles store indices: another draw, or other noise behind an index, would change what they measured."""
    image = (np.arange(SIZE * SIZE, dtype=np.uint8)).reshape(SIZE, SIZE)
    examples, _ = domain.encode([ImageExample(image, "star")])
    assert (examples["timestep"].tolist(), examples["noise"].tolist()) == ([[604, 888]], [[189, 142]])
    torch.testing.assert_close(domain.noise_bank[0, 0, 0, :3], torch.tensor([1.7640524, 0.4001572, 0.978738]))


@given(draws=st.sampled_from([2, 4, 6]), timesteps=st.integers(6, 1000), seed=st.integers(0, 2**32 - 1))
def test_timesteps_are_stratified(draws: int, timesteps: int, seed: int) -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=timesteps)
    domain = ImageDomain(scheduler, CONDITIONS, channels=1, size=SIZE, draws=draws, levels=(0, 1), seed=seed)
    examples, _ = domain.encode(draw(3, seed=seed))
    part = torch.arange(draws)
    assert (examples["timestep"] >= part * timesteps // draws).all()
    assert (examples["timestep"] < (part + 1) * timesteps // draws).all()
    assert ((examples["noise"] >= 0) & (examples["noise"] < BANK)).all()


def test_draws_cover_the_levels_and_the_bank(domain: ImageDomain) -> None:
    examples, _ = domain.encode(draw(400))
    for j in range(2):
        # 400 uniform draws from 175: the mean is within four standard errors
        assert abs(float(examples["timestep"][:, j].double().mean()) - (687 + 175 * j)) < 4 * 50.5 / 20
    assert len(examples["noise"].unique()) > 400


def predicting(folder: Path, what: str) -> Path:
    """The backbone in a folder as one that predicts something else."""
    file = folder / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": what}))
    return folder


@pytest.mark.parametrize("what", PREDICTIONS)
@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize(
    ("changes", "draws"), [({}, 2), ({}, 4), ({"out_channels": 2}, 2), ({"in_channels": 3, "out_channels": 6}, 2)]
)
def test_losses_are_the_mean_squared_error_of_the_image(
    write: Write, changes: dict[str, Any], draws: int, scale: int, what: str
) -> None:
    folder = predicting(write(**changes), what)
    domain = ImageDomain.build(str(folder), draws=draws, scale=scale)
    backbone = Backbone.load(folder)
    domain.check(backbone)
    examples, _ = domain.encode(draw(4, channels=changes.get("in_channels", 1)))
    with torch.no_grad():
        losses = domain.losses(backbone.model, examples)
        parts = domain.losses(backbone.model, examples, parts=True)
    expected = reference_losses(domain, backbone.model, examples)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected.mean(1), rtol=1e-4, atol=1e-5)
    shares = torch.stack([expected[:, 0::2].sum(1), expected[:, 1::2].sum(1)], dim=1) / draws
    torch.testing.assert_close(parts.double(), shares, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.sum(1), losses)
    assert torch.equal(losses, domain.losses(backbone.model, examples))  # no label is dropped


def test_losses_of_a_model_in_half_precision(folder: Path, domain: ImageDomain, examples: Examples) -> None:
    full, half = Backbone.load(folder), Backbone.load(folder, dtype=torch.bfloat16)
    losses = domain.losses(half.model, examples)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, domain.losses(full.model, examples), rtol=0.05, atol=0.05)


def test_two_users_in_one_batch(adapted: AdaptedModel, examples: Examples) -> None:
    phi = random_phi(adapted, 2)
    mask = torch.randint(0, 2, (6, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    together = adapted.losses(examples, phi, mask)
    for user in range(2):
        rows = torch.arange(3 * user, 3 * user + 3)
        alone = adapted.losses(take(examples, rows), phi[[user]], mask[rows])
        torch.testing.assert_close(together[rows], alone)
        for row in rows:
            one = adapted.losses(take(examples, row[None]), phi[[user]], mask[row[None]])
            torch.testing.assert_close(together[row], one[0])
    assert not torch.allclose(together, adapted.losses(examples, phi.flip(0), mask))
    assert not torch.allclose(together, adapted.losses(examples, None))


def test_masks_of_parameters_are_masks_of_components(adapted: AdaptedModel, examples: Examples) -> None:
    phi = random_phi(adapted, 2)
    gates = torch.randint(0, 2, (6, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    expanded = gates.flatten(1)[:, adapted.shape.component_of()]
    torch.testing.assert_close(adapted.losses(examples, phi, gates), adapted.losses(examples, phi, expanded))


def test_losses_have_second_derivatives(folder: Path, domain: ImageDomain, examples: Examples) -> None:
    backbone = Backbone.load(folder, layers=[0], kinds=["attention"])
    model = AdaptedModel(backbone, domain, AdapterShape(backbone.sites, rank=4, pathways=2, dropout=0.0))
    model.features(examples, context=True)  # in inference mode: what the domain keeps must not spoil gradients
    start = random_phi(model, 2)
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    # W_up moves the kinks of the ReLUs, at which differences are no derivatives
    direction[:, : model.shape.half] = 0.0

    def slope(at: Tensor, create_graph: bool = False) -> Tensor:
        gradient = torch.autograd.grad(model.losses(examples, at).sum(), at, create_graph=create_graph)[0]
        return (gradient * direction).sum()

    with sdpa_kernel(SDPBackend.MATH):
        phi = start.clone().requires_grad_()
        curvature = (torch.autograd.grad(slope(phi, create_graph=True), phi)[0] * direction).sum()
        around = [slope((start + step * direction).requires_grad_()) for step in (1e-2, -1e-2)]
    assert curvature.abs() > 0.1
    torch.testing.assert_close(curvature, (around[0] - around[1]) / 2e-2, rtol=0.01, atol=0.01)


def test_features(adapted: AdaptedModel, examples: Examples) -> None:
    whole, context = adapted.features(examples, context=False), adapted.features(examples, context=True)
    assert whole.shape == (6, 4 * 16 + 49) and context.shape == (6, 2 * 16)
    assert whole.dtype == context.dtype == torch.float32
    assert torch.isfinite(whole).all() and torch.isfinite(context).all()
    for value, kind in ((whole, False), (context, True)):
        rows = torch.tensor([4, 1])
        torch.testing.assert_close(
            adapted.features(take(examples, rows), context=kind), value[rows], rtol=1e-4, atol=1e-3
        )
    model: Any = adapted.backbone.model
    states = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda _m, _i, output: states.append(output))
    clean = examples["image"] / 127.5 - 1
    with torch.no_grad():
        model(clean, timestep=torch.full((6,), 50), class_labels=examples["label"].long())
    expected = [state.mean(1) for state in states] + [state.std(1, correction=0) for state in states]
    torch.testing.assert_close(whole[:, :64], torch.cat(expected, dim=1))
    # what the image is more than one step makes of pure noise, in 7 x 7 blocks
    last = torch.full((6,), 999)
    noise, alpha = adapted.domain.noise_bank[:1].expand(6, -1, -1, -1), adapted.domain.alphas[999]
    with torch.no_grad():
        predicted = model(noise, timestep=last, class_labels=examples["label"].long()).sample
    unusual = clean - (noise - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
    blocks = torch.stack([nn.functional.adaptive_avg_pool2d(image, 7).flatten() for image in unusual])
    torch.testing.assert_close(whole[:, 64:], 3 * blocks, rtol=1e-4, atol=1e-3)


def test_features_leave_no_hooks(adapted: AdaptedModel, examples: Examples) -> None:
    blocks = adapted.backbone.model.get_submodule("transformer_blocks")
    before = [len(block._forward_hooks) for block in blocks.children()]
    adapted.features(examples, context=True)
    with pytest.raises(IndexError):
        adapted.features(examples | {"label": torch.full((6,), 99, dtype=torch.int32)}, context=False)
    assert [len(block._forward_hooks) for block in blocks.children()] == before


def test_the_context_does_not_know_the_clean_image(folder: Path, adapted: AdaptedModel, examples: Examples) -> None:
    """Another clean image under the noise that makes the same noised image of it has the same context."""
    domain = ImageDomain.build(str(folder))
    other = {name: value.clone() for name, value in examples.items()}
    other["image"] = 255 - other["image"]
    other["noise"][:, 1] = torch.arange(6) + 7
    alphas = domain.alphas[examples["timestep"][:, 1].long()][:, None, None, None]
    shift = alphas.sqrt() * (examples["image"].float() - other["image"].float()) / 127.5
    before = domain.noise_bank[examples["noise"][:, 1].long()]
    domain.noise_bank[7:13] = before + shift / (1 - alphas).sqrt()
    # what only the other draws know does not enter either
    other["timestep"][:, 0], other["noise"][:, 0] = 1, 2
    model = adapted.backbone.model
    known = adapted.features(examples, context=True)
    with torch.no_grad():
        torch.testing.assert_close(domain.features(model, other, context=True), known, rtol=1e-4, atol=1e-5)
        changed = domain.features(model, other | {"noise": examples["noise"]}, context=True)
        relabelled = domain.features(model, examples | {"label": (examples["label"] + 1) % 4}, context=True)
        whole = domain.features(model, other, context=False)
    for value in (changed, relabelled):
        assert ((value - known).abs().amax(1) > 2e-3).all()
    assert ((whole - adapted.features(examples, context=False)).abs().amax(1) > 1e-2).all()


class Oracle(nn.Module):
    """A model that returns given noise."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = nn.Parameter(noise)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        assert hidden_states.shape == self.noise.shape
        return (self.noise,)


def test_psnr(domain: ImageDomain, examples: Examples) -> None:
    noise = domain.noise_bank[examples["noise"][:, -1].long()]
    perfect = domain.metric(Oracle(noise), "psnr", examples)
    assert perfect.shape == (6,) and (perfect > 45).all() and (perfect <= 59).all()
    # an error of the noise is one of the estimate, larger by sqrt((1 - abar) / abar), where nothing is clipped
    grey = examples | {"image": torch.full_like(examples["image"], 127), "timestep": torch.full((6, 2), 400).short()}
    alpha = domain.alphas[400]
    expected = 10 * torch.log10(4 / (0.1**2 * (1 - alpha) / alpha))
    torch.testing.assert_close(domain.metric(Oracle(noise + 0.1), "psnr", grey), expected.expand(6), rtol=1e-3, atol=0)
    assert not domain.metric(Oracle(noise), "psnr", grey).requires_grad
    with pytest.raises(ValueError, match="metric='fid': expected one of psnr"):
        domain.metric(Oracle(noise), "fid", examples)


@pytest.mark.parametrize("channels", [1, 3])
def test_outcome(write: Write, channels: int) -> None:
    domain = ImageDomain.build(str(write(in_channels=channels)))
    raw = draw(1, channels=channels)
    example, _ = domain.encode(raw)
    noise = domain.noise_bank[example["noise"][:, -1].long()]
    shown = domain.outcome(Oracle(noise), example)
    assert list(shown) == ["noised", "denoised"]
    for picture in shown.values():
        assert isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape == raw[0].image.shape
    assert np.abs(shown["denoised"].astype(int) - raw[0].image).max() <= 1  # type: ignore[union-attr]
    assert np.abs(shown["noised"].astype(int) - raw[0].image).mean() > 20  # type: ignore[union-attr]
    assert np.array_equal(domain.describe(example, 0)["image"], raw[0].image)


def test_generate(adapted: AdaptedModel, domain: ImageDomain, generator: torch.Generator) -> None:
    labels, noise = torch.tensor([0, 3, 1, 1]), torch.randn(4, 1, SIZE, SIZE, generator=generator)
    phi = random_phi(adapted, 2)

    def generate(rows: slice, phi: Tensor | None, **settings: Any) -> Tensor:
        with adapted.backbone.adapted(None if phi is None else ActiveAdapters(adapted.shape, phi)) as model:
            return domain.generate(model, labels[rows], noise[rows], steps=5, **settings)

    everything = slice(None)
    images = generate(everything, phi)
    assert images.dtype == torch.uint8 and images.shape == (4, 1, SIZE, SIZE)
    assert torch.equal(images, generate(everything, phi))
    bare = generate(everything, None)
    assert not torch.equal(images, bare)
    for guidance in (1.0, 2.5):
        together = generate(everything, phi, guidance=guidance).int()
        for user in range(2):
            rows = slice(2 * user, 2 * user + 2)
            alone = generate(rows, phi[[user]], guidance=guidance).int()
            assert (together[rows] - alone).abs().max() <= 1  # rounding to bytes
    assert not torch.equal(bare, generate(everything, None, guidance=2.5))
    # without a weight on the condition, it does not matter
    blind = generate(everything, None, guidance=0.0)
    labels = labels.flip(0)
    assert torch.equal(blind, generate(everything, None, guidance=0.0))
    assert not torch.equal(bare, generate(everything, None))


@pytest.mark.parametrize("what", PREDICTIONS)
def test_generate_inverts_the_noise(write: Write, what: str) -> None:
    """A model that knows the image arrives at it."""
    domain = ImageDomain.build(str(predicting(write(), what)))
    clean = torch.from_numpy(np.stack([example.image for example in draw(3)]))[:, None]
    noise = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    class Ideal(Oracle):
        """Knows the clean image, and so the noise that is in a noised one."""

        def forward(self, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:  # type: ignore[override]
            alphas, clean = domain.alphas[timestep][:, None, None, None], self.noise
            noise = (hidden_states - alphas.sqrt() * clean) / (1 - alphas).sqrt()
            velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * clean
            return ({"epsilon": noise, "sample": clean, "v_prediction": velocity}[what],)

    images = domain.generate(Ideal(clean / 127.5 - 1), torch.zeros(3).long(), noise, steps=10)
    assert (images.int() - clean.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("labels", "shape", "steps", "message"),
    [
        ([0, 1], (1, 1, SIZE, SIZE), 5, r"noise: \(1, 1, 16, 16\) for 2 labels, expected \(2, 1, 16, 16\)"),
        ([0], (1, 3, SIZE, SIZE), 5, "noise: "),
        ([4], (1, 1, SIZE, SIZE), 5, r"labels=\[4\]: expected class labels from 0 to 3"),
        ([-1], (1, 1, SIZE, SIZE), 5, "labels="),
        ([0], (1, 1, SIZE, SIZE), 0, "steps=0: expected 1 to the 1000 timesteps"),
        ([0], (1, 1, SIZE, SIZE), 1001, "steps=1001"),
    ],
)
def test_generate_refuses(
    domain: ImageDomain, labels: list[int], shape: tuple[int, ...], steps: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        domain.generate(Oracle(torch.zeros(1)), torch.tensor(labels), torch.zeros(shape), steps=steps)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((15, 16), np.uint8), r"example 1: an image of uint8 \(15, 16\), the backbone needs uint8 \(16, 16\)"),
        (np.zeros((16, 16, 3), np.uint8), r"example 1: .*\(16, 16, 3\)"),
        (np.zeros((16, 16, 1), np.uint8), r"example 1: .*\(16, 16, 1\)"),
        (np.zeros((16, 16), np.float32), "example 1: an image of float32"),
    ],
)
def test_images_of_another_shape_are_refused(domain: ImageDomain, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        domain.encode([*draw(1), ImageExample(image, "dragon")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0}, "draws=0: expected an even number from 2 to the 1000 timesteps"),
        ({"draws": 3}, "draws=3"),
        ({"draws": 1002}, "draws=1002"),
        ({"scale": 0}, "scale=0: expected a divisor of the images' size, 16"),
        ({"scale": 5}, "scale=5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_settings_out_of_range(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDomain.build(str(folder), **settings)


def test_settings_make_the_domain_again(folder: Path) -> None:
    domain = ImageDomain.build(str(folder), draws=4, scale=2, seed=9)
    again = ImageDomain.build(str(folder), **json.loads(json.dumps(domain.settings())))
    assert (again.draws, again.scale, again.seed, again.conditions) == (4, 2, 9, tuple(CONDITIONS))
    first, second = (each.encode(draw(3))[0] for each in (domain, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["config.json", "conditions.json", "scheduler_config.json"])
@pytest.mark.parametrize("content", [None, "{", "7", '["circle", "circle"]', '["circle", 3]', "[]"])
def test_damaged_files(write: Write, name: str, content: str | None) -> None:
    folder = write()
    (folder / name).unlink()
    if content:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name if content else rf"has no {name}; the image domain needs a folder"):
        ImageDomain.build(str(folder))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"prediction_type": "flow"}, "prediction_type='flow': expected one of epsilon, sample, v_prediction"),
        ({"rescale_betas_zero_snr": True, "beta_end": 1.0}, "each with some image and some noise"),
        ({"num_train_timesteps": 2**15 + 1, "beta_start": 1e-9, "beta_end": 1e-5}, "at most 32,768 timesteps"),
    ],
)
def test_schedules_that_do_not_fit(write: Write, schedule: dict[str, Any], message: str) -> None:
    folder = write()
    file = folder / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | schedule))
    with pytest.raises(ValueError, match=message):
        ImageDomain.build(str(folder))


def test_latent_models_are_refused(write: Write) -> None:
    with pytest.raises(ValueError, match=r"config.json: in_channels=4, sample_size=16; expected a model of pixels"):
        ImageDomain.build(str(write(in_channels=4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 3}, r"its images have \(channels, size\)=\(3, 16\), those of the domain \(1, 16\)"),
        ({"sample_size": 32}, r"\(1, 32\), those of the domain"),
        ({"out_channels": 4}, "out_channels=4; expected 1, or 2 if it predicts a variance too"),
        ({"num_embeds_ada_norm": 3}, "it has 3 classes, expected one for each of the 4 conditions"),
    ],
)
def test_check_refuses_a_dit_that_does_not_fit(
    domain: ImageDomain, write: Write, changes: dict[str, Any], message: str
) -> None:
    backbone = Backbone.load(write(**changes))
    with pytest.raises(ValueError, match=f"backbone=.*{message}"):
        domain.check(backbone)


def test_check_refuses_other_models(domain: ImageDomain, backbone_folder: Path) -> None:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, sample_size=8
    )
    for backbone, kind in (
        (Backbone(model, source="a-folder"), "PixArtTransformer2DModel"),
        (Backbone.load(backbone_folder), "GPT2LMHeadModel"),
    ):
        with pytest.raises(ValueError, match=f"backbone=.*{kind} cannot serve the image domain; expected a class-con"):
            domain.check(backbone)
    if SHIPPED["dsa-text"].is_dir():
        with pytest.raises(ValueError, match=r"has no conditions\.json; the image domain needs a folder"):
            ImageDomain.build("dsa-text")


def test_without_diffusers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'pip install "dsa-gym\[image\]"'):
        ImageDomain.build(str(folder))
