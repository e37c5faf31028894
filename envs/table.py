"""The gating problem as an exact look-up, for studies of millions of steps."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dsa_gym.bundle import Bundle
from dsa_gym.envs.core import BatchedEnv, ScalarEnv, Step, binary, discrete
from dsa_gym.envs.gating import GatingCore
from dsa_gym.model import all_gates
from dsa_gym.problem import GatingProblem, mask_codes
from dsa_gym.tables import read_table, table_record

ACTIONS = ("binary", "discrete")


class TableCore(GatingCore):
    """Episodes whose rewards are looked up."""

    final_obs = False

    def __init__(
        self,
        *,
        num_envs: int = 1,
        domain: str,
        bundle: str | Path | None = None,
        split: str = "train",
        table: str | Path | None = None,
        actions: str = "binary",
        l0_penalty: float | None = None,
        episode_length: int = 1,
        render_mode: str | None = None,
    ) -> None:
        """Read the bundle's manifest; the table is read at the first reset.

        Raises:
            ValueError: If an argument is wrong, or the bundle has no table of the split.
        """
        if actions not in ACTIONS:
            raise ValueError(f"actions={actions!r}: expected one of {', '.join(ACTIONS)}")
        source = str(bundle) if bundle is not None else domain
        self._table = None if table is None else str(table)
        opened = Bundle.open(source, verify=False)
        granularity = opened.manifest["granularity"]
        if table is not None:
            about = table_record(Path(table), split)["about"]
            granularity = about["granularity"]
            if about["bundle"] != opened.checksum:
                raise ValueError(f"table={str(table)!r}: was built of another bundle than {source!r}")
        super().__init__(
            num_envs=num_envs,
            domain=domain,
            bundle=bundle,
            split=split,
            granularity=granularity,
            l0_penalty=l0_penalty,
            episode_length=episode_length,
            device="cpu",
            render_mode=render_mode,
        )
        if table is None and self._opened.table(split) is None:
            raise ValueError(
                f"bundle={source!r}: no measured losses of split {split!r}; only libraries of at most 8 gates have them"
            )
        self._discrete = actions == "discrete"
        if self._discrete:
            self.action_space = spaces.Discrete(2**self.gates)

    @cached_property
    def problem(self) -> GatingProblem:
        """Scores masks by the table; opened and checked at the first reset."""
        self._opened.verify()
        problem = GatingProblem(self._opened, **self.arguments)
        if self._table is not None:
            problem.table, problem.even_table = read_table(Path(self._table), problem.split), None
        return problem

    @cached_property
    def _tables(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.uint8]]:
        """Losses (n * 2^G,), active parameters (2^G,) and masks (2^G, G)."""
        problem = self.problem
        masks = all_gates(problem.space).numpy()
        active = problem.active_parameters(masks)
        return np.asarray(problem.table, dtype=np.float64).ravel(), active, masks

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tables out."""
        return {name: value for name, value in super().__getstate__().items() if name != "_tables"}

    def step(self, actions: Any, batch: tuple[int, ...]) -> Step:
        """Look up one decision of each environment."""
        losses, active, masks = self._tables
        if self._discrete:
            codes = discrete(actions, batch, len(masks))
        else:
            codes = mask_codes(binary(actions, batch, self.gates))
        inputs = self.episodes.input
        loss, on = losses.take(inputs * len(masks) + codes), active.take(codes)
        reward = -loss - self.problem.l0_penalty * on
        info = self.info(loss, on) | {"regret": self.problem.best_rewards(inputs) - reward}
        if self.render_mode is not None:
            self.remember(info, masks[codes])
        return Step(reward, self.episodes.advance(), info)


class TableEnv(ScalarEnv):
    """The gating problem of `DSA-Text-v0` and its like as an exact look-up over all masks.

    ## Description

    The losses of every input under all 2^G masks were measured when the bundle was made. This environment never
    runs the model: a batch of 4,096 steps is a few array operations. Rewards are those of the environment that
    runs it, and the best mask is known.

    ## Action Space

    `MultiBinary(G)` for `actions="binary"`, `Discrete(2^G)` for `actions="discrete"`: bit i of the number is gate
    i.

    ## Observation Space

    `Dict`, float32, whitened and clipped to [-5, 5]: `user` and `context` as in the gating environment.

    ## Rewards

    `reward = -loss - l0_penalty * active_parameters`. `info` holds `loss`, `active_parameters`, `density`, `user`,
    `input` and `regret`, the best reward of this input less the one received.

    ## Starting State

    A user is drawn uniformly, then one of the user's inputs. `reset(options={"user": U, "input": I})` fixes
    either or both.

    ## Episode End

    Terminates after `episode_length` steps; the user stays and every step draws another input of that user. The
    vector environment leaves `final_obs` out: it is the observation that was acted on, and making thousands of
    dictionaries would cost more than the steps.

    ## Arguments

    ```python
    gym.make("DSA-TextTable-v0", bundle=None, split="train", table=None, actions="binary", l0_penalty=None,
             episode_length=1, render_mode=None)
    ```

    * `bundle`: folder written by `dsa-gym prepare`; None for the domain's shipped bundle.
    * `split`: `train`, `seen`, `validation` or `test`.
    * `table`: folder written by `dsa-gym table`, for a granularity of at most 16 gates; None for the bundle's own.
    * `actions`: `"binary"` or `"discrete"`.
    * `l0_penalty`: lambda, the price of an active parameter; None for the domain's.
    * `episode_length`: inputs per episode.

    ## Version History

    * v0: Initial version
    """

    core_class = TableCore


class TableVectorEnv(BatchedEnv):
    """A native batch of :class:`TableEnv`, see :class:`~dsa_gym.envs.core.BatchedEnv`; without `final_obs`."""

    core_class = TableCore
