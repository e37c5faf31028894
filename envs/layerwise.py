"""Decide the gates of one layer after the other, each after seeing the state that reached it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from dsa_gym.domains import take, to_device
from dsa_gym.envs.core import BatchedEnv, Observation, ScalarEnv, Step, binary
from dsa_gym.envs.gating import GatingCore
from dsa_gym.layerwise import LayerwiseModel, Passage
from dsa_gym.observations import LIMIT, Projection, fit_projection

GRANULARITIES = ("layer", "site")
FITTED_ON = 512
"""Training inputs at most that the view of the states is fitted on."""


@dataclass
class _Cohort:
    """Environments whose episodes began together: one batch on its way through the model."""

    where: NDArray[np.intp]
    passage: Passage


class LayerwiseCore(GatingCore):
    """Episodes of one step per layer; only that layer is computed."""

    def __init__(
        self,
        *,
        num_envs: int = 1,
        domain: str,
        bundle: str | Path | None = None,
        split: str = "train",
        granularity: str = "layer",
        l0_penalty: float | None = None,
        device: str = "auto",
        render_mode: str | None = None,
    ) -> None:
        """Read the bundle's manifest; everything heavier waits for the first reset.

        Raises:
            ValueError: If an argument is wrong; the message names it.
        """
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r}: expected one of {', '.join(GRANULARITIES)}")
        super().__init__(
            num_envs=num_envs,
            domain=domain,
            bundle=bundle,
            split=split,
            granularity=granularity,
            l0_penalty=l0_penalty,
            device=device,
            render_mode=render_mode,
            cache_bytes=0,
        )
        self.layers = self._opened.shape.layers
        self.per_layer = self.gates // len(self.layers)
        dim = self._opened.manifest["config"]["context_dim"]
        self.action_space = spaces.MultiBinary(self.per_layer)
        self.observation_space = spaces.Dict(
            {
                **self.observation_space.spaces,
                "state": spaces.Box(-LIMIT, LIMIT, (dim,), np.float32),
                "layer": spaces.Box(0.0, 1.0, (len(self.layers),), np.float32),
                "mask": spaces.Box(0.0, 1.0, (self.gates,), np.float32),
            }
        )
        self.mask = np.zeros((self.num_envs, self.gates), np.uint8)
        self.place = np.zeros(self.num_envs, np.int64)
        self.state = np.zeros((self.num_envs, dim), np.float32)
        self._cohorts: list[_Cohort] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be computed again."""
        state = {name: value for name, value in super().__getstate__().items() if name not in ("_model", "_views")}
        where = [cohort.where for cohort in self._cohorts]
        return state | {"_cohorts": [], "_begun": where}

    @cached_property
    def _model(self) -> LayerwiseModel:
        return LayerwiseModel(self.problem.model)

    @cached_property
    def _views(self) -> list[Projection]:
        """A whitened view of the state before each layer, fitted on training inputs without adapters."""
        rows = self._opened.rows("train")
        passage = self._start(rows[:: max(1, len(rows) // FITTED_ON)])
        views = []
        for layer in self.layers:
            self._run_to(passage, layer)
            views.append(fit_projection(self._model.known(passage).cpu(), self.state.shape[1]))
        return views

    def _start(self, rows: torch.Tensor) -> Passage:
        """Rows of the bundle's examples before the first block."""
        device = self.problem.device
        examples = to_device(take(self._opened.examples, rows), device)
        return self._model.begin(examples, *self.problem.parameters(self._opened.user[rows]))

    def _run_to(self, passage: Passage, layer: int) -> None:
        """Run blocks without adapters until ``layer`` is next."""
        while passage.block < layer:
            self._model.advance(passage, None)

    def begin(self, where: NDArray[np.intp], options: dict[str, Any] | None = None) -> None:
        """Begin episodes before the first layer."""
        super().begin(where, options)
        self.mask[where], self.place[where] = 0, 0
        for cohort in self._cohorts:  # who is reset leaves; its rows go on unheard
            cohort.where = np.where(np.isin(cohort.where, where), -1, cohort.where)
        self._cohorts = [cohort for cohort in self._cohorts if (cohort.where >= 0).any()]
        self._enter(where)

    def _enter(self, where: NDArray[np.intp]) -> None:
        cohort = _Cohort(where.copy(), self._start(self.problem.rows[self.episodes.input[where]]))
        self._cohorts.append(cohort)
        self._run_to(cohort.passage, self.layers[0])
        self._look(cohort, 0)

    def _look(self, cohort: _Cohort, place: int) -> None:
        """Take the view of the state before a layer."""
        view = self._views[place](self._model.known(cohort.passage).cpu()).numpy()
        heard = cohort.where >= 0
        self.state[cohort.where[heard]] = view[heard]

    def observe(self) -> Observation:
        """User, context, the state that reached the layer, which layer it is, and the mask so far."""
        layer = np.eye(len(self.layers), dtype=np.float32)[np.minimum(self.place, len(self.layers) - 1)]
        seen = {"state": self.state.copy(), "layer": layer, "mask": self.mask.astype(np.float32)}
        return super().observe() | seen

    def step(self, actions: Any, batch: tuple[int, ...]) -> Step:
        """Decide the next layer of each environment, and run it."""
        gates = binary(actions, batch, self.per_layer)
        self._resume()
        losses = np.zeros(self.num_envs)
        columns = self.place[:, None] * self.per_layer + np.arange(self.per_layer)
        np.put_along_axis(self.mask, columns, gates, 1)
        paid = self.problem.l0_penalty * (gates * self.problem.sizes[columns]).sum(1)
        self.place += 1
        for cohort in list(self._cohorts):
            heard = cohort.where >= 0
            place = int(self.place[cohort.where[heard]][0])
            self._decide(cohort, place)
            if place == len(self.layers):
                losses[cohort.where[heard]] = self._model.losses(cohort.passage).cpu().numpy()[heard]
                self._cohorts.remove(cohort)
        info = self.info(losses, self.problem.active_parameters(self.mask))
        self.remember(info, self.mask.copy())
        return Step(-losses - paid, self.place == len(self.layers), info)

    def _decide(self, cohort: _Cohort, place: int) -> None:
        """Run the layer whose gates were decided, and what follows without a decision; ``place`` layers are decided."""
        bits = torch.from_numpy(self.mask[np.maximum(cohort.where, 0)]).to(self.problem.device, torch.float32)
        self._model.advance(cohort.passage, self.problem.space.expand(bits))
        if place < len(self.layers):
            self._run_to(cohort.passage, self.layers[place])
            self._look(cohort, place)
        else:
            self._run_to(cohort.passage, self._model.count)

    def _resume(self) -> None:
        """In a copy, compute again what the original had computed."""
        for where in self.__dict__.pop("_begun", []):
            heard = where[where >= 0]
            self._enter(heard)
            for place in range(int(self.place[heard[0]])):
                self._decide(self._cohorts[-1], place + 1)


class LayerwiseEnv(ScalarEnv):
    """Decide a layer's gates after seeing the state that reached it.

    ## Description

    The problem of the gating environment as a true sequence: the input travels through the transformer, and
    before each layer that has adapters the agent sees the hidden state that its earlier decisions have led to and
    switches that layer's pathways. Each step computes one layer only. The final loss is that of the gating
    environment for the same mask.

    ## Action Space

    `MultiBinary(G / L)`: the gates of the next of L layers (`granularity="layer"`: one per pathway; `"site"`: one per
    pathway and site).

    ## Observation Space

    `Dict`, float32:

    | key | shape | what |
    |-----|-------|------|
    | `user`, `context` | (16,) | as in the gating environment, in [-5, 5] |
    | `state` | (16,) | the state that reached the layer, mean over what is known of the input, whitened, in [-5, 5] |
    | `layer` | (L,) | which layer is next, one-hot |
    | `mask` | (G,) | gates decided so far |

    ## Rewards

    `-l0_penalty * active_parameters` of the layer at each step, and `-loss` at the last: their sum is the reward of
    the gating environment for the whole mask. `info` holds `loss` (0 before the end), `active_parameters` (so far),
    `density`, `user` and `input`.

    ## Starting State

    A user is drawn uniformly, then one of the user's inputs. `reset(options={"user": U, "input": I})` fixes
    either or both.

    ## Episode End

    Terminates after the last layer.

    ## Arguments

    ```python
    gym.make("DSA-TextLayerwise-v0", bundle=None, split="train", granularity="layer", l0_penalty=None, device="auto",
             render_mode=None)
    ```

    * `granularity`: `"layer"` or `"site"`, see above.
    * the others: as in the gating environment.

    ## Version History

    * v0: Initial version
    """

    core_class = LayerwiseCore


class LayerwiseVectorEnv(BatchedEnv):
    """A native batch of :class:`LayerwiseEnv`, see :class:`~dsa_gym.envs.core.BatchedEnv`.

    Environments that began together travel as one batch.
    """

    core_class = LayerwiseCore
