"""The environment over a planted instance, whose optimum is known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium import spaces

from dsa_gym.envs.core import BatchedEnv, Core, ScalarEnv
from dsa_gym.envs.rendering import Frame
from dsa_gym.observations import LIMIT
from dsa_gym.planted import OBSERVED, PlantedConfig, PlantedProblem


class PlantedCore(Core):
    """Episodes over a split of a planted instance."""

    def __init__(
        self,
        *,
        num_envs: int = 1,
        split: str = "train",
        l0_penalty: float = 0.01,
        episode_length: int = 1,
        render_mode: str | None = None,
        **instance: Any,
    ) -> None:
        """Check the arguments; the instance is drawn at the first reset."""
        super().__init__(num_envs=num_envs, episode_length=episode_length, render_mode=render_mode)
        try:
            self._config = PlantedConfig(**instance)
        except TypeError as error:
            raise ValueError(f"{instance}: not the settings of an instance ({error})") from error
        self._arguments: dict[str, Any] = {"split": split, "l0_penalty": l0_penalty}
        PlantedProblem(PlantedConfig(users=1, inputs=1), **self._arguments)  # refuses what is out of range
        box = spaces.Box(-LIMIT, LIMIT, (OBSERVED,), np.float32)
        self.observation_space = spaces.Dict({"user": box, "context": box})
        self.action_space = spaces.MultiBinary(self._config.gates)

    @cached_property
    def problem(self) -> PlantedProblem:
        """The instance's split."""
        return PlantedProblem(self._config, **self._arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is drawn again in a copy."""
        return {name: value for name, value in self.__dict__.items() if name != "problem"}

    def user_names(self) -> Sequence[str]:
        """Numbers."""
        return [f"user-{number}" for number in range(self._config.users)]

    @property
    def total_parameters(self) -> int:
        """G: each gate switches one."""
        return self._config.gates

    def frame(self, index: int) -> Frame:
        """The mask in channels, and the gates that are needed."""
        last, size = self.last, self._config.channel_size
        row = int(self.episodes.input[index] if last is None else last["input"][index])
        gates = None if last is None else last["gates"][index]
        shown = np.zeros(self._config.gates, np.float32) if gates is None else gates.astype(np.float32)
        need = self.problem.need[row]
        channels = [f"channel {channel}: gate {gate}" for channel, gate in enumerate(need[:SHOWN].tolist())]
        return Frame(
            user=f"user-{int(self.problem.user[row])}",
            parts={"needed": "; ".join(channels) + ("; ..." if len(need) > SHOWN else "")},
            mask=shown.reshape(-1, size)[:SHOWN],
            site_labels=tuple(f"C{channel}" for channel in range(len(need[:SHOWN]))),
            layers=tuple(range(len(need[:SHOWN]))),
            gates="no decision yet" if gates is None else "".join(map(str, gates[:64])),
            **self.numbers(index),
        )


SHOWN = 16
"""Channels that are drawn."""


class PlantedEnv(ScalarEnv):
    """Switch on the gates that a user and an input need, in a generated instance whose optimum is known.

    ## Description

    The gates come in channels. Each input needs one gate of every channel; which one follows from the kind of
    its user and the register of the input, and a policy has to find out both from noisy views of them. The
    reward is the expected one, so regret is exact: no label noise hides behind the oracle. See
    :mod:`dsa_gym.planted` for the loss and the best mask. With `interference=0` everything on is optimal, so a
    static mask is enough; the more interference, the more is to be gained by looking.

    ## Action Space

    `MultiBinary(G)`: one bit per gate, channel by channel.

    ## Observation Space

    `Dict`, float32, clipped to [-5, 5]:

    | key | shape | what |
    |-----|-------|------|
    | `user` | (16,) | a random vector of the user's kind, with noise that stays the same for a user |
    | `context` | (16,) | a random vector of the input's register, with noise of the input |

    ## Rewards

    `reward = -loss - l0_penalty * active_parameters`; a gate is one parameter. The loss is 0 if just the needed
    gates are on and 1 if none is. `info` holds `loss`, `active_parameters`, `density`, `user`, `input` and
    `regret`, the best reward of this input less the one received.

    ## Starting State

    A user is drawn uniformly, then one of the user's inputs. `reset(options={"user": U, "input": I})` fixes
    either or both.

    ## Episode End

    Terminates after `episode_length` steps; the user stays and every step draws another input of that user.

    ## Arguments

    ```python
    gym.make("DSA-Planted-v0", split="train", users=200, inputs=12, gates=8, active=0.25, interference=1.0,
             kinds=4, registers=2, all_registers=4, noise=0.3, seed=0, l0_penalty=0.01, episode_length=1,
             render_mode=None)
    ```

    * `split`: `train`, `seen` (the same users, other inputs), `validation` and `test` (other users of the same
      kinds).
    * `users`, `inputs`: users of the split, and inputs of each.
    * `gates`: G, 1 to 4096. `active`: share of gates that an input needs, 1 / s for channels of s gates.
    * `interference`: harm that the other gates of a channel do to the needed one, in [0, 1].
    * `kinds`, `all_registers`: kinds of users and registers there are. `registers`: those that one user has.
    * `noise`: standard deviation of the noise on observations, whose signal has variance 1.
    * `seed`: another seed is another instance.
    * `l0_penalty`: lambda, price of a gate.

    ## Version History

    * v0: Initial version
    """

    core_class = PlantedCore


class PlantedVectorEnv(BatchedEnv):
    """A native batch of :class:`PlantedEnv`, see :class:`~dsa_gym.envs.core.BatchedEnv`."""

    core_class = PlantedCore
