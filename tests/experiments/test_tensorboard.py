"""What TensorBoard shows of a run: read back with TensorBoard's own reader."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsa_gym import storage
from dsa_gym.experiments.tensorboard import PolicyLog, bernoulli_entropy, bernoulli_kl
from dsa_gym.experiments.train import load_run


def read(folder: Path) -> Any:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


@pytest.fixture(scope="module")
def events(runs: list[Path]) -> Any:
    return read(runs[0])


@pytest.mark.parametrize("part", ["seen", "unseen"])
@pytest.mark.parametrize("name", ["loss", "reward", "density", "active_parameters", "normalized_score"])
def test_scores_of_seen_and_unseen_users(runs: list[Path], events: Any, part: str, name: str) -> None:
    shown = events.Scalars(f"{part}/{name}")
    assert [event.step for event in shown] == [128, 256]
    final = storage.read_json(runs[0] / "run.json")["scores"][f"{part}/{name}"]
    assert shown[-1].value == pytest.approx(final, rel=1e-5)


@pytest.mark.parametrize("name", ["gate_activation", "gate_entropy", "gate_kl"])
def test_the_policy_gate_by_gate(events: Any, name: str) -> None:
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(f"{name}/")]
    assert sorted(tags) == [f"{name}/{gate}" for gate in range(4)]
    values = np.array([[event.value for event in events.Scalars(tag)] for tag in tags])
    assert values.shape == (4, 2)
    assert (values >= 0).all()
    if name == "gate_kl":
        assert (values[:, 0] == 0).all()  # nothing to compare the first evaluation with
        assert (values[:, 1] > 0).all()
    else:
        assert (values <= 1).all()


def test_means_over_gates(events: Any) -> None:
    for whole, single in (
        ("policy/entropy_per_gate", "gate_entropy"),
        ("policy/kl_per_gate", "gate_kl"),
    ):
        gates = np.mean([events.Scalars(f"{single}/{gate}")[-1].value for gate in range(4)])
        assert events.Scalars(whole)[-1].value == pytest.approx(gates, rel=1e-4)


def test_entropy_is_that_of_the_saved_policy(runs: list[Path], events: Any) -> None:
    config, agent = load_run(runs[0])
    p = agent.probabilities(config.problem("validation").observations)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean(0)
    for gate in range(4):
        assert events.Scalars(f"gate_entropy/{gate}")[-1].value == pytest.approx(entropy[gate], rel=1e-4)


def test_what_the_learner_says(events: Any) -> None:
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/entropy_loss", "train/approx_kl"} <= tags


def test_image_of_gates_and_users(runs: list[Path], events: Any) -> None:
    images = events.Images("gates/users")
    assert [image.step for image in images] == [128, 256]
    with Image.open(io.BytesIO(images[-1].encoded_image_string)) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (2 * 16, 4 * 16)  # two validation users, four gates
    config, agent = load_run(runs[0])
    problem = config.problem("validation")
    users, decisions = problem.user.numpy(), agent.masks(problem)
    rate = np.stack([decisions[users == user].mean(0) for user in np.unique(users)])
    np.testing.assert_allclose(pixels[8::16, 8::16] / 255, rate, atol=3e-3)


def test_hyperparameters_with_final_scores(events: Any, runs: list[Path]) -> None:
    content = events.PluginTagToContent("hparams")
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(content)
    said = content["_hparams_/session_start_info"] + content["_hparams_/experiment"]
    for name in (b"agent", b"ppo", b"learning_rate", b"seed", b"hidden"):
        assert name in said
    final = storage.read_json(runs[0] / "run.json")["scores"]["unseen/normalized_score"]
    shown = events.Scalars("final/unseen/normalized_score")
    assert shown[-1].value == pytest.approx(final, rel=1e-5)


def test_a_continued_run_hides_what_was_after_its_checkpoint(runs: list[Path], tmp_path: Path) -> None:
    config, _ = load_run(runs[0])
    problem = config.problem("validation")
    first = PolicyLog(tmp_path, problem)
    for step in (100, 200, 300):
        first.scalars(step, {"unseen/loss": float(step)})
    first.hparams({"agent": "test"}, {})
    # killed; its last checkpoint was at 200
    second = PolicyLog(tmp_path, problem, start=200)
    second.scalars(300, {"unseen/loss": -300.0})
    second.hparams({"agent": "test"}, {})
    shown = [(event.step, event.value) for event in read(tmp_path).Scalars("unseen/loss")]
    assert shown == [(100, 100.0), (200, 200.0), (300, -300.0)]


def test_a_run_begun_anew_hides_all_of_the_killed_one(runs: list[Path], tmp_path: Path) -> None:
    problem = load_run(runs[0])[0].problem("validation")
    for value in (1.0, 2.0):
        log = PolicyLog(tmp_path, problem)
        log.scalars(50, {"unseen/loss": value})
        log.hparams({"agent": "test"}, {})
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("unseen/loss")] == [(50, 2.0)]


def test_divergence_and_entropy_of_gates() -> None:
    p, q = np.array([0.5, 0.9, 0.25]), np.array([0.5, 0.5, 0.75])
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(bernoulli_kl(p, q), kl)
    assert bernoulli_kl(p, q)[0] == pytest.approx(0)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(bernoulli_entropy(p), entropy)
