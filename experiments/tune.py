"""Tuning of an agent's settings by Optuna, judged on validation users.

The search space is the key ``search`` of the agent's zoo file, ``agents/zoo/NAME.yaml``. A trial trains several seeds
side by side; its value is their mean normalised score on validation users at the end, and what they score on the way
decides whether it is pruned. Trial 0 has the settings that the agent has without the study.

A study is a folder with Optuna's journal, and one process works on it. The sampler is seeded by the study's seed and
the number of trials that ended, so a study that was killed goes on with the trials that it would have had.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from dsa_gym import storage
from dsa_gym.agents import agent_class
from dsa_gym.agents.base import Agent, zoo, zoo_defaults
from dsa_gym.experiments.monitor import Monitor
from dsa_gym.experiments.train import TrainConfig

if TYPE_CHECKING:
    import optuna

    Trial = optuna.trial.FrozenTrial

FIRST_SEED = 10_000
"""Training seeds of trials are counted from here, so that no comparison repeats a seed that settings were chosen on."""

ENDED = ("complete", "pruned", "diverged")
"""States of trials that count; those of a killed process, ``fail``, are repeated."""

SHOWN = 10
"""Trials that are printed."""

Range = Mapping[str, Any]
"""``{low, high}``, with ``log: true`` for a logarithmic scale, of whole numbers or not; or ``{choices: [...]}``."""


def optuna_library() -> Any:
    """Optuna, silent.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("tuning needs Optuna: pip install 'dsa-gym[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class TuneConfig:
    """What a study is.

    Attributes:
        run: What a trial trains; its seed, settings and interval between evaluations are the study's to set.
        trials: Trials that end by themselves or are pruned.
        seeds: Seeds of a trial.
        seed: Seeds the sampler.
        evaluations: Evaluations of a trial, evenly spaced.
    """

    run: TrainConfig
    trials: int = 30
    seeds: int = 2
    seed: int = 0
    evaluations: int = 10

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is wrong; the message names it.
        """
        for name in ("trials", "seeds", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive integer")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected an integer >= 0")

    def training(self, settings: Mapping[str, Any]) -> list[TrainConfig]:
        """The runs of a trial, one for each seed."""
        every = -(-self.run.steps // min(self.evaluations, self.run.steps))
        seeds = range(FIRST_SEED, FIRST_SEED + self.seeds)
        return [replace(self.run, seed=seed, evaluate_every=every, settings=dict(settings)) for seed in seeds]


def search_space(agent: str) -> dict[str, dict[str, Any]]:
    """The ranges that an agent's zoo file gives its settings.

    Raises:
        ValueError: If it gives none, or one that is not understood.
    """
    agent_class(agent)
    space = zoo(agent).get("search") or {}
    if not space:
        raise ValueError(f"agent={agent!r}: agents/zoo/{agent}.yaml has no ranges to search; add them under 'search:'")
    defaults = zoo_defaults(agent)
    for name, span in space.items():
        where = f"agents/zoo/{agent}.yaml: search: {name}"
        if name not in defaults:
            raise ValueError(f"{where}: no setting of {agent!r}; expected one of {', '.join(sorted(defaults))}")
        numbers = [span[end] for end in ("low", "high") if end in span] if isinstance(span, dict) else []
        bounds = len(numbers) == 2 and all(isinstance(end, int | float) for end in numbers)
        if not (bounds and set(span) <= {"low", "high", "log"} and numbers[0] < numbers[1]) and not (
            isinstance(span, dict) and set(span) == {"choices"} and span["choices"]
        ):
            raise ValueError(f"{where}: {span!r}, expected {{low, high, log}} with low < high, or {{choices: [...]}}")
    return dict(space)


def suggest(trial: Any, space: Mapping[str, Range]) -> dict[str, Any]:
    """A trial's settings; numbers have three significant digits, so that what is published is what was run."""
    settings: dict[str, Any] = {}
    for name, span in space.items():
        if "choices" in span:  # lists too, which Optuna knows only as text
            settings[name] = json.loads(trial.suggest_categorical(name, [json.dumps(c) for c in span["choices"]]))
        elif _whole(span):
            settings[name] = trial.suggest_int(name, span["low"], span["high"], log=span.get("log", False))
        else:
            value = trial.suggest_float(name, span["low"], span["high"], log=span.get("log", False))
            settings[name] = float(f"{value:.3g}")
    return settings


def encode(settings: Mapping[str, Any], space: Mapping[str, Range]) -> dict[str, Any]:
    """Settings as Optuna's parameters, for a trial that is not sampled.

    Raises:
        ValueError: If one is outside its range.
    """
    encoded = {}
    for name, span in space.items():
        value = settings[name]
        inside = value in span["choices"] if "choices" in span else span["low"] <= value <= span["high"]
        if not inside:
            raise ValueError(f"search: {name}: the default {value!r} is outside {dict(span)}; widen the range")
        encoded[name] = json.dumps(value) if "choices" in span else value if _whole(span) else float(value)
    return encoded


def _whole(span: Range) -> bool:
    return isinstance(span["low"], int) and isinstance(span["high"], int)


def tune(config: TuneConfig, folder: Path, command: str = "") -> dict[str, Any]:
    """Run a study, or continue it.

    Args:
        config: The study.
        folder: Where it is kept; ``study.json``, ``best.yaml`` and the plots are written there.
        command: What was typed, for the record.

    Returns:
        What ``study.json`` holds.

    Raises:
        ImportError: If Optuna is not installed.
        ValueError: If the folder is another study's or another process works on it, or a setting does not fit.
        FloatingPointError: If every trial diverged.
    """
    optuna = optuna_library()
    space = search_space(config.run.agent)
    with storage.locked(folder):
        record = _claim(config, Path(folder), space, command)
        study = _open_study(optuna, Path(folder) / "journal.log", warmup=config.run.steps // 3)
        _run(optuna, study, config, record, Path(folder) / "study.json")
        record["trials"] = [_row(trial, record) for trial in study.get_trials(deepcopy=False)]
        if not any(row["state"] == "complete" for row in record["trials"]):
            raise FloatingPointError(f"{folder}: none of {config.trials} trials ended; see study.json")
        record |= _outcome(study, record)
        storage.write_json(Path(folder) / "study.json", record)
        storage.write_text(Path(folder) / "best.yaml", _yaml(fragment(record)))
        plot_importance(record, Path(folder) / "importance.png")
        plot_history(record, Path(folder) / "history.png")
    return record


def _claim(config: TuneConfig, folder: Path, space: dict[str, Any], command: str) -> dict[str, Any]:
    """The record of a new study, or of the one that is there if it is the same but for its number of trials."""
    agent = config.training({})[0].make_agent()
    asked: dict[str, Any] = json.loads(
        json.dumps({"config": asdict(config), "search": space, "settings": zoo_defaults(config.run.agent)})
    )
    asked["bundle"] = bundle_checksum(agent)
    path = folder / "study.json"
    if not path.is_file():
        encode(agent.config, space)
        defaults = {"problem": config.run.tuned_on, "defaults": agent.config, "command": command}
        record = {**asked, **defaults, "versions": {**storage.versions(), "optuna": optuna_library().__version__}}
        storage.write_json(path, record)
        return record
    found: dict[str, Any] = storage.read_json(path)
    same = {**found, "config": {**found["config"], "trials": config.trials}}
    if sum(row["state"] in ENDED for row in found.get("trials", [])) >= config.trials:
        # nothing is left to run, so the zoo file may have changed since
        same["settings"], asked["search"] = asked["settings"], found["search"]
    if any(same.get(name) != value for name, value in asked.items()):
        raise ValueError(f"out: {folder} holds a study of another configuration, bundle or zoo file; give a new folder")
    return {**found, **asked, "command": command}


def bundle_checksum(agent: Agent) -> str | None:
    """SHA-256 of the bundle that an agent's environment has; None if it has none."""
    bundle = getattr(agent.scorer, "bundle", None)
    return None if bundle is None else str(bundle.checksum)


def _open_study(optuna: Any, journal: Path, warmup: int) -> Any:
    """The study in a journal, made if it is missing, without what a killed process left unfinished.

    Trials are pruned after ``warmup`` steps where they are below the median of the others at that time.
    """
    if journal.is_file():
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # killed while it wrote a line
            with journal.open("r+b") as file:
                file.truncate(len(whole))
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)  # of a killed process: the folder is ours
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="dsa-gym",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=warmup),
    )
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _run(optuna: Any, study: Any, config: TuneConfig, record: dict[str, Any], path: Path) -> None:
    """Run trials until there are enough that ended."""
    state = optuna.trial.TrialState
    steps = config.seeds * config.run.steps
    ended = _ended(optuna, study)
    if ended >= config.trials:
        return
    monitor = Monitor.of_env(config.run.env, **config.run.env_arguments)
    desc = f"tune {config.run.agent} on {config.run.env}"
    with tqdm(
        total=config.trials * steps, initial=ended * steps, desc=desc, unit="step", unit_scale=True, disable=None
    ) as bar:
        while ended < config.trials:
            study.sampler = optuna.samplers.TPESampler(seed=(config.seed * 1_000_003 + ended) % 2**32)
            if not ended and not study.get_trials(deepcopy=False, states=[state.WAITING]):
                study.enqueue_trial(encode(record["defaults"], record["search"]))
            trial = study.ask()
            _run_trial(study, trial, config, record, monitor, bar)
            ended = _ended(optuna, study)
            bar.update(ended * steps - bar.n)  # a pruned trial has saved the rest
            rows = [_row(trial, record) for trial in study.get_trials(deepcopy=False)]
            storage.write_json(path, {**record, "trials": rows})


