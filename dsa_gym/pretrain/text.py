"""Pre-training of the small causal language model that makes everything work offline.

One command makes the shipped backbone: ``dsa-gym pretrain text --corpus FILE... --out DIR``. It trains a byte-level BPE
tokenizer, then a GPT-2 (Radford et al., 2019) on windows of the corpus, and writes fp16 weights with a model card.
Training state is kept in ``OUT/checkpoint`` so that a killed run continues where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dsa_gym import storage
from dsa_gym.data import read_lines
from dsa_gym.pretrain.loop import TransformerConfig, fit

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class PretrainConfig(TransformerConfig):
    """What the backbone is and how it is trained, see :class:`~dsa_gym.pretrain.loop.TransformerConfig`.

    Attributes:
        vocabulary: Number of BPE tokens, the end-of-text token included.
        window: Tokens per training sequence; also the longest input of the model.
        held_out: Share of the corpus' paragraphs that perplexity is measured on.
    """

    vocabulary: int = 2048
    window: int = 64
    held_out: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        super().__post_init__()
        for name in ("vocabulary", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive integer")
        if not 257 <= self.vocabulary <= 1 << 16:
            raise ValueError(
                f"vocabulary={self.vocabulary}: byte-level BPE needs 257 or more tokens, and ids are stored in 16 bits"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: expected a share between 0 and 1")


def read_paragraphs(path: Path) -> Iterator[str]:
    """Yield the paragraphs of a corpus: a blank line ends one in plain text, a row is one in JSON Lines.

    Plain text (``.txt``) and JSON Lines (``.jsonl``, key ``text``), each also as .gz, .bz2, .xz or .zst.

    Raises:
        ValueError: If the file is missing, damaged, empty, not UTF-8, or a JSON line has no ``text``.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"corpus={str(path)!r}: no such file")
    rows = any(suffix.lower() in (".jsonl", ".ndjson") for suffix in path.suffixes[-2:])
    found = False
    for paragraph in _json_paragraphs(path) if rows else _text_paragraphs(path):
        if paragraph:
            found = True
            yield paragraph
    if not found:
        raise ValueError(f"{path}: the corpus is empty")


def _json_paragraphs(path: Path) -> Iterator[str]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            yield json.loads(line)["text"].strip()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object with 'text'") from error


def _text_paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for _, line in read_lines(path):
        if line.strip():
            lines.append(line.strip())
            continue
        yield " ".join(lines)
        lines = []
    yield " ".join(lines)


