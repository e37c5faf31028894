"""Timing of PPO under action masks: our masked Bernoulli against plain PPO and sb3-contrib's own, in one run."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO

from dsa_gym import storage
from dsa_gym.agents.masked_bernoulli import MaskedBernoulliPolicy, MaskedDictRolloutBuffer
from dsa_gym.envs import make_sb3_vec_env
from dsa_gym.envs.wrappers import VectorAllowedGates
from dsa_gym.experiments.bench import interleaved, machine, quartiles

LABELS = {
    "ppo": "stable-baselines3, PPO without masks",
    "masks": "ours, a mask for each gate",
    "pairs": "ours, a pair of masks for each gate",
    "sb3_contrib": "sb3-contrib, MaskablePPO",
}


class _Pairs(VectorAllowedGates):
    """Masks as sb3-contrib wants them: whether each gate may be off, whether it may be on."""

    def action_masks(self) -> NDArray[np.bool_]:
        """Pairs of each environment (environments, 2G)."""
        on = super().action_masks()
        return np.stack([np.ones_like(on), on], axis=-1).reshape(self.num_envs, -1)


def masked_bench(
    *,
    gates: int = 339,
    active: float = 1 / 3,
    num_envs: int = 16,
    n_steps: int = 16,
    repetitions: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Time a rollout with its update, of four algorithms with the same networks on the same environments.

    Half of the gates may be on. Environments are planted ones, whose step costs next to nothing: what is timed is the
    algorithm.

    Args:
        gates: Gates G.
        active: Share of gates that an input needs.
        num_envs: Environments in the batch.
        n_steps: Steps of a rollout in each environment.
        repetitions: Timed repetitions of each, interleaved.
        seed: Seeds everything random.

    Returns:
        ``steps_per_second`` (median and quartiles) by the keys of :data:`LABELS`, and ``share_of_ppo``, each one's
        speed over plain PPO's, repetition by repetition.

    Raises:
        ValueError: If an argument is wrong.
    """
    if repetitions < 2:
        raise ValueError(f"repetitions={repetitions}: expected at least 2")
    allowed = np.sort(np.random.default_rng(seed).permutation(gates)[: (gates + 1) // 2]).tolist()
    settings: dict[str, Any] = {
        "n_steps": n_steps,
        "batch_size": min(64, num_envs * n_steps),
        "n_epochs": 4,
        "gamma": 0.0,
        "seed": seed,
        "device": "cpu",
    }
    ours = {"policy": MaskedBernoulliPolicy, "rollout_buffer_class": MaskedDictRolloutBuffer}
    entries: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "ppo": (PPO, VectorAllowedGates, {"policy": "MultiInputPolicy"}),
        "masks": (MaskablePPO, VectorAllowedGates, ours),
        "pairs": (MaskablePPO, _Pairs, ours),
        "sb3_contrib": (MaskablePPO, _Pairs, {"policy": "MultiInputPolicy"}),
    }
    functions = {}
    for name, (algorithm, wrapper, own) in entries.items():
        wrap = partial(wrapper, allowed=allowed)
        env = make_sb3_vec_env("DSA-Planted-v0", num_envs, wrapper=wrap, gates=gates, active=active)
        model = algorithm(env=env, **settings, **own)
        functions[name] = partial(model.learn, num_envs * n_steps, reset_num_timesteps=False)
    timed = {name: np.asarray(values) for name, values in interleaved(functions, repetitions).items()}
    return {
        "gates": gates,
        "num_envs": num_envs,
        "n_steps": n_steps,
        "repetitions": repetitions,
        "steps_per_second": {name: quartiles(1000 * num_envs * n_steps / values) for name, values in timed.items()},
        "share_of_ppo": {name: quartiles(timed["ppo"] / values) for name, values in timed.items()},
        "machine": machine(),
        "versions": storage.versions(),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print the timings."""
    table = Table(title=f"PPO under masks, {result['gates']} gates, {result['num_envs']} environments")
    table.add_column("what")
    table.add_column("steps a second, median [quartiles]", justify="right")
    table.add_column("of plain PPO", justify="right")
    for name, label in LABELS.items():
        speed, share = result["steps_per_second"][name], result["share_of_ppo"][name]
        table.add_row(
            label,
            f"{speed['median']:,.0f} [{speed['low']:,.0f}, {speed['high']:,.0f}]",
            f"{share['median']:.2f} [{share['low']:.2f}, {share['high']:.2f}]",
        )
    console.print(table)
    console.print(f"on {result['machine']}")
