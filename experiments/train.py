"""Training of one agent on one environment: progress, TensorBoard, checkpoints, the run's manifest.

A run is a folder: ``run.json`` (what was asked for, with which versions, on which bundle), the agent's files, the
learning curve ``curve.csv``, TensorBoard events and, when it is finished, ``scores`` in ``run.json``. A killed run is
continued by the same command, or by ``--resume`` and its folder: it ends with the numbers of an uninterrupted one.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Container
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
from gymnasium.envs.registration import load_env_creator
from tqdm import tqdm

from dsa_gym import storage
from dsa_gym.agents import agent_class, make_agent
from dsa_gym.agents.base import Agent, zoo_defaults
from dsa_gym.agents.sb3 import load_sb3_zip
from dsa_gym.envs import ENVIRONMENTS, make_sb3_vec_env
from dsa_gym.envs.wrappers import VectorDiscreteMask, VectorRelaxedMask
from dsa_gym.experiments.monitor import Monitor, open_problem
from dsa_gym.experiments.tensorboard import PolicyLog
from dsa_gym.planted import PlantedConfig
from dsa_gym.problem import Bits, GatingProblem
from dsa_gym.search import Problem

WRAPPERS: dict[str, Any] = {"binary": None, "relaxed": VectorRelaxedMask, "discrete": VectorDiscreteMask}
"""What gives agents the actions that they act on."""


TAKES = {
    "gating:Gating": ("bundle", "granularity", "l0_penalty", "reward_metric"),
    "table:Table": ("bundle", "l0_penalty"),
    "planted:Planted": ("l0_penalty",),
}
"""Problems of one mask per input, which agents here are judged on, to what they take of a configuration."""


def check_env(env_id: str, kinds: Container[str] = tuple(TAKES)) -> None:
    """Refuse an id that is not that of a problem of one mask per input.

    Args:
        env_id: The id.
        kinds: Keys of :data:`TAKES` that will do.

    Raises:
        ValueError: If it is not registered, or is another problem or another package's.
    """
    known = sorted(name for name, entry in ENVIRONMENTS.items() if entry.classes in TAKES and entry.classes in kinds)
    if env_id not in known:
        raise ValueError(f"env={env_id!r}: not a registered gating environment; expected one of {', '.join(known)}")


def environment_arguments(env_id: str) -> set[str]:
    """Names of the arguments that a registered environment takes."""
    core: Any = load_env_creator(str(gym.spec(env_id).entry_point))
    parameters = inspect.signature(core.core_class.__init__).parameters
    names = {name for name, parameter in parameters.items() if parameter.kind == parameter.KEYWORD_ONLY}
    return names | (set(PlantedConfig.__dataclass_fields__) if "instance" in parameters else set())


@dataclass(frozen=True)
class TrainConfig:
    """What a training run is.

    Attributes:
        env: Registered environment id.
        agent: Registered agent.
        bundle: Folder of the bundle; None for the shipped one.
        steps: Environment steps.
        seed: Seeds environment and agent.
        num_envs: Environments in the native batch.
        granularity: Gate granularity.
        l0_penalty: lambda, price of an active parameter; None for the domain's.
        reward_metric: Task metric in the place of minus the loss.
        evaluate_every: Environment steps between evaluations on seen and unseen (validation) users.
        settings: Overrides of the agent's defaults.
        env_settings: Further arguments of the environment, such as ``gates`` of a planted instance.
    """

    env: str = "DSA-Text-v0"
    agent: str = "ppo"
    bundle: str | None = None
    steps: int = 500_000
    seed: int = 0
    num_envs: int = 256
    granularity: str = "pathway"
    l0_penalty: float | None = None
    reward_metric: str | None = None
    evaluate_every: int = 50_000
    settings: dict[str, Any] | None = None
    env_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names and ranges.

        Raises:
            ValueError: If a value is wrong; the message names it.
        """
        agent_class(self.agent)
        check_env(self.env)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected an integer >= 0")
        for name in ("steps", "num_envs", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive integer")
        for name in TAKES["gating:Gating"]:
            if name not in self.takes and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name}={getattr(self, name)!r}: {self.env} takes no {name}")
        own = {*TAKES["gating:Gating"], "split", "num_envs", "domain", "actions", "render_mode"}
        if taken := sorted(own & set(self.env_settings)):
            raise ValueError(f"env_settings: {taken[0]!r} is set elsewhere")
        known = environment_arguments(self.env) - own
        if unknown := sorted(set(self.env_settings) - known):
            raise ValueError(
                f"env_settings: {self.env} takes no {unknown[0]!r}; expected one of {', '.join(sorted(known))}"
            )

    @property
    def takes(self) -> tuple[str, ...]:
        """What the environment takes of a configuration."""
        return TAKES[ENVIRONMENTS[self.env].classes]

    @property
    def folder_name(self) -> str:
        """Name of the run inside the log folder."""
        return f"{self.env}-{self.agent}-seed{self.seed}"

    def problem(self, split: str) -> Problem:
        """The gating problem of another split of the same bundle or instance, with the same gates and prices."""
        return open_problem(self.env, split, **self.env_arguments)

    @property
    def env_arguments(self) -> dict[str, Any]:
        """Arguments of the environment besides its split."""
        named = {name: value for name in self.takes if (value := getattr(self, name)) is not None}
        return {**named, **self.env_settings}

    @property
    def tuned_on(self) -> str:
        """Id of the environment whose tuned settings apply: a table is the same problem, looked up."""
        return self.env.replace("Table", "")

    @property
    def tuned(self) -> dict[str, Any]:
        """The agent's settings from the zoo."""
        return zoo_defaults(self.agent, self.tuned_on)

    def make_agent(self, split: str = "train") -> Agent:
        """The untrained agent with its environments.

        Raises:
            ValueError: If the environment or the agent does not take its settings.
        """
        wrapper = WRAPPERS[agent_class(self.agent).acts_on]
        env = make_sb3_vec_env(self.env, self.num_envs, wrapper=wrapper, split=split, **self.env_arguments)
        env.seed(self.seed)
        env.reset()
        return make_agent(self.agent, env, self.seed, **{**self.tuned, **(self.settings or {})})