def train_tokenizer(paragraphs: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose only special token, id 0, begins and ends every text."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(paragraphs, vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False)
    inner = bpe._tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode_stream(paragraphs: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return all paragraphs as one array of token ids (tokens,), an end-of-text token before each."""
    pieces: list[int] = []
    end = tokenizer.bos_token_id
    for start in range(0, len(paragraphs), 4096):
        for ids in tokenizer(paragraphs[start : start + 4096], verbose=False)["input_ids"]:
            pieces.append(end)
            pieces.extend(ids)
    return np.asarray(pieces, dtype=np.uint16)


def build_model(config: PretrainConfig) -> GPT2LMHeadModel:
    """Return a GPT-2 of ``config``'s size; the tanh GELU is PyTorch's fused kernel."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocabulary,
            n_positions=config.window,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def windows(stream: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """Cut ``(len(starts), length + 1)`` int64 windows out of a token stream."""
    return torch.from_numpy(stream[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def next_token_loss(model: GPT2LMHeadModel, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of windows (batch, length + 1)."""
    logits = model(input_ids=batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, stream: np.ndarray, length: int, batch_size: int = 64) -> float:
    """Mean loss in nats per token over the consecutive windows of a held-out stream."""
    starts = np.arange(0, len(stream) - length - 1, length)
    if not len(starts):
        raise ValueError(f"held-out text of {len(stream)} tokens is shorter than window={length}: give more text")
    total = 0.0
    for begin in range(0, len(starts), batch_size):
        part = starts[begin : begin + batch_size]
        total += float(next_token_loss(model, windows(stream, part, length))) * len(part)
    return total / len(starts)


def _prepare_corpus(corpus: list[Path], out: Path, config: PretrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise the corpus once; a resumed run finds the streams in ``OUT/checkpoint``."""
    work = out / "checkpoint"
    if not corpus or len({Path(path).name for path in corpus}) < len(corpus):
        raise ValueError(f"corpus={[str(path) for path in corpus]}: expected one or more files of different names")
    for path in corpus:
        if not Path(path).is_file():
            raise ValueError(f"corpus={str(path)!r}: no such file")
    key = {"config": asdict(config), "corpus": storage.checksums(corpus)}
    if (work / "corpus.json").exists():
        if storage.read_json(work / "corpus.json") != key:
            raise ValueError(f"out={str(out)!r}: holds a run with another configuration or corpus; give a new folder")
        return storage.read_array(work / "train.npy"), storage.read_array(work / "held_out.npy")
    paragraphs = [p for path in corpus for p in read_paragraphs(Path(path))]
    tokenizer = train_tokenizer(paragraphs, config.vocabulary)
    held = np.random.default_rng(config.seed).random(len(paragraphs)) < config.held_out
    held[0] |= not held.any()
    train = encode_stream([p for p, h in zip(paragraphs, held, strict=True) if not h], tokenizer)
    test = encode_stream([p for p, h in zip(paragraphs, held, strict=True) if h], tokenizer)
    for name, stream in (("training", train), ("held-out", test)):
        if len(stream) <= config.window + 1:
            raise ValueError(
                f"{name} text of {len(stream)} tokens is shorter than window={config.window}: give more text"
            )
    tokenizer.save_pretrained(out)
    storage.write_array(work / "train.npy", train)
    storage.write_array(work / "held_out.npy", test)
    storage.write_json(work / "corpus.json", key)
    return train, test


def pretrain_text(
    corpus: list[Path], out: Path, config: PretrainConfig | None = None, *, checkpoint_every: int = 250
) -> dict[str, float]:
    """Pre-train the text backbone and write it to ``out`` as a Hugging Face folder.

    Args:
        corpus: Plain text or JSON Lines files, see :func:`read_paragraphs`.
        out: Folder for weights (fp16 safetensors), tokenizer, ``README.md`` (model card) and ``pretrain.json``.
        config: Size and schedule.
        checkpoint_every: Optimiser steps between checkpoints.

    Returns:
        ``held_out_loss`` in nats per token and ``held_out_perplexity``.

    Raises:
        ValueError: For an unreadable corpus or an ``out`` that holds another run.
        FloatingPointError: If the loss is not finite; the last checkpoint stays.
    """
    config = config or PretrainConfig()
    out = Path(out)
    train, held = _prepare_corpus(corpus, out, config)
    torch.manual_seed(config.seed)
    model = build_model(config)

    def loss(generator: np.random.Generator) -> Tensor:
        starts = generator.integers(0, len(train) - config.window - 1, config.batch_size)
        return next_token_loss(model, windows(train, starts, config.window))

    state_file = out / "checkpoint" / "state.safetensors"
    seconds = fit(model, loss, config, state_file, checkpoint_every=checkpoint_every)
    return _finish(model, out, held, config, seconds, len(train))


def _finish(
    model: GPT2LMHeadModel, out: Path, held: np.ndarray, config: PretrainConfig, seconds: float, tokens: int
) -> dict[str, float]:
    """Write fp16 weights, measure them (not the fp32 ones) on the held-out text and write the card."""
    model = model.eval().half().float()
    loss = held_out_loss(model, held, config.window)
    model.half().save_pretrained(out)
    result = {"held_out_loss": loss, "held_out_perplexity": math.exp(loss)}
    parameters = sum(p.numel() for p in model.parameters())
    corpus = storage.read_json(out / "checkpoint" / "corpus.json")["corpus"]
    storage.write_json(
        out / "pretrain.json",
        {
            **result,
            "config": asdict(config),
            "corpus": corpus,
            "parameters": parameters,
            "seconds": round(seconds, 1),
            "tokens": tokens,
            "held_out_tokens": len(held),
            "versions": storage.versions(),
        },
    )
    card = _MODEL_CARD.format(
        **asdict(config), **result, parameters=parameters, tokens=tokens, corpus=", ".join(corpus), seconds=seconds
    )
    storage.write_text(out / "README.md", card)
    return result


_MODEL_CARD = """---
library_name: transformers
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# dsa-gym text backbone

A GPT-2 of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads, byte-level BPE of {vocabulary}
tokens, {window} positions), the frozen model under `DSA-Text-v0`. It is small on purpose: personalisation research that
runs on two cores. It writes English that looks like its corpus and knows nothing; do not deploy it.

- Trained on {tokens:,} tokens of {corpus}: {steps} steps of {batch_size} x {window} tokens, AdamW, peak learning rate
  {learning_rate}, seed {seed}, {seconds:.0f} seconds.
- Held-out text ({held_out:.0%} of the paragraphs): {held_out_loss:.3f} nats per token, perplexity
  {held_out_perplexity:.1f}, measured with the fp16 weights as shipped.
- Re-made by `dsa-gym pretrain text`; `pretrain.json` has the configuration, the checksums and the versions.
"""
