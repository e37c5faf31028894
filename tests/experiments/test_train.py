"""Training runs: what they leave, that they survive SIGKILL, and what they refuse."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsa_gym import storage
from dsa_gym.agents import AGENTS
from dsa_gym.agents.base import zoo_defaults
from dsa_gym.bundle import Bundle
from dsa_gym.experiments.cli import main
from dsa_gym.experiments.monitor import Monitor
from dsa_gym.experiments.train import TrainConfig, load_run, train
from dsa_gym.problem import GatingProblem

Command = Callable[..., list[str]]
SCORES = ("loss", "penalty", "reward", "active_parameters", "density", "normalized_score", "regret")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_run_json(runs: list[Path], bundle_folder: Path) -> None:
    record = storage.read_json(runs[1] / "run.json")
    assert set(record) == {"config", "bundle", "versions", "scores", "seconds"}
    assert record["config"] == {
        "env": "DSA-Text-v0",
        "agent": "ppo",
        "bundle": str(bundle_folder),
        "steps": 256,
        "seed": 1,
        "num_envs": 4,
        "granularity": "pathway",
        "l0_penalty": None,
        "reward_metric": None,
        "evaluate_every": 128,
        "env_settings": {},
        # what was asked for and the defaults that it was run with
        "settings": {
            **zoo_defaults("ppo"),
            "epochs": 1,
            "hidden": [8],
            "batch_size": 64,
            "learning_rate": 0.01,
        },
    }
    manifest = Bundle.open(bundle_folder).manifest
    assert record["bundle"] == {"files": manifest["files"], "data": manifest["data"]}
    assert record["versions"] == storage.versions()
    assert record["seconds"] >= 0
    assert set(record["scores"]) == {f"{part}/{name}" for part in ("seen", "unseen") for name in SCORES}


def test_scores_are_those_of_the_saved_agent(runs: list[Path]) -> None:
    config, agent = load_run(runs[0])
    assert agent.steps == 256
    scores = storage.read_json(runs[0] / "run.json")["scores"]
    for part, split in (("seen", "seen"), ("unseen", "validation")):
        problem = config.problem(split)
        masks = agent.masks(problem)
        inputs = np.arange(len(problem))
        assert scores[f"{part}/loss"] == pytest.approx(problem.losses(inputs, masks).mean())
        assert scores[f"{part}/reward"] == pytest.approx(problem.rewards(inputs, masks).mean())
        active = problem.active_parameters(masks).mean()
        assert scores[f"{part}/active_parameters"] == active
        assert scores[f"{part}/density"] == pytest.approx(active / problem.bundle.shape.size)


def test_normalised_score_of_the_monitor(runs: list[Path]) -> None:
    """Static scores 0; an agent that decides as the reference gate does scores 1."""
    config, agent = load_run(runs[0])
    monitor = Monitor.of_env(config.env, **config.env_arguments)

    class Reference:
        def masks(self, problem: GatingProblem) -> Any:
            return problem.reference_gates()

    scalars, decisions = monitor(Reference())  # type: ignore[arg-type]
    for name, problem in monitor.problems.items():
        static, reference = monitor.ends[name]
        if reference > static + 1e-3:
            assert scalars[f"{name}/normalized_score"] == pytest.approx(1.0)
        assert scalars[f"{name}/reward"] == pytest.approx(reference)
        assert decisions[name].shape == (len(problem), agent.gates)


def test_same_seed_same_run(runs: list[Path], train_command: Command, tmp_path: Path) -> None:
    assert main(train_command(tmp_path, "--seed", 1)) == 0
    again = tmp_path / runs[1].name
    first, second = (storage.read_json(run / "run.json")["scores"] for run in (runs[1], again))
    assert first == second
    one, other = (storage.read_tensors(run / "agent.safetensors") for run in (runs[1], again))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_another_seed_is_another_run(runs: list[Path]) -> None:
    one, other = (storage.read_tensors(run / "agent.safetensors") for run in runs)
    assert any(not one[name].equal(other[name]) for name in one)


def test_a_finished_run_is_not_repeated(
    runs: list[Path], train_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(runs[0])
    monkeypatch.setattr("dsa_gym.agents.ppo.PPOAgent.learn", lambda *_: pytest.fail("it learns again"))
    assert main(train_command(runs[0].parent)) == 0
    assert snapshot(runs[0]) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "512"],
        ["--l0-penalty", "0"],
        ["--num-envs", "2"],
        ["--granularity", "layer"],
        ["--evaluate-every", "64"],
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    runs: list[Path], train_command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    before = snapshot(runs[0])
    assert main(train_command(runs[0].parent, *arguments)) == 2
    assert "holds a run with another configuration" in capsys.readouterr().err
    assert snapshot(runs[0]) == before


def test_killed_and_continued(
    train_command: Command,
    start_command: Callable[..., ForkServerProcess],
    kill_when: Callable[..., bool],
    tmp_path: Path,
) -> None:
    """SIGKILL at several moments; the same command goes on from the last evaluation and ends well."""
    command = train_command(tmp_path, "--steps", "4096")
    run = tmp_path / "DSA-Text-v0-ppo-seed0"
    record = run / "agent.json"

    def steps() -> int:
        return int(storage.read_json(record)["steps"]) if record.is_file() else 0

    def kill(condition: Callable[[], bool], **arguments: float) -> bool:
        found = kill_when(start_command(*command), condition, **arguments)
        # TensorBoard orders event files by whole seconds; only in a test are two starts in the same one
        time.sleep(1.1)
        return found

    killed = [kill(lambda: (run / "run.json").is_file())]
    reached = [steps()]
    for least in (128, 1024, 2048):
        time.sleep(1)  # event files are ordered by the second they were begun in
        killed.append(kill(lambda least=least: steps() >= least, delay=0.004))
        reached.append(steps())
    assert any(killed)
    assert reached == sorted(reached), "a continued run lost what was saved"
    if all(killed):
        with pytest.raises(ValueError, match="not finished; continue it"):
            load_run(run)
    time.sleep(1)
    assert main(command) == 0
    manifest = storage.read_json(run / "run.json")
    assert set(manifest["scores"]) == {f"{part}/{name}" for part in ("seen", "unseen") for name in SCORES}
    _, agent = load_run(run)
    assert agent.steps == 4096
    # what TensorBoard shows is one run: every evaluation once, in order
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    shown = [event.step for event in events.Scalars("unseen/loss")]
    assert shown == sorted(set(shown))
    assert set(range(128, 4097, 128)) == set(shown)


def test_a_run_that_was_killed_before_its_scores_gets_them(
    runs: list[Path], train_command: Command, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / runs[0].name))
    manifest = storage.read_json(run / "run.json")
    scores = manifest.pop("scores")
    storage.write_json(run / "run.json", manifest)
    assert main(train_command(tmp_path)) == 0
    assert storage.read_json(run / "run.json")["scores"] == scores


@pytest.mark.parametrize("agent", sorted(set(AGENTS) - {"ppo"}))
def test_every_agent_trains(bundle_folder: Path, tmp_path: Path, agent: str) -> None:
    settings = {"batch_size": 8} if agent == "gumbel" else None
    config = TrainConfig(
        agent=agent, bundle=str(bundle_folder), steps=16, num_envs=4, evaluate_every=8, settings=settings
    )
    run = train(config, tmp_path)
    scores = storage.read_json(run / "run.json")["scores"]
    assert all(np.isfinite(value) for value in scores.values())
    again, loaded = load_run(run)
    assert (again.agent, loaded.name) == (agent, agent)
    expected = {"none": 0.0, "all": 1.0}
    if agent in expected:
        assert scores["unseen/density"] == expected[agent]
    if agent == "static":
        assert scores["seen/normalized_score"] == scores["unseen/normalized_score"] == 0


def test_finer_gates(train_command: Command, tmp_path: Path) -> None:
    arguments = ["--granularity", "layer", "--steps", "128", "--agent", "all", "--set"]
    assert main([*train_command(tmp_path)[:-5], *arguments]) == 0
    run = storage.read_json(tmp_path / "DSA-Text-v0-all-seed0" / "run.json")
    assert run["scores"]["unseen/active_parameters"] == 2 * 8 * 128 * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agent": "pppo"}, r"agent='pppo': .*did you mean 'ppo'"),
        ({"env": "DSA-Tex-v0"}, r"env='DSA-Tex-v0': .*DSA-Text-v0"),
        ({"env": "CartPole-v1"}, "env='CartPole-v1': not a registered gating environment"),
        ({"steps": 0}, "steps=0"),
        ({"num_envs": 0}, "num_envs=0"),
        ({"evaluate_every": -5}, "evaluate_every=-5"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_configurations(settings: dict[str, Any], message: str) -> None:
    assert "CartPole-v1" in gym.registry
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_load_run_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run=.*: no run\.json there"):
        load_run(tmp_path)


def test_a_bundle_made_anew_is_noticed(runs: list[Path], bundle_folder: Path, tmp_path: Path) -> None:
    """An agent is not judged on other data than it was trained on."""
    bundle = Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))
    config = TrainConfig(agent="all", bundle=str(bundle), steps=8, num_envs=2)
    run = train(config, tmp_path / "runs")
    table = bundle / "losses" / "test.npy"
    storage.write_array(table, storage.read_array(table) + 1)
    manifest = storage.read_json(bundle / "manifest.json")
    manifest["files"]["losses/test.npy"] = storage.sha256(table)
    storage.write_json(bundle / "manifest.json", manifest)
    with pytest.raises(ValueError, match="has been made anew"):
        load_run(run)
    with pytest.raises(ValueError, match="another configuration or bundle"):
        train(config, tmp_path / "runs")
