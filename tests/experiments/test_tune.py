"""Tuning: what is searched, that a killed study goes on, and what a study leaves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dsa_gym import storage
from dsa_gym.agents import AGENTS
from dsa_gym.agents.base import zoo, zoo_defaults
from dsa_gym.experiments import tune as tuning
from dsa_gym.experiments.cli import main
from dsa_gym.experiments.train import TrainConfig, train
from dsa_gym.experiments.tune import FIRST_SEED, TuneConfig, encode, fragment, merged, search_space, suggest, tune

RUN = TrainConfig(env="DSA-Planted-v0", agent="rloo", steps=768, env_settings={"users": 12, "inputs": 4})
STUDY = TuneConfig(RUN, trials=4, seeds=2, evaluations=3)
COMMAND = ["tune", "--agent", "rloo", "--env", "DSA-Planted-v0", "--env-set", "users=12", "inputs=4",
           "--steps", "768", "--trials", "4", "--evaluations", "3"]  # fmt: skip


DEFAULTS = zoo_defaults("rloo", "DSA-Planted-v0")


def trials(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What must not depend on time: settings and scores of the trials that count."""
    return [
        (row["state"], row["settings"], row["curve"], row["scores"])
        for row in record["trials"]
        if row["state"] != "fail"
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study; tests must not change it."""
    folder = tmp_path_factory.mktemp("tune") / "study"
    assert main([*COMMAND, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def record(finished: Path) -> dict[str, Any]:
    return dict(storage.read_json(finished / "study.json"))


def test_what_a_study_leaves(finished: Path, record: dict[str, Any]) -> None:
    assert [row["number"] for row in record["trials"]] == [0, 1, 2, 3]
    assert record["trials"][0]["settings"] == {name: DEFAULTS[name] for name in zoo("rloo")["search"]}
    for row in record["trials"]:
        assert row["state"] == "complete" and len(row["curve"]) == 3 and len(row["scores"]) == 2
        assert row["value"] == row["curve"][-1] == pytest.approx(np.mean(row["scores"]))
    values = [row["value"] for row in record["trials"]]
    assert record["best_value"] == max(values) and record["best"] == int(np.argmax(values))
    assert record["defaults_value"] == values[0]
    assert record["importance"].keys() == zoo("rloo")["search"].keys()
    assert sum(record["importance"].values()) == pytest.approx(1)
    assert record["seconds"] > 0 and record["versions"]["optuna"]
    for name in ("importance.png", "history.png"):
        with Image.open(finished / name) as picture:
            assert picture.width > 500 and len(np.unique(np.asarray(picture))) > 10


def test_the_fragment_for_the_zoo(finished: Path, record: dict[str, Any]) -> None:
    best = record["trials"][record["best"]]["settings"]
    found = yaml.safe_load((finished / "best.yaml").read_text())
    settings = zoo_defaults("rloo")  # of all environments
    entry = found["environments"]["DSA-Planted-v0"]
    assert {**settings, **entry} == {**DEFAULTS, **best}
    assert all(settings[name] != value for name, value in entry.items())
    about = found["studies"]["DSA-Planted-v0"]
    assert about["command"].startswith("dsa-gym tune --agent rloo") and about["split"] == "validation"
    assert (about["trials"], about["steps"], about["seeds"], about["bundle"]) == (4, 768, 2, None)
    assert about["score"] == pytest.approx(record["best_value"], abs=1e-4)
    assert about["score_of_defaults"] == pytest.approx(record["defaults_value"], abs=1e-4)


def test_a_trial_trains_as_train_does(record: dict[str, Any], tmp_path: Path) -> None:
    row = record["trials"][1]
    for place, seed in enumerate((FIRST_SEED, FIRST_SEED + 1)):
        run = train(replace(RUN, seed=seed, settings=row["settings"], evaluate_every=256), tmp_path)
        scores = storage.read_json(run / "run.json")["scores"]
        assert row["scores"][place] == scores["unseen/normalized_score"]


def test_agents_that_draw_from_the_global_generators_do_not_mix() -> None:
    """stable-baselines3 does; side by side, each seed learns what it learns alone."""
    settings = {"n_steps": 8, "batch_size": 64, "epochs": 1, "hidden": [8], "learning_rate": 0.01}
    config = replace(RUN, agent="ppo", num_envs=16, steps=512, evaluate_every=256, settings=settings)
    runs = [replace(config, seed=seed) for seed in (3, 4)]
    monitor = tuning.Monitor.of_env(config.env, **config.env_arguments)
    both = [scores for _, scores in tuning.learning_curve(runs, monitor)]
    alone = [[scores[0] for _, scores in tuning.learning_curve([run], monitor)] for run in runs]
    assert both == [list(pair) for pair in zip(*alone, strict=True)]


def test_same_seed_same_trials_and_another_seed_others(record: dict[str, Any], tmp_path: Path) -> None:
    assert trials(tune(replace(STUDY, trials=3), tmp_path / "same")) == trials(record)[:3]
    other = tune(replace(STUDY, trials=2, seed=1), tmp_path / "other")
    assert trials(other)[0] == trials(record)[0]
    assert trials(other)[1] != trials(record)[1]


def test_killed_and_continued(
    record: dict[str, Any],
    tmp_path: Path,
    start_command: Callable[..., ForkServerProcess],
    kill_when: Callable[..., bool],
) -> None:
    folder = tmp_path / "study"

    def two_trials() -> bool:
        path = folder / "study.json"
        return path.is_file() and len(storage.read_json(path).get("trials", [])) >= 2

    assert kill_when(start_command(*COMMAND, "--out", folder), two_trials, delay=0.02), "it ended before it was killed"
    with (folder / "journal.log").open("ab") as file:
        file.write(b'{"op_code": 4, "work')  # killed while it wrote
    (folder / "journal.log.lock").unlink(missing_ok=True)
    (folder / "journal.log.lock").symlink_to(folder / "journal.log")  # and while it held the journal's own lock
    assert main([*COMMAND, "--out", str(folder)]) == 0
    continued = storage.read_json(folder / "study.json")
    assert trials(continued) == trials(record)
    assert {row["state"] for row in continued["trials"]} <= {"complete", "fail"}


def test_more_trials_and_none_again(
    finished: Path, record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tune(replace(STUDY, trials=2), tmp_path / "study")
    assert len(short["trials"]) == 2
    longer = tune(replace(STUDY, trials=3), tmp_path / "study")
    assert trials(longer) == trials(record)[:3]
    monkeypatch.setattr("dsa_gym.agents.rloo.RLOOAgent.learn", lambda *_: pytest.fail("it learns again"))
    assert trials(tune(STUDY, finished)) == trials(record)
    # what is finished can be written though the zoo file has changed since; what is not would mix two studies
    changed = {**zoo("rloo"), "search": {"masks": {"choices": [8, 32]}}}
    monkeypatch.setattr(tuning, "zoo", lambda name: changed)
    assert trials(tune(STUDY, finished)) == trials(record)
    with pytest.raises(ValueError, match="holds a study of another configuration"):
        tune(replace(STUDY, trials=5), finished)


@pytest.mark.parametrize(
    "changes", [["--steps", "700"], ["--seed", "5"], ["--seeds", "3"], ["--l0-penalty", "0.5"], ["--agent", "disarm"]]
)
def test_another_study_in_the_folder_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str], changes: list[str]
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert main([*COMMAND, *changes, "--out", str(finished)]) == 2
    assert "holds a study of another configuration" in " ".join(capsys.readouterr().err.split())
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_two_at_work_on_one_folder(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with storage.locked(finished):
        assert main([*COMMAND, "--out", str(finished)]) == 2
    assert "another process is at work there" in " ".join(capsys.readouterr().err.split())


def scripted(monkeypatch: pytest.MonkeyPatch, curve: Callable[[dict[str, Any]], Iterator[float]]) -> None:
    """Let trials score what a function of their settings says, in the place of training."""

    def learning_curve(runs: Any, monitor: Any) -> Iterator[tuple[int, list[float]]]:
        steps = range(runs[0].evaluate_every, runs[0].steps + 1, runs[0].evaluate_every)
        for target, score in zip(steps, curve(runs[0].settings), strict=True):
            yield target, [score] * len(runs)

    monkeypatch.setattr(tuning, "learning_curve", learning_curve)


def test_it_finds_what_is_good_and_prunes_what_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def curve(settings: dict[str, Any]) -> Iterator[float]:
        for part in (1, 2, 3):
            yield part * (1 - abs(np.log10(settings["learning_rate"] / 0.005)))

    scripted(monkeypatch, curve)
    record = tune(replace(STUDY, trials=30), tmp_path)
    best = record["trials"][record["best"]]["settings"]
    assert 0.004 < best["learning_rate"] < 0.00625
    assert next(iter(record["importance"])) == "learning_rate" and record["importance"]["learning_rate"] > 0.5
    pruned = [row for row in record["trials"] if row["state"] == "pruned"]
    assert pruned and all(len(row["curve"]) < 3 and row["value"] is None for row in pruned)
    assert fragment(record)["studies"]["DSA-Planted-v0"]["pruned"] == len(pruned)


def test_a_trial_that_diverges_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def curve(settings: dict[str, Any]) -> Iterator[float]:
        yield 0.1
        if settings["learning_rate"] != DEFAULTS["learning_rate"]:
            raise FloatingPointError("weights are not finite")
        yield from (0.2, 0.3)

    scripted(monkeypatch, curve)
    record = tune(STUDY, tmp_path)
    assert [row["state"] for row in record["trials"]] == ["complete", *["diverged"] * 3]
    assert record["trials"][1]["diverged"] == "weights are not finite"
    assert record["best"] == 0
    assert zoo_defaults("rloo") | fragment(record)["environments"]["DSA-Planted-v0"] == DEFAULTS
    tuning.show(record)
    assert "diverged" in capsys.readouterr().out


def test_scores_that_are_not_finite_and_a_study_where_all_diverge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning.Monitor, "__call__", lambda self, agent: ({"unseen/normalized_score": float("nan")}, {}))
    with pytest.raises(FloatingPointError, match="none of 2 trials ended"):
        tune(replace(STUDY, trials=2), tmp_path)
    assert "nan" in storage.read_json(tmp_path / "study.json")["trials"][0]["diverged"]


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main([*COMMAND, "--out", str(tmp_path)]) == 2
    assert "pip install 'dsa-gym[tune]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "0"], "trials=0: expected a positive integer"),
        (["--seeds", "0"], "seeds=0: expected a positive integer"),
        (["--evaluations", "-1"], "evaluations=-1"),
        (["--seed", "-1"], "seed=-1"),
        (["--steps", "0"], "steps=0"),
        (["--agent", "rlo"], "did you mean 'rloo'"),
        (["--agent", "oracle"], "agents/zoo/oracle.yaml has no ranges to search"),
        (["--env", "CartPole-v1"], "not a registered gating environment"),
        (["--env-set", "gates"], "expected NAME=VALUE"),
        (["--env-set", "gates=-3"], "gates=-3"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main([*COMMAND, *arguments, "--out", str(tmp_path / "study")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "study" / "study.json").exists()


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"learning_rat": {"low": 0.1, "high": 1.0}}, "no setting of 'rloo'"),
        ({"learning_rate": {"low": 1.0, "high": 0.1}}, "expected {low, high, log}"),
        ({"learning_rate": {"low": "1e-4", "high": 0.1}}, "expected {low, high, log}"),
        ({"learning_rate": {"low": 0.1}}, "expected {low, high, log}"),
        ({"learning_rate": {"low": 0.1, "high": 1.0, "choices": [1]}}, "expected {low, high, log}"),
        ({"learning_rate": {"choices": []}}, "expected {low, high, log}"),
        ({"learning_rate": 0.1}, "expected {low, high, log}"),
        ({"learning_rate": {"low": 0.01, "high": 1.0}}, "learning_rate: the default .* is outside"),
        ({"masks": {"choices": [2, 4]}}, "masks: the default 8 is outside"),
    ],
)
def test_bad_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: Any, message: str) -> None:
    monkeypatch.setattr(tuning, "zoo", lambda name: {**zoo(name), "search": search})
    with pytest.raises(ValueError, match=message):
        tune(STUDY, tmp_path)


@pytest.mark.parametrize("name", [name for name in AGENTS if zoo(name).get("search")])
def test_ranges_in_the_zoo_hold_the_defaults(name: str) -> None:
    """Those for all environments, and those found by studies."""
    space = search_space(name)
    for env_id in (None, *zoo(name).get("environments", {})):
        encode(zoo_defaults(name, env_id), space)


class Corner:
    """A trial that takes the lowest, or the highest, of everything."""

    def __init__(self, end: int) -> None:
        self.end = end

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        return choices[-self.end]

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
        return (low, high)[self.end]

    suggest_int = suggest_float


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("name", [name for name in AGENTS if zoo(name).get("search")])
def test_an_agent_takes_the_corners_of_its_ranges(name: str, end: int) -> None:
    settings = suggest(Corner(end), search_space(name))
    agent = replace(RUN, agent=name, settings=settings, num_envs=2).make_agent()
    assert {**agent.config, **settings} == agent.config


ZOO = """\
# what was compared
settings:
  hidden: [64, 64]  # two layers
  rate: 0.001
environments:  # by hand
  DSA-Rec-v0:
    rate: 0.01  # faster

# the ranges
search:
  rate: {low: 0.0001, high: 0.1, log: true}
"""


def addition(rate: float, **about: Any) -> dict[str, Any]:
    return {"environments": {"DSA-Text-v0": {"rate": rate, "hidden": [8]}}, "studies": {"DSA-Text-v0": about}}


def test_merged_into_a_zoo_file() -> None:
    text = merged(ZOO, addition(0.3, score=1.0))
    assert [line for line in ZOO.splitlines() if line not in text.splitlines()] == [], (
        "nothing is lost, no comment either"
    )
    found = yaml.safe_load(text)
    assert found["environments"] == {"DSA-Rec-v0": {"rate": 0.01}, "DSA-Text-v0": {"rate": 0.3, "hidden": [8]}}
    assert found["studies"] == {"DSA-Text-v0": {"score": 1.0}}
    again = merged(text, addition(0.4, score=2.0, versions={"torch": "2"}))
    found = yaml.safe_load(again)
    assert found["environments"]["DSA-Text-v0"] == {"rate": 0.4, "hidden": [8]}
    assert found["studies"] == {"DSA-Text-v0": {"score": 2.0, "versions": {"torch": "2"}}}
    assert again.count("DSA-Text-v0") == 2 and again.count("# faster") == 1
    assert merged(again, addition(0.4, score=2.0, versions={"torch": "2"})) == again
    third = merged(again, {"environments": {"DSA-Image-v0": {}}})
    assert yaml.safe_load(third)["environments"].keys() == {"DSA-Rec-v0", "DSA-Text-v0", "DSA-Image-v0"}


@pytest.mark.parametrize(
    "text", ["settings: {rate: 1}\nenvironments: {DSA-Rec-v0: {rate: 2}}\n", "{settings: {rate: 1}}\n"]
)
def test_a_zoo_file_of_another_layout_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"merge best\.yaml by hand"):
        merged(text, addition(0.3))


def test_written_into_the_zoo(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, "--out", str(finished), "--write"]) == 2
    assert "no file agents/zoo/rloo.yaml" in capsys.readouterr().err
    path = tmp_path / "agents" / "zoo" / "rloo.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(ZOO)
    assert main([*COMMAND, "--out", str(finished), "--write"]) == 0
    found, best = yaml.safe_load(path.read_text()), yaml.safe_load((finished / "best.yaml").read_text())
    assert found["environments"]["DSA-Planted-v0"] == best["environments"]["DSA-Planted-v0"]
    assert found["studies"]["DSA-Planted-v0"]["command"].endswith("--write")
