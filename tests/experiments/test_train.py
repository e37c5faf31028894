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
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsa_gym import storage
from dsa_gym.agents import AGENTS
from dsa_gym.agents.base import Agent, zoo_defaults
from dsa_gym.bundle import Bundle
from dsa_gym.experiments.cli import main
from dsa_gym.experiments.evaluate import evaluate
from dsa_gym.experiments.monitor import Monitor
from dsa_gym.experiments.train import TrainConfig, load_run, read_curve, read_manifest, resume, train
from dsa_gym.problem import GatingProblem

Command = Callable[..., list[str]]
SCORES = ("loss", "penalty", "reward", "active_parameters", "density", "normalized_score", "regret")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


@pytest.mark.slow  # a search of the best static mask through the model for each of four runs
@pytest.mark.parametrize("agent", ["ppo", "sac"])
def test_resumed_run_on_computed_losses(
    agent: str, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_log: Any
) -> None:
    """Losses that are computed in batches, remembered, and forgotten: number for number the uninterrupted run."""
    settings = {"hidden": [8], "batch_size": 16, "learning_rate": 0.01}
    settings |= {"n_steps": 4} if agent == "ppo" else {"learning_starts": 8}
    config = TrainConfig(
        agent=agent,
        bundle=str(bundle_folder),
        granularity="component",
        steps=96,
        num_envs=4,
        evaluate_every=32,
        settings=settings,
    )
    whole, save = train(config, tmp_path / "whole"), Agent.save

    def save_and_die(self: Agent, folder: Path) -> None:
        save(self, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Agent, "save", save_and_die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path / "killed")
    killed = train(config, tmp_path / "killed")
    assert (killed / "agent.safetensors").read_bytes() == (whole / "agent.safetensors").read_bytes()
    first, second = (storage.read_json(run / "run.json")["scores"] for run in (whole, killed))
    assert first == second


