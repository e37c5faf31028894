"""200,000 steps of every kind of environment do not let memory grow."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from dsa_gym.envs import ENVIRONMENTS

STEPS, NUM_ENVS = 200_000, 500


def resident() -> int:
    """Bytes of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [name for name in ENVIRONMENTS if "Text" in name or "Planted" in name])
def test_memory_does_not_grow(env_id: str, bundle_of: Callable[[str], Path]) -> None:
    arguments: dict[str, Any] = {"bundle": str(bundle_of(env_id))} if ENVIRONMENTS[env_id].domain else {}
    envs = gym.make_vec(env_id, num_envs=NUM_ENVS, **arguments)
    envs.reset(seed=0)

    def walk(steps: int) -> int:
        for _ in range(steps // NUM_ENVS):
            envs.step(envs.action_space.sample())
        gc.collect()
        return resident()

    warm = walk(STEPS // 4)
    assert walk(STEPS) - warm < 20 * 2**20
