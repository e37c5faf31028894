"""Gymnasium environments over prepared bundles.

``import dsa_gym`` registers them; ``gym.make("DSA-Text-v0")`` and
``gym.make_vec("DSA-Text-v0", num_envs=64)`` make them, and :func:`make_sb3_vec_env` makes a native
stable-baselines3 ``VecEnv``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym

if TYPE_CHECKING:
    from dsa_gym.envs.sb3 import GymnasiumVecEnv

__all__ = ["ENVIRONMENTS", "make_sb3_vec_env", "register"]

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "DSA-Text-v0": {"domain": "text"},
    "DSA-Rec-v0": {"domain": "recommendation"},
    "DSA-Image-v0": {"domain": "image"},
}
"""Every registered id and the arguments that tell it apart."""


def register() -> None:
    """Register every id with Gymnasium; entry points are strings, so nothing heavy is imported."""
    for name, kwargs in ENVIRONMENTS.items():
        if name not in gym.registry:
            gym.register(
                name,
                entry_point="dsa_gym.envs.gating:GatingEnv",
                vector_entry_point="dsa_gym.envs.gating:GatingVectorEnv",
                kwargs=kwargs,
            )


def make_sb3_vec_env(env_id: str, num_envs: int, **kwargs: Any) -> GymnasiumVecEnv:
    """Make a natively batched stable-baselines3 ``VecEnv``.

    Args:
        env_id: A registered id.
        num_envs: Environments in the batch.
        **kwargs: Arguments of the environment.

    Raises:
        ValueError: If ``num_envs`` is not positive, or an argument of the environment is wrong.
    """
    from dsa_gym.envs.sb3 import GymnasiumVecEnv

    return GymnasiumVecEnv(gym.make_vec(env_id, num_envs=num_envs, **kwargs))
