"""What TensorBoard shows of a run: read back with TensorBoard's own reader."""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.projector import ProjectorConfig

from dsa_gym import storage
from dsa_gym.experiments.monitor import Monitor
from dsa_gym.experiments.policy_analysis import agreement, bernoulli_kl, information
from dsa_gym.experiments.tensorboard import (
    ExamplePanel,
    PolicyLog,
    activation_map,
    heatmap,
    markdown_table,
    mask_colours,
    mask_name,
)
from dsa_gym.experiments.train import TrainConfig, load_run, train
from dsa_gym.ladder import normalised_score, shuffled


def read(folder: Path) -> Any:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def final(events: Any, tag: str) -> float:
    return float(events.Scalars(tag)[-1].value)


def text_of(events: Any, tag: str) -> str:
    return str(events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode())


@pytest.fixture(scope="module")
def events(runs: list[Path]) -> Any:
    return read(runs[0])


@pytest.fixture(scope="module")
def watched(runs: list[Path]) -> tuple[Any, Any, Any]:
    """Agent, problem of unseen users, decisions of the finished run."""
    config, agent = load_run(runs[0])
    problem = config.problem("validation")
    return agent, problem, agent.masks(problem)


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a planted instance, whose best masks are known and not empty."""
    config = TrainConfig(
        env="DSA-Planted-v0",
        steps=256,
        num_envs=4,
        evaluate_every=128,
        settings={"epochs": 1, "hidden": [8], "batch_size": 64, "learning_rate": 0.01},
        env_settings={"users": 5, "inputs": 3, "gates": 4},
    )
    return train(config, tmp_path_factory.mktemp("planted"))


@dataclass
class Chance:
    """A policy of given probabilities, the same for every input."""

    p: list[float]
    steps: int = 0

    def masks(self, scorer: Any) -> Any:
        return np.tile(np.array(self.p) > 0.5, (len(scorer), 1)).astype(np.uint8)

    def probabilities(self, observation: dict[str, Any]) -> Any:
        return np.tile(self.p, (len(observation["user"]), 1))


@pytest.fixture(scope="module")
def planted() -> Monitor:
    return Monitor.of_env("DSA-Planted-v0", users=5, inputs=3, gates=4)


def write(folder: Path, monitor: Monitor, *policies: Chance, last: bool = False, begun: Chance | None = None) -> Any:
    log = PolicyLog(folder, monitor, begun or Chance([0.5] * 4))
    for i, policy in enumerate(policies, start=1):
        scores, decisions = monitor(policy)
        log.evaluation(policy, scores, decisions, last=last and i == len(policies))
    log.hparams({"agent": "test"}, {})
    return read(folder)


@pytest.mark.parametrize("part", ["seen", "unseen"])
@pytest.mark.parametrize(
    "name", ["loss", "penalty", "reward", "density", "active_parameters", "normalized_score", "regret"]
)
def test_scores_of_seen_and_unseen_users(runs: list[Path], events: Any, part: str, name: str) -> None:
    shown = events.Scalars(f"{part}/{name}")
    assert [event.step for event in shown] == [128, 256]
    score = storage.read_json(runs[0] / "run.json")["scores"][f"{part}/{name}"]
    assert shown[-1].value == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("part", ["seen", "unseen"])
def test_the_parts_make_the_reward_and_the_regret(runs: list[Path], events: Any, part: str) -> None:
    values = {name: final(events, f"{part}/{name}") for name in ("loss", "penalty", "reward", "regret")}
    assert values["reward"] == pytest.approx(-values["loss"] - values["penalty"], rel=1e-5)
    problem = load_run(runs[0])[0].problem("validation" if part == "unseen" else "seen")
    assert values["regret"] == pytest.approx(problem.measured_rewards().max(1).mean() - values["reward"], rel=1e-4)


def test_gain_over_static_has_an_interval_over_users(runs: list[Path], events: Any) -> None:
    for part, split in (("seen", "seen"), ("unseen", "validation")):
        low, mean, high = (final(events, f"{part}/gain_over_static{end}") for end in ("_low", "", "_high"))
        assert low <= mean <= high
        config = load_run(runs[0])[0]
        problem, train_problem = config.problem(split), config.problem("train")
        static = problem.measured_rewards()[:, train_problem.measured_rewards().mean(0).argmax()].mean()
        assert mean == pytest.approx(final(events, f"{part}/reward") - static, abs=1e-5)


@pytest.mark.parametrize("name", ["activation", "entropy", "kl"])
def test_the_policy_gate_by_gate(events: Any, name: str) -> None:
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(f"gate_{name}/")]
    assert sorted(tags) == [f"gate_{name}/{gate}" for gate in range(4)]
    values = np.array([[event.value for event in events.Scalars(tag)] for tag in tags])
    assert values.shape == (4, 2)
    assert (values > 0).all() if name == "kl" else ((values >= 0) & (values <= 1)).all()


def test_means_over_gates(events: Any) -> None:
    for whole, single in (
        ("policy/entropy_per_gate", "gate_entropy"),
        ("policy/kl_per_gate", "gate_kl"),
        ("policy/activation", "gate_activation"),
        ("uses/user_information", "gate_user_information"),
        ("uses/input_information", "gate_input_information"),
    ):
        gates = np.mean([final(events, f"{single}/{gate}") for gate in range(4)])
        assert final(events, whole) == pytest.approx(gates, rel=1e-4, abs=1e-7)
    rates = [final(events, f"gate_activation/{gate}") for gate in range(4)]
    assert final(events, "policy/least_active") == min(rates)
    assert final(events, "policy/most_active") == max(rates)


def test_entropy_and_information_are_those_of_the_saved_policy(watched: Any, events: Any) -> None:
    agent, problem, _ = watched
    p = agent.probabilities(problem.observations)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean(0)
    told = information(p, problem.user.numpy())
    for gate in range(4):
        assert final(events, f"gate_entropy/{gate}") == pytest.approx(entropy[gate], rel=1e-4)
        assert final(events, f"gate_user_information/{gate}") == pytest.approx(told.user[gate], rel=1e-3, abs=1e-6)
        assert final(events, f"gate_input_information/{gate}") == pytest.approx(told.input[gate], rel=1e-3, abs=1e-6)


def test_score_with_the_masks_of_others(runs: list[Path], watched: Any, events: Any) -> None:
    _, problem, decisions = watched
    monitor = Monitor.of_env("DSA-Text-v0", **load_run(runs[0])[0].env_arguments)
    assert final(events, "uses/score") == final(events, "unseen/normalized_score")
    for over in ("users", "inputs"):
        reward = shuffled(problem, decisions, over=over).mean()
        expected = normalised_score(reward, *monitor.ends["unseen"])
        assert final(events, f"uses/score_shuffled_{over}") == pytest.approx(expected, rel=1e-4)


def test_agreement_with_the_best_masks(planted_run: Path) -> None:
    config, agent = load_run(planted_run)
    problem: Any = config.problem("validation")
    events, decisions, best = read(planted_run), agent.masks(problem), problem.optimum(np.arange(len(problem)))
    found = agreement(decisions, best)
    defined = 0
    for name in ("precision", "recall"):
        for gate, value in enumerate(getattr(found, name)):
            if not np.isnan(value):
                assert final(events, f"gate_{name}/{gate}") == pytest.approx(value)
                defined += 1
    assert defined > 4
    both = (decisions & best).sum()
    assert final(events, "oracle/precision") == pytest.approx(both / decisions.sum())
    assert final(events, "oracle/recall") == pytest.approx(both / best.sum())


def test_what_is_not_defined_is_not_written(planted: Monitor, tmp_path: Path) -> None:
    """A gate that is never on has no precision."""
    tags = write(tmp_path, planted, Chance([0.9, 0.1, 0.9, 0.9], steps=10)).Tags()["scalars"]
    assert {"gate_precision/0", "gate_recall/1"} <= set(tags)
    assert "gate_precision/1" not in tags


def test_diversity_of_the_masks(watched: Any, events: Any) -> None:
    counts = Counter(mask.tobytes() for mask in watched[2])
    assert final(events, "diversity/distinct") == len(counts)


def test_what_the_learner_says(events: Any) -> None:
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/entropy_loss", "train/approx_kl"} <= tags


def test_the_layout_names_what_there_is(planted_run: Path) -> None:
    """Every chart of the custom scalars dashboard has something to show."""
    events = read(planted_run)
    shown = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert [category.title for category in shown.category] == [
        "Policy quality",
        "Reward parts",
        "What the policy uses",
        "Gates",
        "Training",
    ]
    tags = events.Tags()["scalars"]
    margins = 0
    for category in shown.category:
        for chart in category.chart:
            series = list(chart.multiline.tag)
            for margin in chart.margin.series:
                margins += 1
                series += [f"^{re.escape(tag)}$" for tag in (margin.value, margin.lower, margin.upper)]
            matched = [any(re.search(pattern, tag) for tag in tags) for pattern in series]
            assert any(matched), f"{category.title}: {chart.title}"
            assert all(matched) or category.title == "Training", f"{category.title}: {chart.title}"
    assert margins == 3


def test_images_of_the_gates(watched: Any, events: Any) -> None:
    _, problem, decisions = watched
    assert [image.step for image in events.Images("gates/users")] == [128, 256]
    users = problem.user.numpy()
    rate = np.stack([decisions[users == user].mean(0) for user in np.unique(users)])
    names = [problem.bundle.users[user] for user in np.unique(users)]
    layers = [f"layer {layer} {kind}" for layer in range(4) for kind in ("attention", "feed forward")]
    expected = {
        "gates/users": heatmap(rate, names, list("0123"), across="gates"),
        "gates/sites": heatmap(np.tile(decisions.mean(0), (8, 1)), layers, list("0123"), across="pathways"),
    }
    for tag, picture in expected.items():
        with Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)) as shown:
            np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), picture)


def test_heatmap_colours_its_cells() -> None:
    """Dark for never, bright for always, in the order of rows and columns."""
    picture = heatmap(np.array([[0.0, 1.0, 0.5]]), ["one row"], ["0", "1", "2"], across="gates").astype(int)
    row = np.flatnonzero((picture != 255).any(2).sum(1) > 60)[0] + 12  # through the middle of the cells
    colours = [tuple(colour) for colour in picture[row].tolist()]
    cells = [colour for colour, times in Counter(colours).items() if times == 20]
    assert sorted(cells, key=colours.index) == [(68, 1, 84), (253, 231, 37), (33, 145, 140)]


def test_activation_map_of_finer_gates(runs: list[Path]) -> None:
    config = load_run(runs[0])[0]
    bundle = str(config.bundle)
    rate = np.linspace(0, 1, 16)
    layers = TrainConfig(bundle=bundle, granularity="layer").problem("validation")
    values, names, across = activation_map(layers, rate)
    np.testing.assert_allclose(values, rate.reshape(4, 4).repeat(2, axis=0))
    assert (names[3], across) == ("layer 1 feed forward", "pathways")
    components = TrainConfig(bundle=bundle, granularity="component").problem("validation")
    values, _, across = activation_map(components, np.linspace(0, 1, 64))
    np.testing.assert_allclose(values, np.linspace(0, 1, 64).reshape(8, 8))
    assert across == "components"


def test_activation_map_of_a_planted_instance(planted: Monitor) -> None:
    values, names, across = activation_map(planted.problems["unseen"], np.array([0.1, 0.2, 0.3, 0.4]))
    assert (values.tolist(), names, across) == ([[0.1, 0.2, 0.3, 0.4]], ["channel 0"], "positions")


def columns_of(table: str) -> list[dict[str, str]]:
    """The examples of a panel, each by the names of the rows."""
    cells = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in table.splitlines()]
    assert set(cells.pop(1)) == {"---"}
    names, *examples = zip(*cells, strict=True)
    return [{name: re.sub(r"\\(.)", r"\1", text) for name, text in zip(names, each, strict=True)} for each in examples]


def test_examples(watched: Any, events: Any) -> None:
    _, problem, decisions = watched
    shown = columns_of(text_of(events, "examples"))
    inputs = ExamplePanel(problem).inputs
    assert len(shown) == len(inputs) == 2  # users
    nothing = np.zeros(4, np.uint8)
    for index, example in zip(inputs, shown, strict=True):
        mask = decisions[index]
        assert example["mask"] == "".join(map(str, mask))
        losses = problem.losses(np.array([index, index]), np.stack([mask, nothing]))
        assert example["loss with the mask"] == f"{losses[0]:.4g}"
        assert example["loss, nothing on"] == f"{losses[1]:.4g}"
        assert example["user"] == problem.bundle.users[int(problem.user[index])]
        for how, gates in (("with the mask", mask), ("nothing on", nothing)):
            written = problem.outcome(int(index), gates)["model writes"]
            assert html.unescape(example[f"model writes, {how}"]) == " ".join(written.split())
        assert example["prompt"]
        assert example["continuation"]


def test_examples_without_the_model(planted: Monitor, tmp_path: Path) -> None:
    policy = Chance([0.9, 0.1, 0.1, 0.1], steps=10)
    examples = columns_of(text_of(write(tmp_path, planted, policy), "examples"))
    problem: Any = planted.problems["unseen"]
    assert [example["mask"] for example in examples] == ["1000"] * 3
    assert [example["user"] for example in examples] == ["user-0", "user-2", "user-4"]
    best = problem.optimum(ExamplePanel(problem).inputs)
    assert [example["best mask"] for example in examples] == ["".join(map(str, mask)) for mask in best]


def test_markdown_shows_text_as_it_is() -> None:
    table = markdown_table([{"a": "x|y *z*\nnext", "b": "<b>`c`"}])
    assert table.splitlines() == [r"| a | x\|y \*z\* next |", "| --- | --- |", r"| b | &lt;b&gt;\`c\` |"]


def test_users_for_the_projector(runs: list[Path], watched: Any) -> None:
    agent, _, _ = watched
    config = text_format.Parse((runs[0] / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (shown,) = config.embeddings
    embeddings = np.loadtxt(runs[0] / shown.tensor_path, delimiter="\t")
    head, *rows = [line.split("\t") for line in (runs[0] / shown.metadata_path).read_text().splitlines()]
    assert head == ["user", "users", "most frequent mask", "density"]
    seen, unseen = (load_run(runs[0])[0].problem(split) for split in ("seen", "validation"))
    assert len(rows) == len(embeddings) == len(seen.user.unique()) + len(unseen.user.unique())
    masks = agent.masks(unseen)
    first = int(np.flatnonzero(unseen.user.numpy() == unseen.user.numpy().min())[0])
    place = len(seen.user.unique())
    np.testing.assert_allclose(embeddings[place], unseen.observations["user"][first], rtol=1e-5)
    own = masks[unseen.user.numpy() == unseen.user.numpy().min()]
    common = Counter(map(bytes, own)).most_common(1)[0][1]
    named = [mask for mask in np.unique(own, axis=0) if Counter(map(bytes, own))[bytes(mask)] == common]
    name, kind, mask, density = rows[place]
    assert (name, kind) == (unseen.bundle.users[int(unseen.user.min())], "unseen")
    assert mask in {mask_name(each) for each in named}
    assert float(density) == pytest.approx(own.mean(), abs=1e-3)
    with Image.open(runs[0] / shown.sprite.image_path) as sprite:
        side = int(np.ceil(np.sqrt(len(rows))))
        assert sprite.size == (16 * side, 16 * side)
        tiles = np.asarray(sprite)[8::16, 8::16].reshape(-1, 3)[: len(rows)]
    kinds = {(row[2], tuple(tile)) for row, tile in zip(rows, tiles.tolist(), strict=True)}
    assert len(kinds) == len({row[2] for row in rows})  # a colour for each mask


def test_names_and_colours_of_masks() -> None:
    assert mask_name(np.array([0, 1, 0, 1], np.uint8)) == "gates 1 3"
    assert mask_name(np.zeros(4, np.uint8)) == "nothing"
    many = np.ones(20, np.uint8)
    assert mask_name(many).startswith("20 gates, ")
    assert mask_name(many) != mask_name(np.ones(21, np.uint8))
    masks = np.array([[0], [1], [1], [0], [1]], np.uint8)
    colours = mask_colours(masks)
    assert (colours[1] == colours[2]).all()
    assert (colours[0] == colours[3]).all()
    assert (colours[0] != colours[1]).any()


def test_hyperparameters_with_final_scores(events: Any, runs: list[Path]) -> None:
    content = events.PluginTagToContent("hparams")
    started = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert started.hparams["agent"].string_value == "ppo"
    assert started.hparams["learning_rate"].number_value == 0.01
    assert started.hparams["hidden"].string_value == "[8]"
    assert {"seed", "epochs"} <= set(started.hparams)
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    metrics = {metric.name.tag for metric in experiment.metric_infos}
    scores = storage.read_json(runs[0] / "run.json")["scores"]
    assert metrics == set(scores)
    for name, score in scores.items():  # the tab shows the last value of the scalar
        assert final(events, name) == pytest.approx(score, rel=1e-5)


def test_expensive_parts_are_written_now_and_then(planted: Monitor, tmp_path: Path) -> None:
    policies = [Chance([0.6, 0.2, 0.2, 0.2], steps=10 * i) for i in range(1, 8)]
    events = write(tmp_path, planted, *policies, last=True)
    assert [event.step for event in events.Scalars("uses/score")] == [10, 20, 30, 40, 50, 60, 70]
    assert [image.step for image in events.Images("gates/users")] == [10, 20, 40, 70]
    assert [event.step for event in events.Tensors("examples/text_summary")] == [10, 20, 40, 70]


def test_divergence_is_from_the_evaluation_before(planted: Monitor, tmp_path: Path) -> None:
    """Also of a run that goes on: it begins with the policy that was saved after the last evaluation."""
    begun, first, second = Chance([0.5] * 4), Chance([0.6] * 4, steps=10), Chance([0.3] * 4, steps=20)
    whole = write(tmp_path / "whole", planted, first, second, begun=begun).Scalars("policy/kl_per_gate")
    expected = [bernoulli_kl(np.array(a), np.array(b)) for a, b in ((0.6, 0.5), (0.3, 0.6))]
    assert [event.value for event in whole] == pytest.approx(expected, rel=1e-5)
    write(tmp_path / "parts", planted, first, begun=begun)
    resumed = write(tmp_path / "parts", planted, second, begun=first).Scalars("policy/kl_per_gate")
    assert [event.value for event in resumed] == [event.value for event in whole]


def test_a_policy_without_probabilities(tmp_path: Path) -> None:
    """An agent that only decides has no entropy, and tells of inputs what its decisions tell."""
    instance = {"users": 5, "inputs": 3, "gates": 4}
    config = TrainConfig(env="DSA-Planted-v0", agent="oracle", steps=1, num_envs=2, env_settings=instance)
    events = read(train(config, tmp_path))
    tags = events.Tags()["scalars"]
    assert not [tag for tag in tags if "entropy_per_gate" in tag or "kl" in tag]
    assert final(events, "oracle/precision") == final(events, "oracle/recall") == 1
    assert final(events, "unseen/regret") == pytest.approx(0, abs=1e-5)
    decisions = load_run(tmp_path / config.folder_name)[1].masks(config.problem("validation"))
    rate = decisions.mean(0)
    total = sum(-p * np.log(p) - (1 - p) * np.log(1 - p) for p in rate if 0 < p < 1) / len(rate)
    assert final(events, "uses/user_information") + final(events, "uses/input_information") == pytest.approx(total)


def test_a_continued_run_hides_what_was_after_its_checkpoint(planted: Monitor, tmp_path: Path) -> None:
    first = PolicyLog(tmp_path, planted, Chance([0.5] * 4))
    for step in (100, 200, 300):
        first.scalars(step, {"unseen/loss": float(step)})
    first.hparams({"agent": "test"}, {})
    # killed; its last checkpoint was at 200
    second = PolicyLog(tmp_path, planted, Chance([0.5] * 4, steps=200))
    second.scalars(300, {"unseen/loss": -300.0})
    second.hparams({"agent": "test"}, {})
    shown = [(event.step, event.value) for event in read(tmp_path).Scalars("unseen/loss")]
    assert shown == [(100, 100.0), (200, 200.0), (300, -300.0)]


def test_a_run_begun_anew_hides_all_of_the_killed_one(planted: Monitor, tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        log = PolicyLog(tmp_path, planted, Chance([0.5] * 4))
        log.scalars(50, {"unseen/loss": value})
        log.hparams({"agent": "test"}, {})
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("unseen/loss")] == [(50, 2.0)]
