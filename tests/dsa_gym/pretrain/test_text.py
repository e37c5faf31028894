"""Pre-training: it learns, a killed run goes on as if nothing had happened, its output can be loaded."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from dsa_gym import storage
from dsa_gym.backbone import Backbone, load_tokenizer
from dsa_gym.data import read_lines
from dsa_gym.pretrain import loop
from dsa_gym.pretrain import text as pretrain
from dsa_gym.pretrain.text import PretrainConfig, pretrain_text, read_paragraphs

WORDS = [
    "the",
    "river",
    "ran",
    "under",
    "a",
    "stone",
    "bridge",
    "while",
    "amber",
    "clouds",
    "moved",
    "over",
    "quiet",
    "gardens",
]
CONFIG = PretrainConfig(
    vocabulary=300,
    width=16,
    layers=1,
    heads=2,
    window=8,
    batch_size=8,
    steps=55,
    learning_rate=1e-2,
    held_out=0.1,
)

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    draw = np.random.default_rng(0)
    path.write_text("\n\n".join(" ".join(draw.choice(WORDS, size=12)) for _ in range(80)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A whole run: its folder and what it returned."""
    out = tmp_path_factory.mktemp("unbroken")
    return out, pretrain_text([corpus], out, CONFIG, checkpoint_every=5)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_held_out_loss_falls(unbroken: tuple[Path, dict[str, float]]) -> None:
    out, result = unbroken
    held = storage.read_array(out / "checkpoint" / "held_out.npy")
    torch.manual_seed(0)
    untrained = pretrain.held_out_loss(pretrain.build_model(CONFIG), held, CONFIG.window)
    assert untrained == pytest.approx(math.log(300), rel=0.02)
    assert result["held_out_loss"] < untrained - 0.3
    assert result["held_out_perplexity"] == pytest.approx(math.exp(result["held_out_loss"]))


def test_what_is_written(unbroken: tuple[Path, dict[str, float]], corpus: Path) -> None:
    out, result = unbroken
    backbone = Backbone.load(out)
    assert len(backbone.sites) == 2
    assert {tensor.dtype for tensor in storage.read_tensors(out / "model.safetensors").values()} == {torch.float16}
    tokenizer = load_tokenizer(out)
    text = "the river ran été"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    record = storage.read_json(out / "pretrain.json")
    assert record["held_out_loss"] == result["held_out_loss"]
    assert record["corpus"] == {"corpus.txt": storage.sha256(corpus)}
    assert record["config"]["vocabulary"] == 300
    assert record["parameters"] == sum(p.numel() for p in backbone.model.parameters())
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers")
    assert f"{result['held_out_loss']:.3f} nats per token" in card
    assert "{" not in card
    # the loss is that of the weights as shipped
    held = storage.read_array(out / "checkpoint" / "held_out.npy")
    assert pretrain.held_out_loss(backbone.model, held, CONFIG.window) == pytest.approx(result["held_out_loss"])


def test_held_out_paragraphs_are_not_trained_on(unbroken: tuple[Path, dict[str, float]], corpus: Path) -> None:
    out, _ = unbroken
    tokenizer = load_tokenizer(out)
    paragraphs = list(read_paragraphs(corpus))
    parts = []
    for name in ("train", "held_out"):
        stream = storage.read_array(out / "checkpoint" / f"{name}.npy").tolist()
        parts.append({text for text in tokenizer.decode(stream).split(pretrain.END_OF_TEXT) if text})
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(paragraphs)
    assert 1 <= len(parts[1]) < len(parts[0])


