"""The frozen model theta: any transformer of Hugging Face's transformers or diffusers, with the places for adapters.

Sites are modules whose output is a sublayer's output just before the residual addition. They are found by the names
that the common architectures use inside a block; an architecture that is not known can be described by two names.

In a diffusion transformer with adaptive normalisation (DiT, PixArt) a gate computed from timestep and condition
multiplies a sublayer's output before it is added: ``x + gate * f(x)``. The sites are inside the gate, so an adapter's
change is gated like the output that it changes, ``x + gate * (f(x) + adapter(f(x)))``: a block that is switched off at
some timestep stays so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
)

from dsa_gym.activations import use_fast_gelu
from dsa_gym.pathways import ActiveAdapters, Site

ASSETS = Path(__file__).parent / "assets"
SHIPPED = {f"dsa-{name}": ASSETS / f"backbone-{name}" for name in ("text", "recommendation", "image")}
KINDS = ("attention", "feed_forward")

# (attention, feed-forward) modules of a block whose output is what the residual stream is about to receive. The first
# pair that a block has wins: models that normalise a sublayer's output add the normalised one.
SITE_NAMES: tuple[tuple[str, str], ...] = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # Gemma 2 and 3, OLMo 2
    ("self_attn", "mlp"),  # Llama, Mistral, Qwen2, Qwen3, Gemma
    ("attn", "mlp"),  # GPT-2
    ("attention", "mlp"),  # GPT-NeoX, Pythia
    ("self_attn", "fc2"),  # OPT
    ("attention.output.dense", "output.dense"),  # BERT, RoBERTa, ELECTRA
    ("attn1", "ff"),  # blocks of diffusers: DiT, PixArt, the U-Net of Stable Diffusion
)


class Backbone:
    """A frozen transformer with adapter sites.

    Attributes:
        model: The transformers or diffusers model: eval mode, no parameter requires a gradient, a faster tanh-GELU.
        sites: The adapter sites in order of execution.
        blocks: Paths of the blocks that could have sites, in order of execution.
        source: What it was loaded from.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: str = "",
        layers: Sequence[int] | None = None,
        kinds: Sequence[str] = KINDS,
        site_names: tuple[str, str] | None = None,
    ) -> None:
        """Freeze ``model`` and attach (dormant) hooks to its sites; see :meth:`load` for the arguments.

        Raises:
            ValueError: If no site is found, or ``layers``, ``kinds`` or ``site_names`` name what is not there.
        """
        use_fast_gelu(model)
        self.model = model.eval().requires_grad_(False)
        self.source = source
        self.sites = find_sites(model, layers=layers, kinds=kinds, site_names=site_names)
        self.blocks = tuple(path for path, _ in _blocks(model, (site_names,) if site_names else SITE_NAMES))
        self._active: ActiveAdapters | None = None
        for index, site in enumerate(self.sites):
            model.get_submodule(site.module).register_forward_hook(self._hook(index))

    @classmethod
    def load(
        cls,
        source: str | Path = "dsa-text",
        *,
        layers: Sequence[int] | None = None,
        kinds: Sequence[str] = KINDS,
        site_names: tuple[str, str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Backbone:
        """Load a frozen backbone.

        Args:
            source: ``"dsa-text"`` (shipped), a folder, or a Hugging Face Hub id; of a transformers model or of a
                diffusers model (one with ``_class_name`` in its config.json, such as DiT; no pipeline).
            layers: Blocks that get sites, numbered in order of execution; None for all. Negative indices count from
                the end.
            kinds: ``"attention"``, ``"feed_forward"`` or both.
            site_names: For an architecture that is not known: the names, inside a block, of the modules whose outputs
                are added to the residual stream after attention and after feed-forward.
            device: Where to put the model.
            dtype: Floating-point type of the weights.

        Raises:
            ValueError: If the source cannot be loaded, its weights are incomplete or not finite, or sites are not
                found.
        """
        path = resolve_source(source)
        with _loading(source):
            config, _ = PretrainedConfig.get_config_dict(path)
        diffusers = import_diffusers() if "_class_name" in config else None
        with _loading(source):
            if diffusers:
                model, loading = _read_diffusers(diffusers, config["_class_name"], path, dtype)
            else:
                model, loading = _auto_class(path).from_pretrained(path, dtype=dtype, output_loading_info=True)
        # from_pretrained fills what a checkpoint lacks with random numbers; a pooler is on no path that is used here
        absent = sorted(str(name) for name in loading["missing_keys"] if "pooler." not in str(name))
        if absent:
            raise ValueError(
                f"backbone={str(source)!r}: {len(absent)} tensors of {type(model).__name__} are missing, "
                f"first {absent[0]!r}; expected a complete checkpoint"
            )
        broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            raise ValueError(f"backbone={str(source)!r}: weights are not finite, first in {broken[0]!r}")
        return cls(model.to(device), source=str(source), layers=layers, kinds=kinds, site_names=site_names)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def config(self) -> Any:
        """The configuration of the model; of the text model, where transformers has several in one."""
        config: Any = self.model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @contextmanager
    def adapted(self, adapters: ActiveAdapters | None) -> Iterator[nn.Module]:
        """Give the model with ``adapters`` applied at the sites; None gives the untouched model."""
        previous, self._active = self._active, adapters
        try:
            yield self.model
        finally:
            self._active = previous

    def _hook(self, index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> Any:
            if self._active is None:
                return None
            if isinstance(output, tuple):
                return (self._active(output[0], index), *output[1:])
            return self._active(output, index)

        return hook


class ReachedError(Exception):
    """Raised by a hook or a stub to leave a forward: what comes after it is not needed."""


@contextmanager
def standing_in(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Call ``forwards`` in the place of the modules' own; their hooks are called as ever."""
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def resolve_source(source: str | Path) -> str:
    """Turn a shipped name, a folder or a Hub id into what Hugging Face loads."""
    return str(SHIPPED.get(str(source), source))


def import_diffusers() -> Any:
    """Import diffusers, which only image models need.

    Raises:
        ValueError: If it is not installed; the message says how to install it.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError('diffusers cannot be imported; image models need it: pip install "dsa-gym[image]"') from error
    return diffusers


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer that belongs to a backbone.

    Raises:
        ValueError: If there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_source(source))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"backbone={str(source)!r}: no tokenizer can be loaded ({_first_line(error)}); expected tokenizer.json "
            "beside the weights"
        ) from error
    # without files, some architectures get a tokenizer that knows special tokens only
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(
            f"backbone={str(source)!r}: no tokenizer can be loaded (its vocabulary is empty); expected tokenizer.json "
            "beside the weights"
        )
    return tokenizer


def find_sites(
    model: nn.Module,
    *,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] = KINDS,
    site_names: tuple[str, str] | None = None,
) -> tuple[Site, ...]:
    """Find the adapter sites of a transformer, see :class:`Backbone`.

    Raises:
        ValueError: If the architecture is unknown, or ``layers`` or ``kinds`` do not fit it.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds={tuple(kinds)!r}: expected one or both of {KINDS}")
    blocks = _blocks(model, (site_names,) if site_names else SITE_NAMES)
    if not blocks:
        asked = f"site_names={site_names!r}" if site_names else f"architecture {type(model).__name__!r}"
        raise ValueError(
            f"{asked}: no adapter sites found. Give site_names=(attention, feed_forward), the names of the modules "
            "inside a transformer block whose outputs are added to the residual stream, e.g. ('self_attn', 'mlp')"
        )
    if layers is not None and not len(layers):
        raise ValueError("layers=[]: expected at least one block, or None for all")
    count = len(blocks)
    chosen = range(count) if layers is None else [_layer_index(layer, count) for layer in layers]
    return tuple(
        Site(f"{path}.{name}", layer, kind, _width(model, f"{path}.{name}"))
        for layer in sorted(set(chosen))
        for path, names in [blocks[layer]]
        for kind, name in zip(KINDS, names, strict=True)
        if kind in kinds
    )


def _layer_index(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise ValueError(f"layers: {layer} is out of range, the model has {count} blocks (0 to {count - 1})")
    return layer % count


def _blocks(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, tuple[str, str]]]:
    """Path and pair of modules of every block that may get sites, in order of execution.

    A model with a text configuration may hold other towers (an encoder, a vision model): its longest list of blocks
    is used. Any other model is used as a whole: a U-Net has a list of blocks in each of its stages.
    """
    lists = [
        (path, len(module), pair)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and (pair := _pair(module, pairs))
    ]
    if _has_text(model):
        lists = sorted(lists, key=lambda found: -found[1])[:1]
    else:
        # U-Nets register the way up before the middle
        lists = sorted(lists, key=lambda found: found[0].startswith("up_blocks."))
    return [(f"{path}.{index}", pair) for path, count, pair in lists for index in range(count)]


def _pair(blocks: nn.ModuleList, pairs: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The first pair of modules that all blocks have."""
    return next((pair for pair in pairs if len(blocks) and all(_has(b, name) for b in blocks for name in pair)), None)


def _has_text(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "get_text_config")


def _width(model: nn.Module, path: str) -> int:
    """Size of the hidden states that come out of a site's module."""
    if _has_text(model):
        return int(model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]
    module = model.get_submodule(path)
    linear = [part.out_features for part in module.modules() if isinstance(part, nn.Linear)]
    width = getattr(module, "out_dim", None) or (linear[-1] if linear else None)
    if not isinstance(width, int):
        raise ValueError(f"{path}: the width of {type(module).__name__} is not known, it has no linear layer")
    return width


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _auto_class(path: str) -> Any:
    """The Auto class with the head that the architecture was trained with: causal, masked, or none."""
    config = AutoConfig.from_pretrained(path)
    names = " ".join(config.architectures or ())
    if re.search(r"ForMaskedLM|ForPreTraining", names):
        return AutoModelForMaskedLM
    if re.search(r"ForCausalLM|LMHead|ForConditionalGeneration", names):
        return AutoModelForCausalLM
    return AutoModel


def _read_diffusers(diffusers: Any, name: Any, path: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, list[str]]]:
    """Load a model of the class of diffusers that its configuration names, with what ``from_pretrained`` noticed."""
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ValueError(f"diffusers {diffusers.__version__} has no model {name!r}")
    default = torch.get_default_dtype()
    try:
        model, loading = found.from_pretrained(  # type: ignore[attr-defined]
            path,
            torch_dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,  # what it falls back to is a pickle
            # the default, said aloud: without accelerate diffusers logs that it does not use it
            low_cpu_mem_usage=diffusers.utils.is_accelerate_available(),
        )
    finally:
        # diffusers builds the model under another default and leaves that behind where building fails
        torch.set_default_dtype(default)
    return model, loading


@contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    """Say in one sentence what a library found wrong with a backbone's files."""
    try:
        yield
    except Exception as error:  # both libraries build a model of whatever a configuration says, and fail in any way
        raise ValueError(
            f"backbone={str(source)!r}: weights cannot be loaded ({_first_line(error)}); expected "
            "'dsa-text', a folder with config.json and safetensors, or a Hub id"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
