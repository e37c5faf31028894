"""The gating environment over any domain's bundle: one mask per input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dsa_gym.bundle import Bundle
from dsa_gym.envs.core import BatchedEnv, Core, ScalarEnv, is_integer
from dsa_gym.envs.rendering import Frame
from dsa_gym.masks import MaskSpace
from dsa_gym.observations import LIMIT
from dsa_gym.population import SPLITS
from dsa_gym.problem import GatingProblem, check_dtype, check_metric


class GatingCore(Core):
    """Episodes over a split of a bundle; the environments that refine the problem derive from it."""

    def __init__(
        self,
        *,
        num_envs: int = 1,
        domain: str,
        bundle: str | Path | None = None,
        split: str = "train",
        granularity: str = "pathway",
        l0_penalty: float | None = None,
        reward_metric: str | None = None,
        episode_length: int = 1,
        device: str = "auto",
        dtype: str = "float32",
        compile: bool = False,
        render_mode: str | None = None,
        cache_bytes: int = 64 * 2**20,
        state_bytes: int = 256 * 2**20,
    ) -> None:
        """Read the bundle's manifest; everything heavier waits for the first reset.

        Raises:
            ValueError: If an argument is wrong; the message names it.
        """
        super().__init__(num_envs=num_envs, episode_length=episode_length, render_mode=render_mode)
        for name, size in (("cache_bytes", cache_bytes), ("state_bytes", state_bytes)):
            if not is_integer(size) or size < 0:
                raise ValueError(f"{name}={size!r}: expected a number of bytes >= 0")
        check_dtype(dtype)
        if not isinstance(compile, bool):
            raise ValueError(f"compile={compile!r}: expected True or False")
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        priced = isinstance(l0_penalty, int | float | np.number) and 0 <= l0_penalty < float("inf")
        if l0_penalty is not None and not priced:
            raise ValueError(f"l0_penalty={l0_penalty!r}: expected None or a finite number >= 0, per active parameter")
        check_metric(reward_metric, domain)
        self.source = str(bundle) if bundle is not None else domain
        # checksums are compared at the first reset, when the data is read
        self._opened = Bundle.open(self.source, verify=False)
        if self._opened.domain != domain:
            raise ValueError(f"bundle={self.source!r}: is of domain {self._opened.domain!r}, expected {domain!r}")
        self.arguments: dict[str, Any] = {
            "split": split,
            "granularity": granularity,
            "l0_penalty": l0_penalty,
            "reward_metric": reward_metric,
            "device": device,
            "dtype": dtype,
            "compile": compile,
            "cache_bytes": cache_bytes,
            "state_bytes": state_bytes,
        }
        sizes = self._opened.manifest["config"]
        self.observation_space = spaces.Dict(
            {
                "user": spaces.Box(-LIMIT, LIMIT, (sizes["user_dim"],), np.float32),
                "context": spaces.Box(-LIMIT, LIMIT, (sizes["context_dim"],), np.float32),
            }
        )
        self.gates = MaskSpace(self._opened.shape, granularity).gates
        self.action_space = spaces.MultiBinary(self.gates)

    @cached_property
    def problem(self) -> GatingProblem:
        """Scores masks; opened and checked at the first reset."""
        self._opened.verify()
        return GatingProblem(self._opened, **self.arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is loaded from the bundle: copies in other processes load it again."""
        state = self.__dict__.copy()
        for name in ("problem", "_domain", "_opened"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened = Bundle.open(self.source, verify=False)

    def user_names(self) -> Sequence[str]:
        """The bundle's users."""
        return self._opened.users

    @property
    def total_parameters(self) -> int:
        """P."""
        return self._opened.shape.size

    def frame(self, index: int) -> Frame:
        """What there is to see of one environment."""
        shape, last = self._opened.shape, self.last
        row = int(self.episodes.input[index] if last is None else last["input"][index])
        user = int(self.episodes.user[index] if last is None else last["user"][index])
        gates = None if last is None else last["gates"][index]
        per_site = np.zeros((len(shape.sites), shape.pathways), dtype=np.float32)
        if gates is not None:
            per_site = _share_on(self.problem, gates)
        parts = self._domain.describe(self._opened.examples, int(self.problem.rows[row]))
        if gates is not None:
            *known, target = parts
            outcome = self.problem.outcome(row, gates)
            parts = {name: parts[name] for name in known} | outcome | {target: parts[target]}
        kinds = {"attention": "attn", "feed_forward": "ffn"}
        return Frame(
            user=self._opened.users[user],
            parts=parts,
            mask=per_site,
            site_labels=tuple(f"L{site.layer} {kinds.get(site.kind, site.kind)}" for site in shape.sites),
            layers=tuple(site.layer for site in shape.sites),
            gates=_gates_text(gates, self.problem.space.granularity),
            **self.numbers(index),
        )

    @cached_property
    def _domain(self) -> Any:
        return self._opened.make_domain()


def _share_on(problem: GatingProblem, gates: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Share of each pathway's parameters that is on at each site, (sites, pathways)."""
    import torch

    shape = problem.bundle.shape
    shares = problem.space.component_shares(torch.from_numpy(gates[None]).float())[0]  # (sites, rank)
    on: NDArray[np.float32] = shares.unflatten(1, (shape.pathways, -1)).mean(-1).numpy()
    return on


def _gates_text(gates: NDArray[np.uint8] | None, granularity: str) -> str:
    if gates is None:
        return "no decision yet"
    if len(gates) <= 64:
        return "".join(map(str, gates))
    return f"{int(gates.sum())} of {len(gates)} {granularity} gates on"


class GatingEnv(ScalarEnv):
    """Choose which adapter pathways to switch on for a user and an input.

    ## Description

    A frozen transformer carries a library of adapter pathways that all users share and a tiny sparse change
    of each user's own. Before an input is processed the agent sees who the user is and how the input begins,
    and switches G gates. The gates expand to a binary mask m over the adapter parameters, and the model `M(x;
    theta, phi_u * m)` is scored on the rest of the input. With `episode_length=1` this is a contextual bandit
    (use `gamma=0`). What counts is how well a policy does for users that it has never seen.

    ## Action Space

    `MultiBinary(G)`: one bit per gate. What a gate switches depends on `granularity`, for the default bundle
    (4 layers, 8 sites of width 128, rank 32, 8 pathways):

    | granularity | a gate switches | G |
    |-------------|-----------------|---|
    | `pathway` | a pathway at every site | 8 |
    | `layer` | a pathway at the sites of a layer | 32 |
    | `site` | a pathway at one site | 64 |
    | `component` | a rank-1 unit of a site | 256 |
    | `element` | one parameter | 65,536 |

    ## Observation Space

    `Dict`, float32, whitened and clipped to [-5, 5]:

    | key | shape | what |
    |-----|-------|------|
    | `user` | (16,) | user embedding, from the user's support examples only |
    | `context` | (16,) | the frozen model's view of what is known of the input |

    ## Rewards

    `reward = -loss - l0_penalty * active_parameters`: the loss and the number of adapter parameters that the
    mask switches on. It is deterministic given user, input and mask.

    | domain | known of the input | loss | `reward_metric` |
    |--------|--------------------|------|-----------------|
    | text | prefix | cross-entropy per token of the continuation, nats | `rougeL`, `bleu` (greedy) |
    | recommendation | history, time | cross-entropy of the next items, nats | `ndcg@10`, `recall@10`, ... |
    | image | condition, noised image | squared error of the denoised image | `psnr` (one step) |

    With a `reward_metric` the loss is minus that metric, which no gradient reaches. `info` holds `loss`,
    `active_parameters`, `density` (share of all adapter parameters), `user` and `input` (indices) of the step, and
    `regret` (how much more the best mask of the input earns) where the losses under all masks are measured; after
    `reset`, `user` and `input` of the first decision.

    ## Starting State

    A user is drawn uniformly, then one of the user's inputs. `reset(options={"user": U, "input": I})` fixes
    either or both; a user is an index or a name, an input an index into the split.

    ## Episode End

    Terminates after `episode_length` steps; the user stays and every step draws another input of that user.
    The observation returned with the last step is the one that was acted on.

    ## Arguments

    ```python
    gym.make("DSA-Text-v0", bundle=None, split="train", granularity="pathway", l0_penalty=None,
             reward_metric=None, episode_length=1, device="auto", dtype="float32", compile=False,
             render_mode=None, cache_bytes=64 * 2**20, state_bytes=256 * 2**20)
    ```

    * `bundle`: folder written by `dsa-gym prepare`; None for the domain's shipped bundle.
    * `split`: `train` (training users' query inputs), `seen` (the same users, inputs never trained on),
      `validation` and `test` (users that nothing was trained on).
    * `granularity`: see above. Tables of measured losses serve the granularity that the library was trained
      under.
    * `l0_penalty`: lambda, the price of an active parameter in the unit of the loss, >= 0; None for the
      domain's, which is small beside what a good mask gains (0 with a `reward_metric`).
    * `reward_metric`: a task metric in the place of minus the loss, see above.
    * `episode_length`: inputs per episode.
    * `device`: `"auto"`, `"cpu"`, `"cuda"`.
    * `dtype`: of the backbone: `"float32"`, `"bfloat16"` or `"float16"`. In half precision rewards differ a little from
      those of the bundle's tables, which are then not used.
    * `render_mode`: `"ansi"` or `"rgb_array"`.
    * `compile`: whether losses are computed by `torch.compile`; it needs a C++ compiler, and half a minute at the first
      step.
    * `cache_bytes`: bound on remembered losses; 0 computes every loss through the model and ignores the
      bundle's tables.
    * `state_bytes`: bound on remembered states that no mask can change (what comes before the first adapter); 0
      computes them anew.

    ## Version History

    * v0: Initial version
    """

    core_class = GatingCore


class GatingVectorEnv(BatchedEnv):
    """A native batch of :class:`GatingEnv`, see :class:`~dsa_gym.envs.core.BatchedEnv`."""

    core_class = GatingCore