def _ended(optuna: Any, study: Any) -> int:
    states = [optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]
    return len(study.get_trials(deepcopy=False, states=states))


def _run_trial(study: Any, trial: Any, config: TuneConfig, record: Any, monitor: Monitor, bar: Any) -> None:
    """Train the seeds of a trial side by side, and tell the study what came of it."""
    state = optuna_library().trial.TrialState
    settings = {**record["defaults"], **suggest(trial, record["search"])}
    began = time.monotonic()
    scores: list[float] = []
    runs = config.training(settings)
    pruned = False
    try:
        for steps, scores in learning_curve(runs, monitor):
            trial.report(float(np.mean(scores)), steps)
            bar.update(len(runs) * runs[0].evaluate_every)
            bar.set_postfix(trial=trial.number, score=f"{np.mean(scores):.3f}")
            pruned = steps < config.run.steps and trial.should_prune()
            if pruned:
                break
    except FloatingPointError as error:  # no reason to stop the others
        trial.set_user_attr("diverged", str(error))
        pruned = True
    trial.set_user_attr("scores", [float(score) for score in scores])
    trial.set_user_attr("seconds", round(time.monotonic() - began, 2))
    if pruned:
        study.tell(trial, state=state.PRUNED)
    else:
        study.tell(trial, float(np.mean(scores)))


