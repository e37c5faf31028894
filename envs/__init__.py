"""Gymnasium environments over prepared bundles.

``import dsa_gym`` registers them; ``gym.make("DSA-Text-v0")`` and
``gym.make_vec("DSA-Text-v0", num_envs=64)`` make them, and :func:`make_sb3_vec_env` makes a native
stable-baselines3 ``VecEnv``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym

if TYPE_CHECKING:
    from dsa_gym.envs.sb3 import GymnasiumVecEnv

__all__ = ["DOMAINS", "ENVIRONMENTS", "PROBLEMS", "Registration", "make_sb3_vec_env", "register"]

DOMAINS = {"Text": "text", "Rec": "recommendation", "Image": "image"}
"""Name in the ids to the domain."""

PROBLEMS = {
    "": "gating:Gating",
    "Layerwise": "layerwise:Layerwise",
    "Budget": "budget:Budget",
    "Drift": "drift:Drift",
    "Table": "table:Table",
}
"""Name in the ids to module and prefix of the classes, for the problems over a domain's bundle."""


class Registration(NamedTuple):
    """What an id stands for.

    Attributes:
        classes: ``module:Prefix``: the scalar environment is ``PrefixEnv``, the batched one ``PrefixVectorEnv``.
        domain: The domain whose bundles it takes; None if it takes none.
    """

    classes: str
    domain: str | None

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments that tell it apart from others of these classes."""
        return {} if self.domain is None else {"domain": self.domain}


ENVIRONMENTS: dict[str, Registration] = {
    f"DSA-{name}{problem}-v0": Registration(classes, domain)
    for problem, classes in PROBLEMS.items()
    for name, domain in DOMAINS.items()
} | {"DSA-Planted-v0": Registration("planted:Planted", None)}
"""Every registered id."""


def register() -> None:
    """Register every id with Gymnasium; entry points are strings, so nothing heavy is imported."""
    for name, registration in ENVIRONMENTS.items():
        if name not in gym.registry:
            gym.register(
                name,
                entry_point=f"dsa_gym.envs.{registration.classes}Env",
                vector_entry_point=f"dsa_gym.envs.{registration.classes}VectorEnv",
                kwargs=registration.kwargs,
            )


def make_sb3_vec_env(
    env_id: str, num_envs: int, *, wrapper: Callable[[Any], Any] | None = None, **kwargs: Any
) -> GymnasiumVecEnv:
    """Make a natively batched stable-baselines3 ``VecEnv``.

    Args:
        env_id: A registered id.
        num_envs: Environments in the batch.
        wrapper: Put around the batch, such as :class:`dsa_gym.envs.wrappers.VectorRelaxedMask`.
        **kwargs: Arguments of the environment.

    Raises:
        ValueError: If ``num_envs`` is not positive, or an argument of the environment is wrong.
    """
    from dsa_gym.envs.sb3 import GymnasiumVecEnv

    envs: Any = gym.make_vec(env_id, num_envs=num_envs, **kwargs)
    return GymnasiumVecEnv(envs if wrapper is None else wrapper(envs))
