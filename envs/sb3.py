"""A stable-baselines3 ``VecEnv`` over a natively batched Gymnasium vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvObs, VecEnvStepReturn


class GymnasiumVecEnv(VecEnv):
    """Hands whole batches through; only the list of infos that SB3 asks for is made per environment."""

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        """Wrap ``envs``.

        Raises:
            ValueError: If it does not reset in the same step.
        """
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(f"envs: autoreset mode {mode}, expected AutoresetMode.SAME_STEP")
        self.envs: Any = envs
        self.render_mode = envs.render_mode
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self._actions: Any = None

    def reset(self) -> VecEnvObs:
        """Begin episodes with the seeds and options that were set."""
        seeds = list(self._seeds) if any(seed is not None for seed in self._seeds) else None
        options = self._merged_options()
        observation: VecEnvObs
        observation, infos = self.envs.reset(seed=seeds, options=options)
        self.reset_infos = [{name: infos[name][i].item() for name in _arrays(infos)} for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all environments."""
        observation, rewards, ended, truncated, infos = self.envs.step(self._actions)
        done = ended | truncated
        step = infos
        if "final_info" in infos:  # of the episodes that ended; infos itself tells of the others
            final = infos["final_info"]
            step = {name: np.where(done, final[name], infos.get(name, final[name])) for name in _arrays(final)}
        names = _arrays(step)
        columns = [np.asarray(step[name]).tolist() for name in names]
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        for i in np.flatnonzero(done):
            if "final_obs" in infos:  # look-up environments leave it out
                rows[i]["terminal_observation"] = infos["final_obs"][i]
            rows[i]["TimeLimit.truncated"] = bool(truncated[i] and not ended[i])
        return observation, rewards.astype(np.float32), done, rows

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The batch's attribute, once per environment asked for."""
        holder: Any = self.envs
        while not hasattr(holder, attr_name) and hasattr(holder, "env"):  # Gymnasium's vector wrappers forward nothing
            holder = holder.env
        return [getattr(holder, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the whole batch.

        Raises:
            ValueError: If only some environments are named.
        """
        self._require_all(indices, "set_attr")
        setattr(self.envs, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of the batch, and return its result once per environment asked for."""
        result = getattr(self.envs, method_name)(*method_args, **method_kwargs)
        if method_name == "action_masks":  # sb3-contrib asks each environment for its own
            return [result[i] for i in self._get_indices(indices)]
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Whether the batch is wrapped by ``wrapper_class``."""
        wrapped: Any = self.envs
        found = False
        while hasattr(wrapped, "env"):
            found = found or isinstance(wrapped, wrapper_class)
            wrapped = wrapped.env
        return [found for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Frames of all environments."""
        return list(self.envs.render() or ()) if self.render_mode == "rgb_array" else [None] * self.num_envs

    def _merged_options(self) -> dict[str, Any] | None:
        """One dictionary of arrays from the per-environment options.

        Raises:
            ValueError: If some environments have an option that others lack.
        """
        names = {name for options in self._options for name in options}
        for name in names:
            if not all(name in options for options in self._options):
                raise ValueError(f"options: {name!r} is set for some environments only; set it for all or none")
        columns = {name: [options[name] for options in self._options] for name in names}
        return {name: np.asarray(column, dtype=object) for name, column in columns.items()} or None

    def _require_all(self, indices: Any, method: str) -> None:
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"indices={indices!r}: {method} acts on the whole batch of {self.num_envs}")


def _arrays(infos: dict[str, Any]) -> list[str]:
    """Names of the per-environment arrays: neither their masks, ``_name``, nor what a wrapper nests."""
    nested = ("final_obs", "final_info")
    return [
        name for name, value in infos.items() if isinstance(value, np.ndarray) and name[0] != "_" and name not in nested
    ]
