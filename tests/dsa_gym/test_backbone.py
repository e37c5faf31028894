"""Backbones: sites of every architecture, adapters that change nothing when off, loading and its errors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsa_gym.backbone import KINDS, SHIPPED, Backbone, find_sites, load_tokenizer
from dsa_gym.pathways import ActiveAdapters, AdapterShape

LAYERS = 3
_BASE = dict(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)
_GROUPED = dict(_BASE, num_key_value_heads=1, head_dim=8)
_GPT2 = dict(vocab_size=61, n_positions=32, n_embd=16, n_layer=LAYERS, n_head=2, bos_token_id=0, eos_token_id=0)
_OPT = dict(
    vocab_size=61,
    hidden_size=16,
    word_embed_proj_dim=16,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=32,
)

# name -> (configuration, path of the blocks, module after attention, module after feed-forward)
ARCHITECTURES: dict[str, tuple[Any, str, str, str]] = {
    "gpt2": (hf.GPT2Config(**_GPT2), "transformer.h", "attn", "mlp"),
    "gpt-neox": (hf.GPTNeoXConfig(**_BASE), "gpt_neox.layers", "attention", "mlp"),
    "opt": (hf.OPTConfig(**_OPT), "model.decoder.layers", "self_attn", "fc2"),
    "llama": (hf.LlamaConfig(**_GROUPED), "model.layers", "self_attn", "mlp"),
    "mistral": (hf.MistralConfig(**_GROUPED), "model.layers", "self_attn", "mlp"),
    "qwen2": (hf.Qwen2Config(**_BASE, num_key_value_heads=1), "model.layers", "self_attn", "mlp"),
    "qwen3": (hf.Qwen3Config(**_GROUPED), "model.layers", "self_attn", "mlp"),
    "gemma": (hf.GemmaConfig(**_GROUPED), "model.layers", "self_attn", "mlp"),
    "gemma2": (
        hf.Gemma2Config(**_GROUPED),
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "gemma3": (
        hf.Gemma3TextConfig(**_GROUPED),
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "bert": (hf.BertConfig(**_BASE), "bert.encoder.layer", "attention.output.dense", "output.dense"),
    "roberta": (hf.RobertaConfig(**_BASE), "roberta.encoder.layer", "attention.output.dense", "output.dense"),
}


def build(name: str) -> nn.Module:
    """A small random model of an architecture."""
    auto = hf.AutoModelForMaskedLM if name in ("bert", "roberta") else hf.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(ARCHITECTURES[name][0]).eval()


def random_phi(shape: AdapterShape, users: int, seed: int = 0) -> Tensor:
    """Parameters (users, P) that change something at every site."""
    return torch.randn(users, shape.size, generator=torch.Generator().manual_seed(seed)) * 0.3


@torch.no_grad()
def logits(backbone: Backbone, adapters: ActiveAdapters | None) -> Tensor:
    tokens = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(1))
    with backbone.adapted(adapters) as model:
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_are_in_order_of_execution(name: str) -> None:
    _, path, attention, feed_forward = ARCHITECTURES[name]
    backbone = Backbone(build(name))
    expected = [
        (f"{path}.{layer}.{module}", layer, kind, 16)
        for layer in range(LAYERS)
        for kind, module in zip(KINDS, (attention, feed_forward), strict=True)
    ]
    assert [(s.module, s.layer, s.kind, s.width) for s in backbone.sites] == expected
    executed: list[str] = []
    for site in backbone.sites:
        module = backbone.model.get_submodule(site.module)
        module.register_forward_hook(lambda *_, name=site.module: executed.append(name))
    logits(backbone, None)
    assert executed == [site.module for site in backbone.sites]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_that_are_off_change_no_bit(name: str) -> None:
    model = build(name)
    tokens = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits
    backbone = Backbone(model)
    with torch.no_grad():  # once the activation is the fast one
        untouched = model(input_ids=tokens).logits
    torch.testing.assert_close(untouched, theirs, rtol=0, atol=1e-6)
    shape = AdapterShape(backbone.sites, rank=4, pathways=2)
    phi = random_phi(shape, 2)
    closed = phi.clone()
    closed[:, shape.half :] = 0.0
    gates = torch.zeros(4, len(shape.sites), 4)
    assert torch.equal(logits(backbone, None), untouched)
    assert torch.equal(logits(backbone, ActiveAdapters(shape, closed)), untouched)
    assert torch.equal(logits(backbone, ActiveAdapters(shape, phi, gates)), untouched)
    one = gates.clone()
    one[:, :, 1] = 1.0
    changed = logits(backbone, ActiveAdapters(shape, phi, one))
    assert not torch.equal(changed, untouched)
    assert not torch.equal(logits(backbone, ActiveAdapters(shape, phi)), changed)
    assert torch.equal(logits(backbone, None), untouched)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_site_reaches_the_logits(name: str) -> None:
    backbone = Backbone(build(name))
    shape = AdapterShape(backbone.sites, rank=16, pathways=1)
    phi = random_phi(shape, 1)
    untouched = logits(backbone, None)
    for index in range(len(shape.sites)):
        gates = torch.zeros(4, len(shape.sites), 16)
        gates[2, index] = 1.0
        changed = (logits(backbone, ActiveAdapters(shape, phi, gates)) != untouched).flatten(1).any(1)
        # the row whose gate is on, and no other
        assert changed.tolist() == [False, False, True, False]


def test_sites_add_the_adapter_before_the_residual() -> None:
    """The hidden states that the next sublayer sees are the residual stream plus the adapted output."""
    backbone = Backbone(build("llama"), layers=[0], kinds=["attention"])
    shape = AdapterShape(backbone.sites, rank=4, pathways=2)
    phi = random_phi(shape, 1)
    block = backbone.model.get_submodule("model.layers.0")
    seen: dict[str, Tensor] = {}
    block.register_forward_pre_hook(lambda _m, args: seen.__setitem__("residual", args[0]))
    attention = block.get_submodule("self_attn")
    # hooks run in the order of registration: this one sees what the adapter returned
    attention.register_forward_hook(lambda _m, _a, out: seen.__setitem__("adapted", out[0]))
    norm = block.get_submodule("post_attention_layernorm")
    norm.register_forward_pre_hook(lambda _m, args: seen.__setitem__("stream", args[0]))
    logits(backbone, None)
    plain = seen["adapted"]
    logits(backbone, ActiveAdapters(shape, phi))
    up, down = (matrix[0] for matrix in shape.matrices(phi, 0))
    torch.testing.assert_close(seen["adapted"], plain + torch.relu(plain @ up) @ down)
    torch.testing.assert_close(seen["stream"], seen["residual"] + seen["adapted"])


def test_layers_and_kinds_select_sites() -> None:
    model = build("gpt2")
    backbone = Backbone(model, layers=[-1, 0, 2], kinds=["feed_forward"])
    assert [(site.layer, site.kind) for site in backbone.sites] == [(0, "feed_forward"), (2, "feed_forward")]
    shape = AdapterShape(backbone.sites, rank=2, pathways=1)
    assert not torch.equal(logits(backbone, ActiveAdapters(shape, random_phi(shape, 1))), logits(backbone, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, "layers: 3 is out of range, the model has 3 blocks"),
        ({"layers": [-4]}, "layers: -4 is out of range"),
        ({"layers": []}, r"layers=\[\]"),
        ({"kinds": ["attention", "mlp"]}, "kinds=.*expected one or both"),
        ({"kinds": []}, "kinds=.*expected one or both"),
        ({"site_names": ("attn", "nothing")}, r"site_names=\('attn', 'nothing'\): no adapter sites"),
    ],
)
def test_what_is_not_there_cannot_be_selected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(build("gpt2"), **arguments)


class OddBlock(nn.Module):
    """A block whose modules have names that nobody uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.look, self.think = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.look(hidden)
        return hidden + self.think(hidden)