def train(config: TrainConfig, logdir: Path) -> Path:
    """Train an agent in its folder ``config.folder_name`` of a folder of runs, which TensorBoard reads.

    Returns:
        The run's folder.

    Raises:
        ValueError: If the folder holds a run with another configuration, or an argument is wrong.
        FloatingPointError: If the agent diverges.
    """
    return train_in(Path(logdir) / config.folder_name, config)


def resume(run: Path) -> Path:
    """Continue an interrupted run given its folder alone.

    Raises:
        ValueError: If the folder is no run, or one on a bundle that has changed since.
        FloatingPointError: If the agent diverges.
    """
    return train_in(Path(run), TrainConfig(**read_manifest(run)["config"]))


def train_in(run: Path, config: TrainConfig, *, static: Bits | None = None) -> Path:
    """Train an agent in a folder, from where an earlier call stopped.

    Args:
        run: The folder.
        config: What is trained.
        static: The best static mask (G,), if it is known already.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds a run with another configuration, or an argument is wrong.
        FloatingPointError: If the agent diverges.
    """
    agent = config.make_agent()
    manifest = _claim(run, config, agent)
    if "scores" in manifest:
        return run
    if (run / "agent.json").is_file():
        agent.load(run)
    monitor = Monitor.of_env(config.env, static=static, **config.env_arguments)
    log = PolicyLog(run, monitor, agent, decode="Table" not in config.env)
    curve = [row for row in read_curve(run) if row["steps"] <= agent.steps]  # the agent is saved after its row
    seconds = curve[-1]["seconds"] if curve else 0.0
    bar = tqdm(total=config.steps, initial=agent.steps, desc=config.folder_name, unit="step", disable=None)
    latest: dict[str, float] = {}

    def on_update(steps: int, scalars: dict[str, float]) -> None:
        cache = {"cache/hit_rate": agent.scorer.hit_rate} if getattr(agent.scorer, "requests", 0) else {}
        log.scalars(steps, scalars | cache)
        bar.update(steps - bar.n)

    while True:
        remaining = config.steps - agent.steps
        learned, began = agent.steps, time.monotonic()
        if remaining > 0:
            if isinstance(agent.scorer, GatingProblem):
                agent.scorer.forget()  # as a resumed run has
            agent.learn(min(remaining, config.evaluate_every), on_update)
        seconds += time.monotonic() - began
        latest, decisions = monitor(agent)
        if not np.isfinite(list(latest.values())).all():
            raise FloatingPointError(f"{config.agent}: scores are not finite after {agent.steps} steps: {latest}")
        last = agent.steps >= config.steps or agent.steps == learned
        log.evaluation(agent, latest, decisions, last=last)
        curve = [row for row in curve if row["steps"] < agent.steps]
        curve.append({"steps": agent.steps, "seconds": round(seconds, 3), **latest})
        with storage.atomic_path(run / CURVE) as temporary:
            pd.DataFrame(curve).to_csv(temporary, index=False)
        agent.save(run)
        bar.set_postfix(unseen=f"{latest['unseen/normalized_score']:.2f}", density=f"{latest['unseen/density']:.2f}")
        if last:
            break
    bar.close()
    manifest["seconds"] = round(seconds, 3)
    manifest["scores"] = latest
    log.hparams({"agent": config.agent, "seed": config.seed, **agent.config}, latest)
    storage.write_json(run / "run.json", manifest)
    return run


