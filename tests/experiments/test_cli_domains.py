"""Recommendation and images from generated data to a trained gate, by the commands alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dsa_gym import storage
from dsa_gym.bundle import Bundle
from dsa_gym.data import split_users
from dsa_gym.experiments.cli import main

SMALL = """
splits: {min_examples: 5, inputs: {train: 3, seen: 2, validation: 2, test: 3}, support_inputs: 2}
adapter: {rank: 8, pathways: 4}
library: {steps: 4, users: 4, support: 2, query: 2, validate_every: 2}
adaptation: {steps: 2}
"""


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_recommendation(tmp_path: Path) -> None:
    data, titles, config = tmp_path / "tastes.csv.gz", tmp_path / "titles.csv", tmp_path / "small.yaml"
    config.write_text(SMALL)
    pretraining = tmp_path / "pretrain.yaml"
    pretraining.write_text("{width: 16, window: 16}")
    command("tastes", "--users", 30, "--items", 120, "--out", data, "--titles", titles)
    command("pretrain", "recommendation", "--data", data, "--titles", titles, "--item-core", 1, "--steps", 3,
            "--config", pretraining, "--out", tmp_path / "backbone")  # fmt: skip
    record = storage.read_json(tmp_path / "backbone" / "pretrain.json")
    groups = split_users(sorted({f"taste-{i:04}" for i in range(30)}), validation=0.08, test=0.24, seed=0)
    assert record["trained_users"] == groups["train"] and record["read"]["users"] == 30
    command("prepare", "recommendation", "--data", data, "--item-core", 1, "--config", config,
            "--backbone", tmp_path / "backbone", "--out", tmp_path / "bundle")  # fmt: skip
    bundle = Bundle.open(tmp_path / "bundle")
    held = [user for user, group in zip(bundle.users, bundle.manifest["groups"], strict=True) if group != "train"]
    assert not set(held) & set(record["trained_users"]), "nobody is held out whom the backbone knows"
    command("train", "--env", "DSA-Rec-v0", "--bundle", tmp_path / "bundle", "--agent", "static", "--steps", 64,
            "--reward-metric", "ndcg@10", "--num-envs", 8, "--logdir", tmp_path / "runs")  # fmt: skip
    command("evaluate", tmp_path / "runs" / "DSA-Rec-v0-static-seed0")
    command("metrics", tmp_path / "bundle", "--interactions", data, "--json", tmp_path / "metrics.json")
    assert set(storage.read_json(tmp_path / "metrics.json")["metrics"]["ndcg@10"]) >= {"personal", "item-kNN"}


def test_image(tmp_path: Path) -> None:
    data, config = tmp_path / "hands.npz", tmp_path / "small.yaml"
    config.write_text(SMALL)
    pretraining = tmp_path / "pretrain.yaml"
    pretraining.write_text("{width: 16, layers: 1, heads: 2, patch: 7, timesteps: 100, batch_size: 8}")
    command("hands", "--users", 12, "--per-user", 12, "--out", data)
    command("pretrain", "image", "--data", data, "--steps", 2, "--config", pretraining, "--out", tmp_path / "backbone")
    command("prepare", "image", "--data", data, "--config", config, "--backbone", tmp_path / "backbone",
            "--out", tmp_path / "bundle")  # fmt: skip
    command("sample", tmp_path / "bundle", "--count", 2, "--out", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 2 * 28
    command("metrics", tmp_path / "bundle", "--style", "--json", tmp_path / "metrics.json")
    measured = storage.read_json(tmp_path / "metrics.json")
    assert "psnr" in measured["metrics"] and measured["style"]["accuracy"].keys() >= {"real", "personalised", "gain"}


def test_scrubbed_text(tmp_path: Path, persona_file: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    command("prepare", "text", "--data", persona_file, "--config", config, "--scrub", "a secret of some length",
            "--out", tmp_path / "bundle")  # fmt: skip
    assert all(user.startswith("user-") for user in Bundle.open(tmp_path / "bundle").users)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "image", "--data", "nowhere", "--backbone", "nowhere", "--out", "x"], "nowhere"),
        (["pretrain", "recommendation", "--data", "nowhere.csv", "--out", "x"], "nowhere.csv"),
        (["sample", "text"], "is of domain 'text', expected 'image'"),
        (["train", "--reward-metric", "mrr"], "reward_metric='mrr'"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
