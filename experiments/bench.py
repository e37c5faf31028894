"""Timing of the environment's step against the frozen backbone alone, side by side in one run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dsa_gym import storage
from dsa_gym.experiments.train import check_env
from dsa_gym.problem import GatingProblem


def bench(env_id: str, bundle: str | None, num_envs: int, repetitions: int, seed: int) -> dict[str, Any]:
    """Time one step of a native batch, reward caches off, all users and masks different where there are enough users.

    Every input has been seen before, see :func:`visit_all`.

    Args:
        env_id: Registered id.
        bundle: Folder; None for the shipped bundle.
        num_envs: Environments in the batch.
        repetitions: Timed repetitions of each, interleaved.
        seed: Seeds users, inputs and masks.

    Returns:
        Milliseconds (median and quartiles) of: ``backbone``, the bare frozen model's forward and loss on the same
        inputs; ``adapted``, the same with every user's adapters and masks; ``step``, the whole environment step (on
        inputs that it draws itself). ``adapter_overhead`` and ``step_overhead`` are the shares that ``adapted`` and
        ``step`` add to ``backbone``, repetition by repetition.

    Raises:
        ValueError: If an argument is wrong.
    """
    check_env(env_id, kinds=["gating:Gating"])
    if seed < 0:
        raise ValueError(f"seed={seed}: expected an integer >= 0")
    if repetitions < 2:
        raise ValueError(f"repetitions={repetitions}: expected at least 2")
    envs: Any = gym.make_vec(env_id, num_envs=num_envs, bundle=bundle, cache_bytes=0)
    problem = envs.problem
    inputs, gates = different_users(envs, seed)
    visit_all(problem)
    functions: dict[str, Callable[[], object]] = {
        "backbone": lambda: problem.compute_losses(inputs, None),
        "adapted": lambda: problem.compute_losses(inputs, gates),
        "step": lambda: envs.step(gates),
    }
    timed = interleaved(functions, repetitions)
    bare = np.asarray(timed["backbone"])
    return {
        "env": env_id,
        "num_envs": num_envs,
        "users": len(np.unique(problem.user[inputs])),
        "repetitions": repetitions,
        "milliseconds": {name: quartiles(np.asarray(values)) for name, values in timed.items()},
        "adapter_overhead": quartiles(np.asarray(timed["adapted"]) / bare - 1),
        "step_overhead": quartiles(np.asarray(timed["step"]) / bare - 1),
        "steps_per_second": 1000 * num_envs / float(np.median(timed["step"])),
        "machine": machine(),
        "versions": storage.versions(),
    }


def different_users(envs: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Put a batch before inputs of different users, as far as there are enough.

    Returns:
        The inputs (num_envs,) and random masks (num_envs, G).
    """
    envs.reset(seed=seed)
    generator = np.random.default_rng(seed)
    owners = envs.problem.user.numpy()
    chosen = generator.permutation(np.resize(generator.permutation(np.unique(owners)), envs.num_envs))
    inputs = np.stack([generator.choice(np.flatnonzero(owners == user)) for user in chosen])
    envs.reset(options={"input": inputs})
    return inputs, (generator.random((envs.num_envs, envs.problem.gates)) < 0.5).astype(np.uint8)


def visit_all(*problems: GatingProblem) -> None:
    """See every input once, as a training has after its first minutes."""
    for problem in problems:
        inputs = np.arange(len(problem))
        problem.compute_losses(inputs, np.zeros((len(inputs), problem.gates), np.uint8))


def machine() -> dict[str, Any]:
    """What the timings were taken on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repetitions: int,
    elsewhere: Mapping[str, Callable[[], float]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each function, in rounds so that a drifting machine hits all alike.

    The order of each round is drawn: what runs first after another process finds the processor's caches cold.

    Args:
        functions: What is timed here.
        repetitions: How often, after three rounds that are not counted.
        elsewhere: What is timed by another process, each returning its milliseconds.
    """
    elsewhere = elsewhere or {}
    timed: dict[str, list[float]] = {name: [] for name in (*functions, *elsewhere)}
    generator = np.random.default_rng(0)
    for repetition in range(repetitions + 3):
        for name in generator.permutation(list(timed)).tolist():
            if name in elsewhere:
                milliseconds = elsewhere[name]()
            else:
                began = time.perf_counter()
                functions[name]()
                milliseconds = 1000 * (time.perf_counter() - began)
            if repetition >= 3:
                timed[name].append(milliseconds)
    return timed


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the timings."""
    table = Table(title=f"{result['env']}, {result['num_envs']} environments, {result['users']} users, caches off")
    table.add_column("what")
    table.add_column("ms, median [quartiles]", justify="right")
    labels = {"backbone": "bare backbone", "adapted": "with adapters and masks", "step": "environment step"}
    for name, label in labels.items():
        value = result["milliseconds"][name]
        table.add_row(label, f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]")
    for name, label in (("adapter_overhead", "overhead of adapters and masks"), ("step_overhead", "of the whole step")):
        value = result[name]
        table.add_row(label, f"{value['median']:.1%} [{value['low']:.1%}, {value['high']:.1%}]")
    console.print(table)
    console.print(f"{result['steps_per_second']:,.0f} steps per second on {result['machine']}")