class OddModel(nn.Module):
    """An architecture that is not known."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        text = SimpleNamespace(hidden_size=width)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.embed = nn.Embedding(61, width)
        self.tower = nn.ModuleList([OddBlock(width) for _ in range(2)])

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        for block in self.tower:
            hidden = block(hidden)
        return SimpleNamespace(logits=hidden)


def test_unknown_architecture_says_how_to_name_sites() -> None:
    with pytest.raises(ValueError, match=r"'OddModel': no adapter sites found. Give site_names="):
        Backbone(OddModel())


def test_site_names_describe_an_unknown_architecture() -> None:
    torch.manual_seed(0)
    backbone = Backbone(OddModel(), site_names=("look", "think"))
    assert [site.module for site in backbone.sites] == [
        "tower.0.look",
        "tower.0.think",
        "tower.1.look",
        "tower.1.think",
    ]
    shape = AdapterShape(backbone.sites, rank=2, pathways=1)
    untouched = logits(backbone, None)
    phi = random_phi(shape, 1)
    assert not torch.equal(logits(backbone, ActiveAdapters(shape, phi)), untouched)
    assert torch.equal(logits(backbone, ActiveAdapters(shape, phi, torch.zeros(4, 4, 2))), untouched)


def test_adapters_are_removed_after_an_error() -> None:
    backbone = Backbone(build("gpt2"))
    shape = AdapterShape(backbone.sites, rank=2, pathways=1)
    untouched = logits(backbone, None)
    with pytest.raises(KeyError), backbone.adapted(ActiveAdapters(shape, random_phi(shape, 1))):
        raise KeyError
    assert torch.equal(logits(backbone, None), untouched)


def test_everything_is_frozen_and_in_eval_mode() -> None:
    backbone = Backbone(build("gpt2").train())
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())


def test_load_a_folder(backbone_folder: Path) -> None:
    backbone = Backbone.load(backbone_folder)
    assert backbone.source == str(backbone_folder)
    assert len(backbone.sites) == 4
    assert backbone.config.vocab_size == 300
    assert backbone.device.type == "cpu"
    assert Backbone.load(str(backbone_folder), layers=[1], kinds=["attention"]).sites == backbone.sites[2:3]
    assert load_tokenizer(backbone_folder).bos_token_id == 0


@pytest.mark.skipif(not SHIPPED["dsa-text"].is_dir(), reason="the shipped backbone is not made yet")
def test_load_the_shipped_backbone() -> None:
    backbone = Backbone.load("dsa-text")
    assert backbone.source == "dsa-text"
    assert len(backbone.sites) == 2 * backbone.config.num_hidden_layers
    assert load_tokenizer("dsa-text").vocab_size <= backbone.config.vocab_size


def test_load_a_masked_language_model(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path)
    assert type(backbone.model).__name__ == "BertForMaskedLM"
    assert len(backbone.sites) == 2 * LAYERS


def test_load_a_model_without_a_head(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        hf.GPT2Model(ARCHITECTURES["gpt2"][0]).save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path)
    assert type(backbone.model).__name__ == "GPT2Model"
    assert backbone.sites[0].module == "h.0.attn"


def test_load_in_half_precision(backbone_folder: Path) -> None:
    backbone = Backbone.load(backbone_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}
    shape = AdapterShape(backbone.sites, rank=2, pathways=1)
    phi = random_phi(shape, 2)
    gates = torch.zeros(4, len(shape.sites), 2)
    untouched = logits(backbone, None)
    assert untouched.dtype == torch.bfloat16
    assert torch.equal(logits(backbone, ActiveAdapters(shape, phi, gates)), untouched)
    assert not torch.equal(logits(backbone, ActiveAdapters(shape, phi, gates + 1)), untouched)


def test_the_longest_list_of_blocks_of_a_text_model_is_used() -> None:
    """Other towers of a model that has a text configuration get no sites; of two equally long the first is used."""
    sizes: dict[str, Any] = dict(
        vocab_size=61, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32
    )
    for encoder, decoder, used in ((3, 2, "encoder"), (2, 3, "decoder"), (2, 2, "encoder")):
        config = hf.BartConfig(
            **sizes, encoder_layers=encoder, decoder_layers=decoder, encoder_ffn_dim=24, decoder_ffn_dim=24
        )
        sites = find_sites(hf.BartModel(config))
        assert {site.module.split(".")[0] for site in sites} == {used}
        assert [site.layer for site in sites] == [i // 2 for i in range(2 * max(encoder, decoder))]


_TEXT = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(2))
_SMALL = dict(num_attention_heads=2, attention_head_dim=8, num_layers=LAYERS, patch_size=2, sample_size=8)
_STAGES = dict(
    sample_size=8,
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    transformer_layers_per_block=(1, 2, 1),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=12,
    attention_head_dim=4,
    norm_num_groups=4,
)
_BLOCKS = [(f"transformer_blocks.{layer}", 16) for layer in range(LAYERS)]

# name -> (class, configuration, inputs beside images and timesteps, path and width of every block)
DIFFUSION: dict[str, tuple[Any, dict[str, Any], dict[str, Any], list[tuple[str, int]]]] = {
    "dit": (
        diffusers.DiTTransformer2DModel,
        dict(_SMALL, in_channels=4, num_embeds_ada_norm=5),
        {"class_labels": torch.tensor([0, 3, 1, 4])},
        _BLOCKS,
    ),
    "pixart": (
        diffusers.PixArtTransformer2DModel,
        dict(_SMALL, in_channels=4, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False),
        {"encoder_hidden_states": _TEXT, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        _BLOCKS,
    ),
    "unet": (
        diffusers.UNet2DConditionModel,
        _STAGES,
        {"encoder_hidden_states": _TEXT},
        [
            ("down_blocks.0.attentions.0.transformer_blocks.0", 8),
            ("down_blocks.1.attentions.0.transformer_blocks.0", 16),
            ("down_blocks.1.attentions.0.transformer_blocks.1", 16),
            ("mid_block.attentions.0.transformer_blocks.0", 16),
            *((f"up_blocks.1.attentions.{i}.transformer_blocks.{j}", 16) for i in range(2) for j in range(2)),
            *((f"up_blocks.2.attentions.{i}.transformer_blocks.0", 8) for i in range(2)),
        ],
    ),
}


def build_diffusion(name: str) -> nn.Module:
    """A small random model of diffusers."""
    kind, config, _, _ = DIFFUSION[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = kind(**config)
        return model.eval()


@pytest.fixture(scope="module", params=DIFFUSION)
def diffusion(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A name of :data:`DIFFUSION` and a folder with its weights."""
    folder = tmp_path_factory.mktemp(request.param)
    build_diffusion(request.param).save_pretrained(folder)  # type: ignore[operator]
    return request.param, folder