def learning_curve(runs: Sequence[TrainConfig], monitor: Monitor) -> Iterator[tuple[int, list[float]]]:
    """Train agents side by side.

    Args:
        runs: One for each seed.
        monitor: Scores an agent.

    Yields:
        After every ``evaluate_every`` steps of each the steps so far and their normalised scores on validation users.

    Raises:
        FloatingPointError: If one diverges, or its score is not finite.
    """
    agents, generators = [], []
    for run in runs:
        agents.append(run.make_agent())
        generators.append(_generators())
    steps, every = runs[0].steps, runs[0].evaluate_every
    for target in [*range(every, steps, every), steps]:
        for place, agent in enumerate(agents):
            with _own_generators(generators, place):  # as if it were alone: some libraries draw from the global ones
                if steps > agent.steps:  # whole rollouts may have gone beyond it
                    agent.learn(min(every, steps - agent.steps))
        scores = [monitor(agent)[0]["unseen/normalized_score"] for agent in agents]
        if not np.isfinite(scores).all():
            raise FloatingPointError(f"{runs[0].agent}: normalised scores {scores} after {agents[0].steps} steps")
        yield target, scores


def _generators() -> tuple[Any, Any, Any]:
    """States of the global generators of Python, NumPy and torch."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


@contextmanager
def _own_generators(states: list[tuple[Any, Any, Any]], place: int) -> Iterator[None]:
    """Put the states of one agent in the place of the global generators', and keep what becomes of them."""
    before = _generators()
    _set_generators(states[place])
    try:
        yield
    finally:
        states[place] = _generators()
        _set_generators(before)