def test_policy_of_stable_baselines_is_a_run(
    bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = gym.make("DSA-Text-v0", bundle=str(bundle_folder))
    model = PPO(
        "MultiInputPolicy", env, n_steps=32, batch_size=32, seed=0, device="cpu", policy_kwargs={"net_arch": [8]}
    )
    model.learn(32)
    model.save(tmp_path / "theirs.zip")
    command = ["import", str(tmp_path / "theirs.zip"), "--bundle", str(bundle_folder), "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "runs whatever code is in the file" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*command, "--trust"]) == 0
    config, agent = load_run(tmp_path / "run")
    assert config.agent == "ppo" and agent.steps == 32 and agent.config["hidden"] == [8]
    problem = config.problem("test")
    expected, _ = model.predict(problem.observations, deterministic=True)
    np.testing.assert_array_equal(agent.masks(problem), expected)
    assert main([*command, "--trust"]) == 0, "the same run again"


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


SIZES = {
    "ppo": {"epochs": 1, "hidden": [8], "batch_size": 64, "learning_rate": 0.01, "n_steps": 4},
    "factored_ppo": {"batch_size": 8, "masks": 4, "minibatches": 2, "epochs": 2},
    "rloo": {"batch_size": 8, "masks": 4},
    "gumbel": {"batch_size": 8, "anneal_steps": 256},
}


@pytest.mark.parametrize("agent", sorted(SIZES))
@pytest.mark.parametrize("env", ["DSA-TextTable-v0", "DSA-Planted-v0"])
def test_interrupted_and_resumed_is_uninterrupted(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_log: Any, agent: str, env: str
) -> None:
    """Byte for byte: weights, optimiser, step count; number for number: the curve and the scores."""
    bundle = None if env == "DSA-Planted-v0" else str(bundle_folder)
    env_settings = {"users": 20, "inputs": 4} if bundle is None else {}
    config = TrainConfig(env=env, agent=agent, bundle=bundle, steps=256, seed=3, num_envs=4, evaluate_every=64,
                         settings=SIZES[agent], env_settings=env_settings)  # fmt: skip
    whole = train(config, tmp_path / "whole")

    class Interrupting(quiet_log):  # type: ignore[misc]
        def scalars(self, step: int, values: dict[str, float]) -> None:
            if step > 160:  # between two checkpoints
                raise KeyboardInterrupt

    monkeypatch.setattr("dsa_gym.experiments.train.PolicyLog", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed")
    run = tmp_path / "killed" / whole.name
    assert 0 < storage.read_json(run / "agent.json")["steps"] <= 160
    monkeypatch.setattr("dsa_gym.experiments.train.PolicyLog", quiet_log)
    assert resume(run) == run
    assert (run / "agent.safetensors").read_bytes() == (whole / "agent.safetensors").read_bytes()
    curves = [[{**row, "seconds": None} for row in read_curve(folder)] for folder in (run, whole)]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 4
    assert read_curve(run)[-1]["seconds"] == read_manifest(run)["seconds"]
    assert read_manifest(run)["scores"] == read_manifest(whole)["scores"]


def test_resume_takes_the_runs_own_settings(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsa_gym.agents.ppo.PPOAgent.learn", lambda *_: pytest.fail("it learns again"))
    before = snapshot(runs[0])
    assert main(["train", "--resume", str(runs[0])]) == 0
    assert "finished already" in capsys.readouterr().out
    assert snapshot(runs[0]) == before
    assert main(["train", "--resume", str(runs[0]), "--steps", "512"]) == 2
    assert "--steps: not with --resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "no run.json there" in capsys.readouterr().err
    storage.write_json(tmp_path / "run.json", {"other": 1})
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "run.json has no 'config'" in capsys.readouterr().err


def test_scores_that_are_not_finite(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_log: Any
) -> None:
    config = TrainConfig(env="DSA-TextTable-v0", agent="none", bundle=str(bundle_folder), steps=8, num_envs=2)
    monkeypatch.setattr(Monitor, "__call__", lambda *_: ({"unseen/reward": float("nan")}, {}))
    with pytest.raises(FloatingPointError, match="none: scores are not finite"):
        train(config, tmp_path)


def test_arguments_of_environments(tmp_path: Path, quiet_log: Any) -> None:
    arguments = ["train", "--env", "DSA-Planted-v0", "--agent", "static", "--l0-penalty", "1e-4", "--num-envs", "2"]
    arguments += ["--env-set", "gates=512", "users=10", "noise=1e-1", "--logdir", str(tmp_path)]
    assert main(arguments) == 0
    run = tmp_path / "DSA-Planted-v0-static-seed0"
    config, agent = load_run(run)
    assert config.env_settings == {"gates": 512, "users": 10, "noise": 0.1}
    assert (agent.gates, agent.scorer.l0_penalty) == (512, 1e-4)
    assert storage.read_json(run / "run.json")["bundle"]["instance"]["noise"] == 0.1
    result = evaluate([run])
    assert result["oracle_kind"] == "exact"
    assert result["normalized_score"]["mean"] == 0
    assert result["ladder"]["reference"]["mean"] == result["ladder"]["oracle"]["mean"]


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
        ({"env": "DSA-TextTable-v0", "reward_metric": "rouge"}, "DSA-TextTable-v0 takes no reward_metric"),
        ({"env": "DSA-Planted-v0", "bundle": "x"}, "DSA-Planted-v0 takes no bundle"),
        ({"env": "DSA-TextBudget-v0"}, "env='DSA-TextBudget-v0'"),
        ({"env": "DSA-Planted-v0", "env_settings": {"gate": 1}}, "takes no 'gate'; expected one of active, "),
        ({"env": "DSA-TextTable-v0", "env_settings": {"gates": 1}}, "takes no 'gates'; expected one of episode_length"),
        ({"env": "DSA-Planted-v0", "env_settings": {"split": "test"}}, "env_settings: 'split' is set elsewhere"),
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