@torch.no_grad()
def denoise(model: nn.Module, name: str, rows: slice = slice(None)) -> Tensor:
    """Output of a diffusion model for some of four images."""
    images = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))[rows]
    inputs = {
        key: value[rows] if isinstance(value, Tensor) else dict(value) for key, value in DIFFUSION[name][2].items()
    }
    output: Tensor = model(images, timestep=torch.tensor([3, 30, 300, 900])[rows], **inputs, return_dict=False)[0]
    return output


def adapted(backbone: Backbone, name: str, adapters: ActiveAdapters | None, rows: slice = slice(None)) -> Tensor:
    with backbone.adapted(adapters) as model:
        return denoise(model, name, rows)


def test_sites_of_diffusion_models_are_in_order_of_execution(diffusion: tuple[str, Path]) -> None:
    name, folder = diffusion
    backbone = Backbone.load(folder)
    assert [(site.module, site.layer, site.kind, site.width) for site in backbone.sites] == [
        (f"{path}.{module}", layer, kind, width)
        for layer, (path, width) in enumerate(DIFFUSION[name][3])
        for kind, module in zip(KINDS, ("attn1", "ff"), strict=True)
    ]
    executed: list[tuple[str, int]] = []
    for site in backbone.sites:
        backbone.model.get_submodule(site.module).register_forward_hook(
            lambda _m, _i, output, path=site.module: executed.append((path, output.shape[-1]))
        )
    adapted(backbone, name, None)
    assert executed == [(site.module, site.width) for site in backbone.sites]