def _set_generators(state: tuple[Any, Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _row(trial: Trial, record: Mapping[str, Any]) -> dict[str, Any]:
    """A trial as ``study.json`` has it."""
    attributes = trial.user_attrs
    state = "diverged" if "diverged" in attributes else trial.state.name.lower()
    row = {"number": trial.number, "state": state, "value": trial.value if state == "complete" else None}
    if trial.params.keys() == record["search"].keys():
        row["settings"] = suggest(_Decided(trial.params), record["search"])
    row["scores"] = attributes.get("scores", [])
    row["curve"] = [trial.intermediate_values[number] for number in sorted(trial.intermediate_values)]
    row["seconds"] = attributes.get("seconds")
    return row | {name: attributes[name] for name in ("diverged",) if name in attributes}


@dataclass
class _Decided:
    """A trial whose parameters are known, for :func:`suggest`."""

    params: Mapping[str, Any]

    def suggest_categorical(self, name: str, *_: Any, **__: Any) -> Any:
        return self.params[name]

    suggest_int = suggest_float = suggest_categorical


def _outcome(study: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished study says: the best trial, its gain over the defaults, and which settings mattered."""
    optuna = optuna_library()
    rows = record["trials"]
    complete = [row for row in rows if row["state"] == "complete"]
    best = max(complete, key=lambda row: row["value"])
    started = next(row for row in rows if row["state"] in ENDED)  # the defaults' trial
    values = {row["value"] for row in complete}
    importance = {}
    if len(complete) > 1 and len(values) > 1:
        importance = optuna.importance.get_param_importances(study)
    return {
        "best": best["number"],
        "best_value": best["value"],
        "defaults_value": started["value"],
        "importance": {name: float(share) for name, share in importance.items()},
        "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 1),
    }


def fragment(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a study adds to the agent's zoo file: its best settings where they differ, and where they come from."""
    best = next(row for row in record["trials"] if row["number"] == record["best"])
    settings = {**record["defaults"], **best["settings"]}
    differ = {name: value for name, value in settings.items() if value != record["settings"].get(name)}
    states = [row["state"] for row in record["trials"]]
    about = {
        "command": record["command"],
        "steps": record["config"]["run"]["steps"],
        "trials": sum(state in ENDED for state in states),
        "pruned": states.count("pruned"),
        "diverged": states.count("diverged"),
        "seeds": record["config"]["seeds"],
        "split": "validation",
        "score": round(record["best_value"], 4),
        "score_of_defaults": None if record["defaults_value"] is None else round(record["defaults_value"], 4),
        "seconds": record["seconds"],
        "bundle": record["bundle"],
        "versions": record["versions"],
    }
    return {"environments": {record["problem"]: differ}, "studies": {record["problem"]: about}}


class _Dumper(yaml.SafeDumper):
    """Writes lists in one line."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _yaml(value: Mapping[str, Any]) -> str:
    """YAML in the order of the keys, each in a line of its own."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=10_000)
    return text


def merged(text: str, addition: Mapping[str, Any]) -> str:
    """A zoo file with entries of top-level mappings added or replaced; all else, comments too, stays as it is.

    Args:
        text: The file.
        addition: Name of a top-level mapping to its entries, such as :func:`fragment` returns.

    Raises:
        ValueError: If the file is laid out in a way that this cannot edit.
    """
    expected = dict(yaml.safe_load(text))
    text = text.rstrip() + "\n"
    for block, entries in addition.items():
        expected[block] = {**(expected.get(block) or {}), **entries}
        for key, entry in entries.items():
            text = _with_entry(text, block, key, entry)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if found != expected:
        raise ValueError("the zoo file is not laid out as blocks indented by two spaces; merge best.yaml by hand")
    return text


def _with_entry(text: str, block: str, key: str, entry: Any) -> str:
    """One entry of one block set, in text that ends with a line's end."""
    body = "".join(f"  {line}\n" for line in _yaml({key: entry}).splitlines())
    found = re.search(rf"(?m)^{block}:[ \t]*(?:#.*)?\n((?:[ \t]+\S.*\n)*)", text)
    if found is None:
        return f"{text}{block}:\n{body}"
    inside = found[1]
    old = re.search(rf"(?m)^  {re.escape(key)}:.*\n(?: {{3,}}.*\n)*", inside)
    start, end = old.span() if old else (len(inside), len(inside))
    return text[: found.start(1)] + inside[:start] + body + inside[end:] + text[found.end(1) :]


def zoo_file(agent: str) -> Path:
    """The zoo file of an agent in the checkout that is the current folder.

    Raises:
        ValueError: If it is not there.
    """
    path = Path("agents/zoo") / f"{agent}.yaml"
    if not path.is_file():
        raise ValueError(f"write: no file {path} in {Path.cwd()}; run this in the root of a checkout")
    return path


def show(record: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the trials, best first, and what they come to."""
    console = console or Console()
    table = Table(title=f"{record['config']['run']['agent']} on {record['config']['run']['env']}, validation users")
    for name in ("trial", "normalised score", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("settings that were searched")
    rows = [row for row in record["trials"] if row["state"] in ENDED]
    rows.sort(key=lambda row: -np.inf if row["value"] is None else row["value"], reverse=True)
    for row in rows[:SHOWN]:
        value = row["state"] if row["value"] is None else f"{row['value']:.4f}"
        settings = "  ".join(f"{name}={setting}" for name, setting in row["settings"].items())
        table.add_row(str(row["number"]), value, f"{row['seconds']:.1f}", settings)
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"{len(rows) - SHOWN} more trials in study.json")
    defaults = record["defaults_value"]
    against = "the defaults did not reach the end" if defaults is None else f"defaults {defaults:.4f}"
    console.print(f"best: trial {record['best']} with {record['best_value']:.4f} ({against})")


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with storage.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def plot_importance(record: Mapping[str, Any], path: Path) -> None:
    """Draw how much of the difference between good and ordinary trials each setting explains (PED-ANOVA)."""
    importance = record["importance"]
    figure, axes = _figure(7, 1.6 + 0.35 * max(1, len(importance)))
    names = list(importance)[::-1]
    bars = axes.barh(names, [importance[name] for name in names], color="#1d4ed8")
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_xlim(0, 1.1 * max([*importance.values(), 0.1]))
    axes.set_xlabel("importance (PED-ANOVA, shares)" if importance else "too few trials ended to tell")
    run = record["config"]["run"]
    axes.set_title(f"{run['agent']} on {run['env']}: which settings mattered", fontsize=10)
    _save(figure, path)


def plot_history(record: Mapping[str, Any], path: Path) -> None:
    """Draw every trial's value, the best so far, and that of the defaults."""
    figure, axes = _figure(8, 4)
    complete = [row for row in record["trials"] if row["state"] == "complete"]
    pruned = [row for row in record["trials"] if row["state"] == "pruned" and row["curve"]]
    numbers, values = [row["number"] for row in complete], [row["value"] for row in complete]
    axes.plot(numbers, values, "o", color="#1d4ed8", label="ended")
    axes.step(numbers, np.maximum.accumulate(values), where="post", color="#c2410c", label="best so far")
    low = min(values) - 0.1 * max(max(values) - min(values), 0.1)
    for row in pruned:  # far below the others they would squeeze them
        axes.plot(row["number"], max(row["curve"][-1], low), "x", color="#9ca3af", clip_on=False)
    if pruned:
        axes.plot([], [], "x", color="#9ca3af", label="pruned, its last score")
    if record["defaults_value"] is not None:
        axes.axhline(record["defaults_value"], color="#111827", lw=0.8, ls=":", label="defaults")
    axes.set_ylim(bottom=low)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("trial")
    axes.set_ylabel("normalised score, validation users")
    axes.legend(fontsize=8)
    run = record["config"]["run"]
    axes.set_title(f"{run['agent']} on {run['env']}: {record['config']['seeds']} seeds of {run['steps']:,} steps each",
                   fontsize=10)  # fmt: skip
    _save(figure, path)
