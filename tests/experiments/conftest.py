"""Finished runs on the small bundle: two seeds of PPO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsa_gym.experiments.cli import main

TRAIN = ["--num-envs", "4", "--steps", "256", "--evaluate-every", "128"]
SETTINGS = ["--set", "epochs=1", "hidden=[8]", "batch_size=64", "learning_rate=1e-2"]


@pytest.fixture(scope="session")
def train_command(bundle_folder: Path) -> Callable[..., list[str]]:
    """The command line of a run of two evaluations; further arguments overrule."""

    def command(logdir: Path, *arguments: object) -> list[str]:
        given = [str(argument) for argument in arguments]
        return ["train", "--bundle", str(bundle_folder), "--logdir", str(logdir), *TRAIN, *given, *SETTINGS]

    return command


@pytest.fixture(scope="session")
def runs(train_command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished runs of seeds 0 and 1; tests must not change them."""
    logdir = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        assert main(train_command(logdir, "--seed", seed)) == 0
    return [logdir / f"DSA-Text-v0-ppo-seed{seed}" for seed in (0, 1)]
