"""Finished runs on the small bundle: two seeds of PPO, and a comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsa_gym.experiments.cli import main
from dsa_gym.experiments.compare import Grid, compare

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


class QuietLog:
    """Stands in for TensorBoard where its events do not matter."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def evaluation(self, *_: object, **__: object) -> None: ...

    def hparams(self, *_: object, **__: object) -> None: ...


@pytest.fixture
def quiet_log(monkeypatch: pytest.MonkeyPatch) -> type[QuietLog]:
    """Runs of this process write no TensorBoard events."""
    monkeypatch.setattr("dsa_gym.experiments.train.PolicyLog", QuietLog)
    return QuietLog


SMALL = {"rloo": {"batch_size": 8, "masks": 4, "hidden": [8]}, "static": {}}
"""Agents of the small comparison with settings that take no time."""


@pytest.fixture(scope="session")
def small_grid(bundle_folder: Path) -> Grid:
    """Two agents, two seeds, one environment."""
    options = {"steps": 256, "evaluate_every": 128, "num_envs": 4}
    return Grid({"DSA-TextTable-v0": {"bundle": str(bundle_folder)}}, SMALL, 2, options)


@pytest.fixture(scope="session")
def comparison(small_grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished comparison of the small grid; tests must not change it."""
    out = tmp_path_factory.mktemp("comparison")
    assert compare(small_grid, out, workers=2) == {}
    return out
