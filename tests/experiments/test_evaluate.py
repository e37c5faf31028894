"""Evaluation: the ladder of one or several seeds, its controls, its plot, and what is not compared."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dsa_gym import storage
from dsa_gym.experiments.cli import main
from dsa_gym.experiments.evaluate import evaluate, plot, show
from dsa_gym.experiments.train import TrainConfig, load_run, train
from dsa_gym.ladder import build_ladder

Command = Callable[..., list[str]]
RUNGS = {
    "none",
    "all",
    "random",
    "static",
    "user_static",
    "reference",
    "agent",
    "oracle",
    "oracle_crossfit",
}
INTERVAL = {"mean", "low", "high"}


@pytest.fixture(scope="module")
def result(runs: list[Path]) -> dict[str, Any]:
    return evaluate(runs)


@pytest.mark.parametrize("part", ["test", "seen"])
def test_keys(result: dict[str, Any], part: str) -> None:
    judged = result if part == "test" else result["seen"]
    assert set(judged["ladder"]) == RUNGS
    for value in (*judged["ladder"].values(), judged["normalized_score"], judged["gain_over_static"]):
        assert set(value) == INTERVAL
        assert value["low"] <= value["high"]
    assert set(judged["controls"]) == {"shuffled_users", "shuffled_inputs"}
    for control in judged["controls"].values():
        assert set(control) == {*INTERVAL, "gain_over_static"}
    assert judged["split"] == part
    assert judged["oracle_kind"] == "exhaustive"
    assert (judged["users"], judged["inputs"]) == ((4, 24) if part == "test" else (10, 40))
    assert 0 <= judged["density"] <= 1
    assert judged["active_parameters"] == pytest.approx(judged["density"] * 2 * 8 * 128 * 8)
    assert len(judged["normalized_score_per_seed"]) == 2


def test_what_it_was_measured_on(result: dict[str, Any], runs: list[Path]) -> None:
    record = storage.read_json(runs[0] / "run.json")
    assert result["config"] == record["config"]
    assert result["bundle"] == record["bundle"]
    assert result["versions"] == storage.versions()
    assert [(run["run"], run["seed"]) for run in result["runs"]] == [
        ("DSA-Text-v0-ppo-seed0", 0),
        ("DSA-Text-v0-ppo-seed1", 1),
    ]
    json.dumps(result, allow_nan=False)


def test_values_by_hand(result: dict[str, Any], runs: list[Path]) -> None:
    loaded = [load_run(run) for run in runs]
    problem, train_problem = loaded[0][0].problem("test"), loaded[0][0].problem("train")
    inputs = np.arange(len(problem))
    masks = [agent.masks(problem) for _, agent in loaded]
    rewards = [problem.rewards(inputs, mask).mean() for mask in masks]
    assert result["ladder"]["agent"]["mean"] == pytest.approx(np.mean(rewards))
    active = np.mean([problem.active_parameters(mask).mean() for mask in masks])
    assert result["active_parameters"] == pytest.approx(active)
    ladder = build_ladder(problem, train_problem, density=float(np.mean(masks)))
    means = {name: value.mean() for name, value in ladder.rewards.items()}
    for name, mean in means.items():
        assert result["ladder"][name]["mean"] == pytest.approx(mean), name
    gain = np.mean(rewards) - means["static"]
    headroom = max(means["reference"] - means["static"], 1e-6)
    assert result["gain_over_static"]["mean"] == pytest.approx(gain)
    assert result["normalized_score"]["mean"] == pytest.approx(gain / headroom)
    assert np.mean(result["normalized_score_per_seed"]) == pytest.approx(gain / headroom)
    assert means["oracle_crossfit"] <= means["oracle"]


@pytest.mark.parametrize("split", ["validation", "seen"])
def test_other_splits(runs: list[Path], split: str) -> None:
    result = evaluate(runs[:1], split)
    assert result["split"] == split
    assert ("seen" in result) == (split != "seen")


def test_a_gate_that_ignores_users_and_inputs_is_its_own_control(bundle_folder: Path, tmp_path: Path) -> None:
    run = train(TrainConfig(agent="static", bundle=str(bundle_folder), steps=8, num_envs=2), tmp_path)
    result = evaluate([run])
    static = result["ladder"]["static"]["mean"]
    for control in result["controls"].values():
        assert control["mean"] == pytest.approx(static)
        assert control["gain_over_static"] == pytest.approx({"mean": 0.0, "low": 0.0, "high": 0.0})
    assert result["normalized_score"] == pytest.approx({"mean": 0.0, "low": 0.0, "high": 0.0})


def test_one_user_has_no_other_user(
    runs: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = TrainConfig.problem

    def one_user(self: TrainConfig, split: str) -> Any:
        found = problem(self, split)
        if split == "validation":
            rows = (found.user == found.user[0]).nonzero().flatten()
            found = type(found)(found.bundle, split, device="cpu", inputs=rows)
        return found

    monkeypatch.setattr(TrainConfig, "problem", one_user)
    result = evaluate(runs[:1], "validation")
    assert result["users"] == 1
    assert result["controls"]["shuffled_users"] is None
    assert result["controls"]["shuffled_inputs"]["mean"] < 0
    show(result, Console(width=140))
    assert "-" in capsys.readouterr().out


def test_plot_is_a_picture(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plots" / "ladder.png"
    plot(result, path)
    with Image.open(path) as picture:
        picture.verify()
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10  # type: ignore[arg-type]


def test_table(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    show(result, Console(width=140))
    out = capsys.readouterr().out
    for text in ("nothing on", "best static mask", "reference gate", "agent", "cross-fitted", "density"):
        assert text in out
    assert f"{result['ladder']['agent']['mean']:.3f}" in out


def test_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, picture = tmp_path / "r" / "result.json", tmp_path / "r" / "ladder.png"
    arguments = ["evaluate", *map(str, runs), "--json", str(report), "--plot", str(picture)]
    assert main(arguments) == 0
    assert "normalised score" in capsys.readouterr().out
    written = json.loads(report.read_text(encoding="utf-8"))
    assert set(written["ladder"]) == RUNGS
    assert {"users", "inputs", "oracle_kind", "density", "active_parameters", "seen"} <= set(written)
    with Image.open(picture) as image:
        image.verify()


def test_plot_goes_beside_the_run(runs: list[Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[0], tmp_path / "run")
    assert main(["evaluate", str(run), "--split", "validation"]) == 0
    assert (tmp_path / "run" / "ladder-validation.png").is_file()


def test_an_unfinished_run_is_refused(runs: list[Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    record = storage.read_json(run / "run.json")
    del record["scores"]
    storage.write_json(run / "run.json", record)
    with pytest.raises(ValueError, match=r"run=.*: not finished"):
        evaluate([run])


def test_runs_that_differ_in_more_than_the_seed_are_refused(
    runs: list[Path], train_command: Command, tmp_path: Path
) -> None:
    assert main(train_command(tmp_path, "--seed", 2, "--l0-penalty", "1e-5")) == 0
    other = tmp_path / "DSA-Text-v0-ppo-seed2"
    with pytest.raises(ValueError, match=r"run='.*seed2': differs from '.*seed0' in more than its seed"):
        evaluate([runs[0], other])


def test_the_same_seed_twice_is_refused(runs: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"runs: seeds \[0, 0\], expected each of them once"):
        evaluate([runs[0], runs[0]])


@pytest.mark.parametrize("split", ["train", "tests", "support"])
def test_unknown_split(runs: list[Path], split: str) -> None:
    with pytest.raises(ValueError, match=f"split='{split}': expected test, validation or seen"):
        evaluate(runs, split)


def test_no_score_without_headroom(result: dict[str, Any]) -> None:
    """Where the reference is not above the best static mask, a score between the two means nothing."""
    out = io.StringIO()
    part = {**result["seen"], "headroom": {"mean": -0.1, "low": -0.2, "high": 0.0}}
    show({**part, "config": result["config"]}, Console(file=out, width=120))
    row = next(line for line in out.getvalue().splitlines() if "normalised score" in line)
    assert row.replace("│", " ").split() == ["normalised", "score", "-"]
