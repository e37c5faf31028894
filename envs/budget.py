"""Switch gates on one by one under a hard budget of active parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dsa_gym.envs.core import BatchedEnv, Observation, ScalarEnv, Step, discrete
from dsa_gym.envs.gating import GatingCore


class BudgetCore(GatingCore):
    """Episodes in which a mask grows gate by gate."""

    def __init__(
        self,
        *,
        num_envs: int = 1,
        domain: str,
        bundle: str | Path | None = None,
        split: str = "train",
        granularity: str = "pathway",
        budget: float = 0.25,
        l0_penalty: float | None = None,
        reward_metric: str | None = None,
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
            device=device,
            render_mode=render_mode,
            cache_bytes=cache_bytes,
        )
        if isinstance(budget, bool) or not isinstance(budget, int | float | np.number) or not 0 < budget <= 1:
            raise ValueError(f"budget={budget!r}: expected a share of all adapter parameters in (0, 1]")
        self.budget = int(budget * self.total_parameters)
        self.action_space = spaces.Discrete(self.gates + 1)
        self.observation_space = spaces.Dict(
            {
                **self.observation_space.spaces,
                "mask": spaces.Box(0.0, 1.0, (self.gates,), np.float32),
                "budget": spaces.Box(0.0, 1.0, (1,), np.float32),
            }
        )
        self.mask = np.zeros((self.num_envs, self.gates), np.uint8)

    def begin(self, where: NDArray[np.intp], options: dict[str, Any] | None = None) -> None:
        """Begin episodes with nothing on."""
        super().begin(where, options)
        self.mask[where] = 0

    def observe(self) -> Observation:
        """User and context, the mask so far and the share of the budget that is left."""
        left = 1 - self.problem.active_parameters(self.mask) / max(self.budget, 1)
        grown = {"mask": self.mask.astype(np.float32), "budget": left[:, None].astype(np.float32)}
        return super().observe() | grown

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are allowed, bool (num_envs, G + 1): gates that are off and affordable, and to stop."""
        left = self.budget - self.problem.active_parameters(self.mask)
        affordable = self.problem.sizes <= left[:, None]
        return np.hstack([(self.mask == 0) & affordable, np.ones((self.num_envs, 1), bool)])

    def step(self, actions: Any, batch: tuple[int, ...]) -> Step:
        """Switch one gate on in each environment, or stop."""
        chosen = discrete(actions, batch, self.gates + 1)
        row = np.arange(self.num_envs)
        stopped = (chosen == self.gates) | ~self.action_masks()[row, chosen]
        self.mask[row[~stopped], chosen[~stopped]] = 1
        ended = stopped | ~self.action_masks()[:, :-1].any(1)
        scored = self.score(self.mask.copy(), ended, self.budget)
        return Step(scored.pop("reward"), ended, scored)


class BudgetEnv(ScalarEnv):
    """Switch gates on one by one until a hard budget of active parameters is used up, or stop.

    ## Description

    The problem of the gating environment, as a sequence: a device that can afford only so many active adapter
    parameters fills its budget gate by gate. The final mask is scored once. `action_masks()` tells which actions
    are allowed (sb3-contrib's `MaskablePPO` asks for it); a forbidden action counts as stopping.

    ## Action Space

    `Discrete(G + 1)`: switch on gate 0 to G - 1, or stop (G).

    ## Observation Space

    `Dict`, float32:

    | key | shape | what |
    |-----|-------|------|
    | `user`, `context` | (16,) | as in the gating environment, in [-5, 5] |
    | `mask` | (G,) | gates that are on |
    | `budget` | (1,) | share of the budget that is left |

    ## Rewards

    0 until the episode ends, then `-loss - l0_penalty * active_parameters` of the final mask: what the gating
    environment gives for it. `info` holds `loss` (0 before the end), `active_parameters`, `density`, `user`, `input`
    and, where the losses under all masks are measured, `regret`: how much more the best mask within the budget
    earns (0 before the end).

    ## Starting State

    A user is drawn uniformly, then one of the user's inputs, with nothing on. `reset(options={"user": U,
    "input": I})` fixes either or both.

    ## Episode End

    Terminates when the agent stops, does what is forbidden, or can afford no further gate.

    ## Arguments

    ```python
    gym.make("DSA-TextBudget-v0", bundle=None, split="train", granularity="pathway", budget=0.25, l0_penalty=None,
             reward_metric=None, device="auto", render_mode=None, cache_bytes=64 * 2**20)
    ```

    * `budget`: most active parameters, as a share of all adapter parameters, in (0, 1].
    * the others: as in the gating environment.

    ## Version History

    * v0: Initial version
    """

    core_class = BudgetCore
    _core: BudgetCore

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are allowed now, bool (G + 1,)."""
        allowed: NDArray[np.bool_] = self._core.action_masks()[0]
        return allowed


class BudgetVectorEnv(BatchedEnv):
    """A native batch of :class:`BudgetEnv`, see :class:`~dsa_gym.envs.core.BatchedEnv`."""

    core_class = BudgetCore
    _core: BudgetCore

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are allowed now, bool (num_envs, G + 1)."""
        return self._core.action_masks()
