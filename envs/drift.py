"""The user's interests change within the episode, and what the agent knows of the user grows stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dsa_gym.envs.core import BatchedEnv, Observation, ScalarEnv, Step
from dsa_gym.envs.gating import GatingCore

MOST = 100.0
"""Observed rewards are clipped to [-MOST, MOST]."""


class DriftCore(GatingCore):
    """Episodes in which the person behind the inputs changes, while the embedding stays that of the first."""

    def __init__(
        self,
        *,
        num_envs: int = 1,
        domain: str,
        bundle: str | Path | None = None,
        split: str = "train",
        granularity: str = "pathway",
        drift: float = 0.1,
        hidden_user: bool = False,
        l0_penalty: float | None = None,
        reward_metric: str | None = None,
        episode_length: int = 16,
        device: str = "auto",
        render_mode: str | None = None,
        cache_bytes: int = 64 * 2**20,
    ) -> None:
        """Read the bundle's manifest; everything heavier waits for the first reset.

        Raises:
            ValueError: If an argument is wrong; the message names it.
        """
        super().__init__(
            num_envs=num_envs,
            domain=domain,
            bundle=bundle,
            split=split,
            granularity=granularity,
            l0_penalty=l0_penalty,
            reward_metric=reward_metric,
            episode_length=episode_length,
            device=device,
            render_mode=render_mode,
            cache_bytes=cache_bytes,
        )
        if isinstance(drift, bool) or not isinstance(drift, int | float | np.number) or not 0 <= drift <= 1:
            raise ValueError(f"drift={drift!r}: expected a probability in [0, 1]")
        if not isinstance(hidden_user, bool):
            raise ValueError(f"hidden_user={hidden_user!r}: expected True or False")
        self.drift, self.hidden_user = float(drift), hidden_user
        self.observation_space = spaces.Dict(
            {
                **self.observation_space.spaces,
                "mask": spaces.Box(0.0, 1.0, (self.gates,), np.float32),
                "reward": spaces.Box(-MOST, MOST, (1,), np.float32),
            }
        )
        self.mask = np.zeros((self.num_envs, self.gates), np.uint8)
        self.reward = np.zeros(self.num_envs)
        self.first = np.zeros(self.num_envs, np.int64)

    def begin(self, where: NDArray[np.intp], options: dict[str, Any] | None = None) -> None:
        """Begin episodes: the embedding is that of the user who is there now."""
        super().begin(where, options)
        self.first[where] = self.episodes.input[where]
        self.mask[where], self.reward[where] = 0, 0.0

    def observe(self) -> Observation:
        """The first user's embedding, the context, the last mask and the last reward."""
        observed = self.problem.observations
        user = observed["user"][self.first]
        return {
            "user": np.zeros_like(user) if self.hidden_user else user,
            "context": observed["context"][self.episodes.input],
            "mask": self.mask.astype(np.float32),
            "reward": np.clip(self.reward, -MOST, MOST)[:, None].astype(np.float32),
        }

    def step(self, actions: Any, batch: tuple[int, ...]) -> Step:
        """Apply one mask to each environment; then somebody else may be there."""
        result = super().step(actions, batch)
        assert self.last is not None
        self.mask, self.reward = self.last["gates"].copy(), result.reward.copy()
        going = np.flatnonzero(~result.terminated)
        if len(going):
            changed = going[self.episodes.draw(going, _PARTS) < self.drift * _PARTS]
            if len(changed):
                self.episodes.change_user(changed)
        return result


_PARTS = 2**32
"""Parts in which chance is drawn."""


class DriftEnv(ScalarEnv):
    """Choose masks for inputs whose author changes unseen, from a user embedding that grows stale.

    ## Description

    The problem of the gating environment over many inputs. After every step, with probability `drift`, the
    interests change: from then on inputs come from another user of the split. The embedding that the agent sees
    stays that of the user with whom the episode began; what helps is to notice from contexts and rewards that it
    no longer fits. The stored change that the model uses is always that of the input's user. With
    `hidden_user=True` no embedding is seen at all, and the problem is partially observed from the start.

    ## Action Space

    `MultiBinary(G)`: one bit per gate, as in the gating environment.

    ## Observation Space

    `Dict`, float32:

    | key | shape | what |
    |-----|-------|------|
    | `user` | (16,) | embedding of the user with whom the episode began, in [-5, 5]; zeros for `hidden_user` |
    | `context` | (16,) | the frozen model's view of what is known of the input, in [-5, 5] |
    | `mask` | (G,) | the last mask; zeros at the beginning |
    | `reward` | (1,) | the last reward, clipped to [-100, 100]; 0 at the beginning |

    ## Rewards

    `reward = -loss - l0_penalty * active_parameters`. `info` is that of the gating environment; its `user` is the
    one who is there now.

    ## Starting State

    A user is drawn uniformly, then one of the user's inputs. `reset(options={"user": U, "input": I})` fixes
    either or both.

    ## Episode End

    Terminates after `episode_length` steps.

    ## Arguments

    ```python
    gym.make("DSA-TextDrift-v0", bundle=None, split="train", granularity="pathway", drift=0.1, hidden_user=False,
             l0_penalty=None, reward_metric=None, episode_length=16, device="auto", render_mode=None,
             cache_bytes=64 * 2**20)
    ```

    * `drift`: probability of a change after each step, in [0, 1].
    * `hidden_user`: whether the embedding is hidden.
    * the others: as in the gating environment.

    ## Version History

    * v0: Initial version
    """

    core_class = DriftCore


class DriftVectorEnv(BatchedEnv):
    """A native batch of :class:`DriftEnv`, see :class:`~dsa_gym.envs.core.BatchedEnv`."""

    core_class = DriftCore