def test_a_run_that_failed_goes_on_bit_for_bit(
    unbroken: tuple[Path, dict[str, float]], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = pretrain.next_token_loss

    def failing(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "next_token_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            pretrain_text([corpus], tmp_path, CONFIG, checkpoint_every=5)
        assert not (tmp_path / "model.safetensors").exists()
        calls = 100
        assert pretrain_text([corpus], tmp_path, CONFIG, checkpoint_every=5) == unbroken[1]
        # it went on from step 5: the other steps and the measurement of the held-out text
        held = len(storage.read_array(tmp_path / "checkpoint" / "held_out.npy"))
        assert calls - 100 == CONFIG.steps - 5 + math.ceil(len(range(0, held - 9, 8)) / 64)
    assert weights(tmp_path) == weights(unbroken[0])


SCRIPT = """
import json, sys
from pathlib import Path
from dsa_gym.pretrain import text as pretrain
from dsa_gym.pretrain.text import PretrainConfig, pretrain_text
corpus, out, settings = sys.argv[1:]
pretrain_text([Path(corpus)], Path(out), PretrainConfig(**json.loads(settings)), checkpoint_every=5)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_run_that_was_killed_goes_on_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=100_000)
    settings = json.dumps(config.__dict__)
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(corpus), str(out), settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state = out / "checkpoint" / "state.safetensors"
    try:
        deadline = time.monotonic() + 600
        while not state.exists():
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    step = int(storage.read_tensors(state)["step"])
    assert step % 5 == 0
    assert step > 0

    def continue_until(folder: Path, last: int) -> dict[str, torch.Tensor]:
        """Go on, stop at step ``last`` and return the state."""

        class Stop(Exception):  # noqa: N818
            pass

        original = loop._checkpoint

        def stopping(path: Path, model: object, optimizer: object, state: loop._State) -> None:
            original(path, model, optimizer, replace(state, seconds=0.0))  # type: ignore[arg-type]
            if state.step >= last:
                raise Stop

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "_checkpoint", stopping)
            with pytest.raises(Stop):
                pretrain_text([corpus], folder, config, checkpoint_every=5)
        return storage.read_tensors(folder / "checkpoint" / "state.safetensors")

    resumed, whole = continue_until(out, step + 10), continue_until(tmp_path / "whole", step + 10)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_another_run_is_not_overwritten(unbroken: tuple[Path, dict[str, float]], corpus: Path, tmp_path: Path) -> None:
    out, _ = unbroken
    before = weights(out)
    with pytest.raises(ValueError, match="holds a run with another configuration or corpus"):
        pretrain_text([corpus], out, replace(CONFIG, seed=1))
    other = tmp_path / "corpus.txt"
    other.write_text(corpus.read_text() + "\n\nmore")
    with pytest.raises(ValueError, match="holds a run with another configuration or corpus"):
        pretrain_text([other], out, CONFIG)
    assert weights(out) == before


def test_loss_that_is_not_finite(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "next_token_loss", lambda *_: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0: lower learning_rate"):
        pretrain_text([corpus], tmp_path, CONFIG)


@pytest.mark.parametrize("compression", COMPRESS)
def test_paragraphs_of_plain_text(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression]("\ufeff\n  one\ntwo \r\n\n \n\nthree été\n\n".encode()))
    assert list(read_paragraphs(path)) == ["one two", "three été"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_paragraphs_of_json_lines(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    lines = [json.dumps({"text": text, "other": 1}) for text in ("one\n\ntwo", "  ", " three ")]
    path.write_bytes(COMPRESS[compression]("\n\n".join(lines).encode()))
    assert list(read_paragraphs(path)) == ["one\n\ntwo", "three"]


def test_lines_have_numbers(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_bytes(b"one\n\r\nthree")
    assert list(read_lines(path)) == [(1, "one\n"), (2, "\r\n"), (3, "three")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the corpus is empty"),
        ("a.txt", b"\n \n", "the corpus is empty"),
        ("a.jsonl", b'{"text": " "}', "the corpus is empty"),
        ("a.txt", b"fine\n\xff\xfe", "line 2, byte 1: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}', "line 2: expected a JSON object with 'text'"),
        ("a.jsonl", b'{"text": 3}', "line 1: expected a JSON object with 'text'"),
        ("a.jsonl", b"[", "line 1: expected a JSON object with 'text'"),
        ("a.jsonl", b"[]", "line 1: expected a JSON object with 'text'"),
        ("a.txt.gz", b"plain", "cannot read"),
        ("a.txt.gz", gzip.compress(b"words " * 1000)[:-20], "cannot read"),
        ("a.txt.zst", zstandard.compress(os.urandom(5000))[:-200], "cannot read|not UTF-8"),
        ("a.txt.xz", lzma.compress(b"words " * 1000)[:-20], "cannot read"),
    ],
)
def test_bad_corpus(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        pretrain_text([path], tmp_path / "out", CONFIG)
    assert name in str(error.value)


def test_corpora_that_are_missing_or_too_small(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus=.*nowhere\.txt'?: no such file"):
        pretrain_text([tmp_path / "nowhere.txt"], tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match=r"corpus=.*: no such file"):
        list(read_paragraphs(tmp_path))
    with pytest.raises(ValueError, match=r"corpus=\[\]: expected one or more files"):
        pretrain_text([], tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match="files of different names"):
        pretrain_text([corpus, corpus], tmp_path / "out", CONFIG)
    one = tmp_path / "one.txt"
    one.write_text("a single paragraph")
    with pytest.raises(ValueError, match="training text of 0 tokens is shorter than window=8"):
        pretrain_text([one], tmp_path / "one", CONFIG)


def test_held_out_text_is_checked_before_training(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "build_model", lambda _: pytest.fail("trained before it looked"))
    config = replace(CONFIG, held_out=1e-9, window=64)
    with pytest.raises(ValueError, match=r"held-out text of \d+ tokens is shorter than window=64"):
        pretrain_text([corpus], tmp_path, config)


def test_several_files_are_one_corpus(corpus: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl.zst"
    more.write_bytes(zstandard.compress(json.dumps({"text": "quiet stone " * 30}).encode()))
    out = tmp_path / "out"
    pretrain_text([corpus, more], out, replace(CONFIG, steps=1))
    assert storage.read_json(out / "pretrain.json")["corpus"].keys() == {"corpus.txt", "more.jsonl.zst"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"vocabulary": 256}, "vocabulary=256"),
        ({"vocabulary": 70_000}, "vocabulary=70000"),
        ({"width": 10, "heads": 4}, "width=10: expected a multiple of heads=4"),
        ({"held_out": 0.0}, "held_out=0.0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**settings)


def test_bad_checkpoint_interval(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_every=0"):
        pretrain_text([corpus], tmp_path, CONFIG, checkpoint_every=0)
