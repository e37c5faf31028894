"""The frozen model theta: any Hugging Face transformer, with the places in it where adapters sit.

Sites are modules whose output is a sublayer's output just before the residual addition. They are found by the names
that the common architectures use inside a block; an architecture that is not known can be described by two names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from dsa_gym.pathways import ActiveAdapters, Site

ASSETS = Path(__file__).parent / "assets"
SHIPPED = {"dsa-text": ASSETS / "backbone-text"}
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
)


class Backbone:
    """A frozen transformer with adapter sites.

    Attributes:
        model: The Hugging Face model: eval mode, no parameter requires a gradient.
        sites: The adapter sites in order of execution.
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
        self.model = model.eval().requires_grad_(False)
        self.source = source
        self.sites = find_sites(model, layers=layers, kinds=kinds, site_names=site_names)
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
            source: ``"dsa-text"`` (shipped), a folder, or a Hugging Face Hub id.
            layers: Blocks that get sites; None for all. Negative indices count from the end.
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
        try:
            model, loading = _auto_class(path).from_pretrained(path, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"backbone={str(source)!r}: weights cannot be loaded ({_first_line(error)}); expected "
                "'dsa-text', a folder with config.json and model.safetensors, or a Hub id"
            ) from error
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
        """The Hugging Face configuration of the text model."""
        return self.model.config.get_text_config()  # type: ignore[operator, union-attr]

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


def resolve_source(source: str | Path) -> str:
    """Turn a shipped name, a folder or a Hub id into what Hugging Face loads."""
    return str(SHIPPED.get(str(source), source))


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
    found = _blocks(model, (site_names,) if site_names else SITE_NAMES)
    if found is None:
        asked = f"site_names={site_names!r}" if site_names else f"architecture {type(model).__name__!r}"
        raise ValueError(
            f"{asked}: no adapter sites found. Give site_names=(attention, feed_forward), the names of the modules "
            "inside a transformer block whose outputs are added to the residual stream, e.g. ('self_attn', 'mlp')"
        )
    path, count, names = found
    if layers is not None and not len(layers):
        raise ValueError("layers=[]: expected at least one block, or None for all")
    width = model.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
    chosen = range(count) if layers is None else [_layer_index(layer, count) for layer in layers]
    return tuple(
        Site(f"{path}.{layer}.{name}", layer, kind, width)
        for layer in sorted(set(chosen))
        for kind, name in zip(KINDS, names, strict=True)
        if kind in kinds
    )


def _layer_index(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise ValueError(f"layers: {layer} is out of range, the model has {count} blocks (0 to {count - 1})")
    return layer % count


def _blocks(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> tuple[str, int, tuple[str, str]] | None:
    """The longest list of blocks that have a known pair of modules: its path, its length and the pair."""
    best: tuple[str, int, tuple[str, str]] | None = None
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        for pair in pairs:
            if all(_has(block, name) for block in module for name in pair):
                if best is None or len(module) > best[1]:
                    best = (path, len(module), pair)
                break
    return best


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
