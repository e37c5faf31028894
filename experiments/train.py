"""Training of one agent on one environment: progress, TensorBoard, checkpoints, the run's manifest.

A run is a folder: ``run.json`` (what was asked for, with which versions, on which bundle), the agent's files,
TensorBoard events and, when it is finished, ``scores`` in ``run.json``. A killed run is continued by the same command.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsa_gym import storage
from dsa_gym.agents import agent_class, make_agent
from dsa_gym.agents.base import Agent, zoo_defaults
from dsa_gym.envs import ENVIRONMENTS, PROBLEMS, make_sb3_vec_env
from dsa_gym.envs.wrappers import VectorDiscreteMask, VectorRelaxedMask
from dsa_gym.experiments.monitor import Monitor, open_problem
from dsa_gym.experiments.tensorboard import PolicyLog
from dsa_gym.search import Problem

WRAPPERS: dict[str, Any] = {"binary": None, "relaxed": VectorRelaxedMask, "discrete": VectorDiscreteMask}
"""What gives agents the actions that they act on."""


def check_env(env_id: str) -> None:
    """Refuse an id that is not that of a problem of one mask per input, which is what agents here are judged on.

    Raises:
        ValueError: If it is not registered, or is another problem or another package's.
    """
    known = sorted(name for name, entry in ENVIRONMENTS.items() if entry.classes == PROBLEMS[""])
    if env_id not in known:
        raise ValueError(f"env={env_id!r}: not a registered gating environment; expected one of {', '.join(known)}")


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

    @property
    def folder_name(self) -> str:
        """Name of the run inside the log folder."""
        return f"{self.env}-{self.agent}-seed{self.seed}"

    def problem(self, split: str) -> Problem:
        """The gating problem of another split of the same bundle, with the same gates and prices."""
        return open_problem(self.env, split, **self.env_arguments)

    @property
    def env_arguments(self) -> dict[str, Any]:
        """Arguments of the environment besides its split."""
        names = ("bundle", "granularity", "l0_penalty", "reward_metric")
        return {name: getattr(self, name) for name in names}

    def make_agent(self, split: str = "train") -> Agent:
        """The untrained agent with its environments."""
        wrapper = WRAPPERS[agent_class(self.agent).acts_on]
        env = make_sb3_vec_env(self.env, self.num_envs, wrapper=wrapper, split=split, **self.env_arguments)
        env.seed(self.seed)
        env.reset()
        tuned = zoo_defaults(self.agent, self.env.replace("Table", ""))  # the same problem, looked up
        return make_agent(self.agent, env, self.seed, **{**tuned, **(self.settings or {})})


def train(config: TrainConfig, logdir: Path) -> Path:
    """Train an agent.

    Args:
        config: The run.
        logdir: Folder of runs; TensorBoard reads it.

    Returns:
        The run's folder.

    Raises:
        ValueError: If the folder holds a run with another configuration, or an argument is wrong.
        FloatingPointError: If the agent diverges.
    """
    run = Path(logdir) / config.folder_name
    agent = config.make_agent()
    manifest = _claim(run, config, agent)
    if "scores" in manifest:
        return run
    if (run / "agent.json").is_file():
        agent.load(run)
    monitor = Monitor.of_env(config.env, **config.env_arguments)
    log = PolicyLog(run, monitor.problems["unseen"], start=agent.steps)
    began = time.monotonic()
    bar = tqdm(total=config.steps, initial=agent.steps, desc=config.folder_name, unit="step")
    latest: dict[str, float] = {}

    def on_update(steps: int, scalars: dict[str, float]) -> None:
        cache = {"cache/hit_rate": agent.scorer.hit_rate} if agent.scorer.requests else {}
        log.scalars(steps, scalars | cache)
        bar.update(steps - bar.n)

    while True:
        remaining = config.steps - agent.steps
        learned = agent.steps
        if remaining > 0:
            agent.learn(min(remaining, config.evaluate_every), on_update)
        latest, decisions = monitor(agent)
        log.evaluation(agent, latest, decisions["unseen"])
        agent.save(run)
        bar.set_postfix(unseen=f"{latest['unseen/normalized_score']:.2f}", density=f"{latest['unseen/density']:.2f}")
        if agent.steps >= config.steps or agent.steps == learned:
            break
    bar.close()
    manifest["seconds"] = round(manifest.get("seconds", 0.0) + time.monotonic() - began, 1)
    manifest["scores"] = latest
    log.hparams({"agent": config.agent, "seed": config.seed, **agent.config}, latest)
    storage.write_json(run / "run.json", manifest)
    return run


def _claim(run: Path, config: TrainConfig, agent: Agent) -> dict[str, Any]:
    """The manifest of a new run, or of the one that is there if it is the same."""
    asked = {"config": {**asdict(config), "settings": agent.config}, "bundle": _fingerprint(agent)}
    asked = json.loads(json.dumps(asked))  # as it will be read again: tuples are lists
    if (run / "run.json").is_file():
        manifest: dict[str, Any] = storage.read_json(run / "run.json")
        if any(manifest.get(name) != value for name, value in asked.items()):
            raise ValueError(f"logdir: {run} holds a run with another configuration or bundle; give a new folder")
        return manifest
    manifest = {**asked, "versions": storage.versions()}
    storage.write_json(run / "run.json", manifest)
    return manifest


def _fingerprint(agent: Agent) -> dict[str, Any]:
    """What the bundle of an agent's environment holds, and what it was made from."""
    manifest = agent.scorer.bundle.manifest
    return {"files": manifest["files"], "data": manifest["data"]}


def load_run(run: Path) -> tuple[TrainConfig, Agent]:
    """Load a finished run's configuration and agent.

    Raises:
        ValueError: If the folder is no finished run, or its bundle has changed since.
    """
    run = Path(run)
    if not (run / "run.json").is_file():
        raise ValueError(f"run={str(run)!r}: no run.json there; expected a folder written by 'dsa-gym train'")
    manifest = storage.read_json(run / "run.json")
    if "scores" not in manifest:
        raise ValueError(f"run={str(run)!r}: not finished; continue it with the command that began it")
    config = TrainConfig(**manifest["config"])
    agent = config.make_agent()
    if _fingerprint(agent) != manifest["bundle"]:
        raise ValueError(f"run={str(run)!r}: its bundle {config.bundle or 'of the package'} has been made anew since")
    agent.load(run)
    return config, agent