def test_adapters_that_are_off_change_no_bit_of_diffusion_models(diffusion: tuple[str, Path]) -> None:
    name, folder = diffusion
    untouched = denoise(build_diffusion(name), name)
    backbone = Backbone.load(folder)
    shape = AdapterShape(backbone.sites, rank=16, pathways=2)
    phi = random_phi(shape, 2)
    closed = phi.clone()
    closed[:, shape.half :] = 0.0
    gates = torch.zeros(4, len(shape.sites), 16)
    assert torch.equal(adapted(backbone, name, None), untouched)
    assert torch.equal(adapted(backbone, name, ActiveAdapters(shape, closed)), untouched)
    assert torch.equal(adapted(backbone, name, ActiveAdapters(shape, phi, gates)), untouched)
    for index in range(len(shape.sites)):
        # every site reaches the output, in the row whose gate is on and in no other
        gates.zero_()[2, index] = 1.0
        changed = adapted(backbone, name, ActiveAdapters(shape, phi, gates)) != untouched
        assert changed.flatten(1).any(1).tolist() == [False, False, True, False]


def test_two_users_of_a_diffusion_model_in_one_batch(diffusion: tuple[str, Path]) -> None:
    name, folder = diffusion
    backbone = Backbone.load(folder)
    shape = AdapterShape(backbone.sites, rank=4, pathways=2)
    phi = random_phi(shape, 2)
    together = adapted(backbone, name, ActiveAdapters(shape, phi))
    alone = [
        adapted(backbone, name, ActiveAdapters(shape, phi[[user]]), slice(2 * user, 2 * user + 2)) for user in (0, 1)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.allclose(together[2:], adapted(backbone, name, ActiveAdapters(shape, phi[[0]]))[2:])


@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("kind", KINDS)
def test_a_diffusion_model_adds_the_gated_adapter_to_the_residual(name: str, kind: str) -> None:
    """What the first block hands on changes by the adaptive gate times what the adapter adds to its last sublayer."""
    backbone = Backbone(build_diffusion(name), layers=[0], kinds=[kind])
    shape = AdapterShape(backbone.sites, rank=4, pathways=2)
    phi = random_phi(shape, 1)
    block: Any = backbone.model.get_submodule(DIFFUSION[name][3][0][0])
    seen: dict[str, Any] = {}
    # hooks run in the order of registration: this one sees what the adapter returned
    (block.attn1 if kind == "attention" else block.ff).register_forward_hook(
        lambda _m, _i, output: seen.__setitem__("output", output)
    )
    # the residual stream after the sublayer: what the next one reads, or what the block returns
    following = {"dit": "norm3", "pixart": "attn2", "unet": "norm2"}[name]
    after = block.get_submodule(following) if kind == "attention" else block
    if after is block:
        block.register_forward_hook(lambda _m, _i, output: seen.__setitem__("stream", output))
    else:
        after.register_forward_pre_hook(lambda _m, inputs: seen.__setitem__("stream", inputs[0]))
    part = {"attention": 2, "feed_forward": 5}[kind]  # of shift, scale, gate before attention and before feed-forward
    if name == "dit":
        block.norm1.linear.register_forward_hook(
            lambda _m, _i, output: seen.__setitem__("gate", output.chunk(6, dim=1)[part][:, None])
        )
    elif name == "pixart":
        block.register_forward_pre_hook(
            lambda _m, _i, keywords: seen.__setitem__(
                "gate", (block.scale_shift_table + keywords["timestep"].view(4, 6, -1))[:, part, None]
            ),
            with_kwargs=True,
        )
    adapted(backbone, name, None)
    plain = dict(seen)
    adapted(backbone, name, ActiveAdapters(shape, phi))
    up, down = (matrix[0] for matrix in shape.matrices(phi, 0))
    change = torch.relu(plain["output"] @ up) @ down
    torch.testing.assert_close(seen["output"], plain["output"] + change)
    torch.testing.assert_close(seen["stream"] - plain["stream"], seen.get("gate", 1.0) * change, rtol=1e-4, atol=1e-5)


def test_blocks_of_a_diffusion_model_are_chosen_over_all_lists() -> None:
    backbone = Backbone(build_diffusion("unet"), layers=[-1, 2], kinds=["attention"])
    assert [(site.module, site.layer) for site in backbone.sites] == [
        ("down_blocks.1.attentions.0.transformer_blocks.1.attn1", 2),
        ("up_blocks.2.attentions.1.transformer_blocks.0.attn1", 9),
    ]
    with pytest.raises(ValueError, match="layers: 10 is out of range, the model has 10 blocks"):
        Backbone(build_diffusion("unet"), layers=[10])
    cross = find_sites(build_diffusion("unet"), site_names=("attn2", "ff"))
    assert [site.width for site in cross[::2]] == [width for _, width in DIFFUSION["unet"][3]]
    with pytest.raises(ValueError, match=r"norm1: the width of LayerNorm is not known"):
        find_sites(build_diffusion("pixart"), site_names=("norm1", "ff"))


def test_load_a_diffusion_model(diffusion: tuple[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    name, folder = diffusion
    backbone = Backbone.load(folder, dtype=torch.bfloat16)
    assert type(backbone.model) is DIFFUSION[name][0]
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}
    assert backbone.config.sample_size == 8
    assert not caplog.records  # diffusers would log that accelerate is not installed


@pytest.fixture
def dit_folder(tmp_path: Path) -> Path:
    """A folder with a DiT, to be damaged."""
    build_diffusion("dit").save_pretrained(tmp_path / "dit")  # type: ignore[operator]
    return tmp_path / "dit"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "NoSuchModel"}, "has no model 'NoSuchModel'"),
        ({"_class_name": "DDPMScheduler"}, "has no model 'DDPMScheduler'"),
        ({"_class_name": ["DiT"]}, r"has no model \['DiT'\]"),
        ({"num_layers": LAYERS + 1}, r"19 tensors of DiTTransformer2DModel are missing.*'transformer_blocks\.3\."),
        ({"attention_head_dim": 4}, "weights cannot be loaded"),
        ({"num_layers": "three"}, "weights cannot be loaded"),
        ({"patch_size": 0}, "weights cannot be loaded"),
        ({"activation_fn": "nothing"}, "weights cannot be loaded"),
        ({"norm_type": "nothing"}, "weights cannot be loaded"),
    ],
)
def test_damaged_configuration_of_a_diffusion_model(dit_folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((dit_folder / "config.json").read_text())
    (dit_folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=f"backbone=.*dit'.*{message}"):
        Backbone.load(dit_folder, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("damage", ["missing", "pickle", "truncated", "nan"])
def test_damaged_weights_of_a_diffusion_model(dit_folder: Path, damage: str) -> None:
    weights = dit_folder / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:3000])
    elif damage == "nan":
        save_file(load_file(weights) | {"proj_out_1.bias": torch.full((32,), float("nan"))}, weights)
    else:
        tensors = load_file(weights)
        weights.unlink()
        if damage == "pickle":
            torch.save(tensors, dit_folder / "diffusion_pytorch_model.bin")
    expected = "weights are not finite, first in 'proj_out_1.bias'" if damage == "nan" else "weights cannot be loaded"
    with pytest.raises(ValueError, match=expected):
        Backbone.load(dit_folder)


