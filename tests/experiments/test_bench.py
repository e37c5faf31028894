"""The benchmark measures what it says and reports it whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsa_gym.experiments.bench import bench
from dsa_gym.experiments.cli import main
from dsa_gym.experiments.masked_bench import masked_bench, show


def test_result(bundle_folder: Path) -> None:
    result = bench("DSA-Text-v0", str(bundle_folder), num_envs=4, repetitions=3, seed=0)
    assert (result["env"], result["num_envs"], result["repetitions"]) == ("DSA-Text-v0", 4, 3)
    assert result["users"] == 4
    assert set(result["milliseconds"]) == {"backbone", "adapted", "step"}
    for value in result["milliseconds"].values():
        assert 0 < value["low"] <= value["median"] <= value["high"]
    overhead = result["adapter_overhead"]
    assert overhead["low"] <= overhead["median"] <= overhead["high"]
    step = result["milliseconds"]["step"]["median"]
    assert result["steps_per_second"] == pytest.approx(1000 * 4 / step)
    assert set(result["machine"]) == {"processor", "cores", "threads"}
    assert "torch" in result["versions"]


def test_more_environments_than_users(bundle_folder: Path) -> None:
    assert bench("DSA-Text-v0", str(bundle_folder), num_envs=12, repetitions=2, seed=0)["users"] == 10


def test_command(bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    arguments = ["--num-envs", "2", "--repetitions", "2", "--bundle", str(bundle_folder), "--json", str(path)]
    assert main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    assert "bare backbone" in out and "steps per second" in out
    assert json.loads(path.read_text(encoding="utf-8"))["num_envs"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repetitions": 1}, "repetitions=1"),
        ({"num_envs": 0}, "num_envs=0"),
        ({"seed": -1}, "seed=-1"),
        ({"env_id": "DSA-Tex-v0"}, "env='DSA-Tex-v0'"),
        ({"env_id": "CartPole-v1"}, "env='CartPole-v1'"),
        ({"bundle": "/nowhere"}, "bundle='/nowhere': no manifest"),
    ],
)
def test_bad_arguments(bundle_folder: Path, arguments: dict[str, Any], message: str) -> None:
    given = {
        "env_id": "DSA-Text-v0",
        "bundle": str(bundle_folder),
        "num_envs": 2,
        "repetitions": 2,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=message):
        bench(**{**given, **arguments})


def test_under_masks(capsys: pytest.CaptureFixture[str]) -> None:
    result = masked_bench(gates=6, num_envs=2, n_steps=8, repetitions=2)
    assert result["gates"] == 6
    assert set(result["steps_per_second"]) == {"ppo", "masks", "pairs", "sb3_contrib"}
    for kind in ("steps_per_second", "share_of_ppo"):
        for value in result[kind].values():
            assert 0 < value["low"] <= value["median"] <= value["high"]
    assert result["share_of_ppo"]["ppo"]["median"] == 1
    show(result, Console())
    assert "sb3-contrib, MaskablePPO" in capsys.readouterr().out
    with pytest.raises(ValueError, match="repetitions=1"):
        masked_bench(repetitions=1)


@pytest.mark.slow  # a busy system may disturb it
def test_masks_save_time_at_many_gates() -> None:
    """It is several times as fast as a list of categoricals."""
    result = masked_bench(gates=60, num_envs=4, n_steps=8, repetitions=3)
    assert result["share_of_ppo"]["masks"]["median"] > 2 * result["share_of_ppo"]["sb3_contrib"]["median"]