def import_zip(path: Path, config: TrainConfig, run: Path, *, trust: bool = False) -> Path:
    """Make a finished run of a policy that stable-baselines3's ``model.save`` wrote.

    Args:
        path: The zip file.
        config: What it was trained on; ``agent`` is the agent of its algorithm.
        run: The run's folder.
        trust: That the file may run code, see :func:`dsa_gym.agents.sb3.load_sb3_zip`.

    Returns:
        The folder.

    Raises:
        ValueError: If the file is not trusted or does not fit, or the folder holds another run.
    """
    made = config.make_agent()
    agent = load_sb3_zip(config.agent, path, made.env, trust=trust, seed=config.seed, **made.config)
    manifest = _claim(run, config, agent)
    agent.save(run)
    scores, _ = Monitor.of_env(config.env, **config.env_arguments)(agent)
    storage.write_json(run / "run.json", {**manifest, "seconds": 0.0, "scores": scores})
    return run


CURVE = "curve.csv"


def read_curve(run: Path) -> list[dict[str, float]]:
    """A run's evaluations: steps, seconds of learning, and the scores of ``seen/`` and ``unseen/`` (validation)."""
    path = Path(run) / CURVE
    rows: Any = pd.read_csv(path).to_dict("records") if path.is_file() else []
    return list(rows)


def _claim(run: Path, config: TrainConfig, agent: Agent) -> dict[str, Any]:
    """The manifest of a new run, or of the one that is there if it is the same."""
    asked = {"config": {**asdict(config), "settings": agent.config}, "bundle": agent.scorer.fingerprint}
    asked = json.loads(json.dumps(asked))  # as it will be read again: tuples are lists
    if (run / "run.json").is_file():
        manifest: dict[str, Any] = storage.read_json(run / "run.json")
        if any(manifest.get(name) != value for name, value in asked.items()):
            raise ValueError(f"logdir: {run} holds a run with another configuration or bundle; give a new folder")
        return manifest
    manifest = {**asked, "versions": storage.versions()}
    storage.write_json(run / "run.json", manifest)
    return manifest


def read_manifest(run: Path) -> dict[str, Any]:
    """A run's ``run.json``; it has ``scores`` if the run is finished.

    Raises:
        ValueError: If the folder is no run.
    """
    path = Path(run) / "run.json"
    if not path.is_file():
        raise ValueError(f"run={str(run)!r}: no run.json there; expected a folder written by 'dsa-gym train'")
    manifest: dict[str, Any] = storage.read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("config"), dict):
        raise ValueError(f"run={str(run)!r}: run.json has no 'config'; it was not written by 'dsa-gym train'")
    return manifest


def load_run(run: Path) -> tuple[TrainConfig, Agent]:
    """Load a finished run's configuration and agent.

    Raises:
        ValueError: If the folder is no finished run, or its bundle has changed since.
    """
    manifest = read_manifest(run)
    if "scores" not in manifest:
        raise ValueError(f"run={str(run)!r}: not finished; continue it with the command that began it")
    config = TrainConfig(**manifest["config"])
    agent = config.make_agent()
    if json.loads(json.dumps(agent.scorer.fingerprint)) != manifest["bundle"]:
        raise ValueError(f"run={str(run)!r}: its bundle {config.bundle or 'of the package'} has been made anew since")
    agent.load(Path(run))
    return config, agent