def test_a_diffusion_model_without_diffusers(dit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'pip install "dsa-gym\[image\]"'):
        Backbone.load(dit_folder)


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


WEIGHT = "transformer.h.1.mlp.c_fc.weight"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backbone=.*nowhere.*weights cannot be loaded.*expected 'dsa-text'"):
        Backbone.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="backbone='no-such-user/no-such-model': weights cannot be loaded"):
        Backbone.load("no-such-user/no-such-model")


def test_folder_without_weights(backbone_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(backbone_folder, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        Backbone.load(folder)


def test_truncated_weights(backbone_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(backbone_folder, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        Backbone.load(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "never-heard-of"}'])
def test_broken_configuration(backbone_folder: Path, tmp_path: Path, content: str) -> None:
    folder = copy_of(backbone_folder, tmp_path / "copy")
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        Backbone.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(backbone_folder: Path, tmp_path: Path, value: float) -> None:
    folder = copy_of(backbone_folder, tmp_path / "copy")
    rewrite(folder, lambda tensors: tensors[WEIGHT].view(-1)[3:4].fill_(value))
    with pytest.raises(ValueError, match=f"weights are not finite, first in '{WEIGHT}'"):
        Backbone.load(folder)


def test_missing_tensors_are_not_made_up(backbone_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(backbone_folder, tmp_path / "copy")
    rewrite(folder, lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(ValueError, match=f"1 tensors of GPT2LMHeadModel are missing.*'{WEIGHT}'"):
        Backbone.load(folder)


def test_mismatched_tensors_are_not_made_up(backbone_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(backbone_folder, tmp_path / "copy")
    rewrite(folder, lambda tensors: tensors.__setitem__(WEIGHT, torch.zeros(3, 64)))
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        Backbone.load(folder)


def test_more_layers_than_weights(backbone_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(backbone_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(ValueError, match=r"12 tensors of GPT2LMHeadModel are missing.*'transformer\.h\.2\."):
        Backbone.load(folder)


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_no_tokenizer(backbone_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = copy_of(backbone_folder, tmp_path / "copy")
    for path in folder.glob("*token*"):
        path.unlink()
    if damage == "broken":
        (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded.*expected tokenizer\.json"):
        load_tokenizer(folder)
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path / "nowhere")
