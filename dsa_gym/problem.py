"""The gating problem of a bundle's split: inputs, what is observed of them, and the loss under any mask.

The loss is in the domain's unit, or minus a task metric where that is the reward. This is the one place where a mask is
scored. Environments, the ladder, searches and oracles all ask it.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsa_gym.bundle import Bundle
from dsa_gym.domains import Examples, domain_class, take, to_device
from dsa_gym.frozen_states import FrozenStates
from dsa_gym.masks import GRANULARITIES, MaskSpace
from dsa_gym.memory import keep_freed_memory
from dsa_gym.model import AdaptedModel, all_gates

Bits = NDArray[np.uint8]
DTYPES = ("float32", "bfloat16", "float16")


class GatingProblem:
    """Inputs of one split under the masks of one granularity.

    Attributes:
        bundle: Where it comes from.
        split: Name of the split.
        space: The gates.
        l0_penalty: lambda, price of one active parameter in the unit of the loss.
        reward_metric: Task metric that takes the place of minus the loss, or None.
        rows: Row of each input in the bundle's examples, int64 (n,).
        user: Index of each input's user, int64 (n,).
        table: Measured losses of the inputs under all masks (n, 2^G), or None.
        even_table: The share that even scored elements have in them, or None.
        sizes: Parameters that each gate switches, float64 (G,).
        requests: Losses that were asked of the cache of computed losses so far.
        hits: How many of them it had, or had been asked for in the same batch.
    """

    def __init__(
        self,
        bundle: Bundle,
        split: str = "train",
        *,
        granularity: str | None = None,
        l0_penalty: float | None = None,
        reward_metric: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        compile: bool = False,
        cache_bytes: int = 64 * 2**20,
        state_bytes: int = 256 * 2**20,
        inputs: Tensor | None = None,
    ) -> None:
        """Open a split; the backbone is loaded when a loss is first computed.

        Args:
            bundle: An opened bundle.
            split: ``train``, ``seen``, ``validation``, ``test``, or ``support``.
            granularity: See :mod:`dsa_gym.masks`; None for what the library was trained under.
            l0_penalty: lambda, price of one active parameter in the unit of the loss; None for the domain's, or
                for 0 under a ``reward_metric``, whose scale is another.
            reward_metric: One of the domain's task metrics, such as ``ndcg@10``: what is called the loss is then minus
                that metric. No gradient reaches it, and the bundle's tables do not hold it.
            device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
            dtype: Floating-point type of the backbone, one of :data:`DTYPES`.
            compile: Whether losses are computed by ``torch.compile``, which needs a C++ compiler and half a minute for
                each new number of rows; states are then computed anew.
            cache_bytes: Bound on the memory of remembered losses; 0 computes every loss anew and does not use the
                bundle's tables either.
            state_bytes: Bound on the memory of states that no mask can change, see
                :class:`dsa_gym.frozen_states.FrozenStates`; 0 computes them anew.
            inputs: Use only these inputs of the split, int64.

        Raises:
            ValueError: If an argument is out of range.
        """
        if l0_penalty is None:
            l0_penalty = 0.0 if reward_metric else bundle.l0_penalty
        if not np.isfinite(l0_penalty) or l0_penalty < 0:
            raise ValueError(f"l0_penalty={l0_penalty}: expected a finite number >= 0, per active parameter")
        check_metric(reward_metric, bundle.domain)
        self.reward_metric = reward_metric
        for name, size in (("cache_bytes", cache_bytes), ("state_bytes", state_bytes)):
            if size < 0:
                raise ValueError(f"{name}={size}: expected a number of bytes >= 0")
        self.bundle, self.split, self.l0_penalty = bundle, split, float(l0_penalty)
        self.space = MaskSpace(bundle.shape, granularity or bundle.manifest["granularity"])
        self.device = _device(device)
        self.dtype = check_dtype(dtype)
        self.compile, self.cache_bytes, self.state_bytes = compile, cache_bytes, state_bytes
        self.requests = self.hits = 0
        chosen = slice(None) if inputs is None else inputs
        self.rows = bundle.rows(split)[chosen]
        self.user = bundle.user[self.rows]
        self.table, self.even_table = (self._measured(even, inputs) for even in (False, True))
        self._best: dict[int, NDArray[np.float64]] = {}
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self.sizes = self.space.sizes.numpy().astype(np.float64)

    def __len__(self) -> int:
        """Number of inputs n."""
        return len(self.rows)

    @property
    def _trained_granularity(self) -> bool:
        return self.space.granularity == self.bundle.space.granularity

    def _measured(self, even: bool, inputs: Tensor | None) -> NDArray[Any] | None:
        exact = self.dtype == torch.float32 and self.reward_metric is None
        served = self.cache_bytes and self._trained_granularity and exact
        table = self.bundle.table(self.split, even=even) if served else None
        return table if table is None or inputs is None else table[inputs.numpy()]

    @property
    def gates(self) -> int:
        """Number of gates G."""
        return self.space.gates

    @cached_property
    def observations(self) -> dict[str, NDArray[np.float32]]:
        """``user`` (n, user_dim) and ``context`` (n, context_dim) of every input."""
        observed = self.bundle.observations
        return {"user": observed["user"][self.user].numpy(), "context": observed["context"][self.rows].numpy()}

    @cached_property
    def model(self) -> AdaptedModel:
        """The adapted model, loaded on first use."""
        if self.device.type == "cpu":
            keep_freed_memory()
        return self.bundle.model(device=self.device, dtype=self.dtype)

    @cached_property
    def _states(self) -> FrozenStates:
        return FrozenStates(self.model, len(self), self.state_bytes)

    @cached_property
    def _compiled(self) -> Any:
        model = self.model

        def losses(examples: Examples, phi: Tensor, mask: Tensor | None, users: Tensor | None) -> Tensor:
            return model.losses(examples, phi, mask, users=users)

        return torch.compile(losses)

    @cached_property
    def _phi(self) -> Tensor:
        return self.bundle.phi.to(self.device)

    def parameters(self, users: Tensor) -> tuple[Tensor, Tensor | None]:
        """What :meth:`Bundle.parameters` gives for users (n,), on the device."""
        phi, rows = self.bundle.parameters(users)
        return (phi.to(self.device), None) if rows is None else (self._phi, rows.to(self.device))

    def active_parameters(self, gates: Bits) -> NDArray[np.int64]:
        """``||m||_0`` of gates (rows, G), int64 (rows,)."""
        return (gates @ self.sizes).astype(np.int64)

    def rewards(self, inputs: NDArray[np.int64], gates: Bits) -> NDArray[np.float64]:
        """``-loss - l0_penalty * active_parameters`` of inputs (rows,) under gates (rows, G)."""
        return -self.losses(inputs, gates).astype(np.float64) - self.l0_penalty * self.active_parameters(gates)

    @property
    def optimum_known(self) -> bool:
        """Whether :meth:`best_rewards` can tell: the losses under all masks are measured."""
        return self.table is not None

    def best_rewards(self, inputs: NDArray[np.int64], *, budget: int | None = None) -> NDArray[np.float64]:
        """Reward of the best mask of each input (rows,), of those with at most ``budget`` active parameters.

        Raises:
            ValueError: If the losses under all masks are not known.
        """
        budget = self.bundle.shape.size if budget is None else budget
        if budget not in self._best:
            affordable = self.active_parameters(all_gates(self.space).numpy()) <= budget
            self._best[budget] = self.measured_rewards()[:, affordable].max(1)
        return self._best[budget][inputs]

    def measured_rewards(self) -> NDArray[np.float64]:
        """Reward of every input under every mask (n, 2^G), gate i being bit i of the column.

        Raises:
            ValueError: If the losses under all masks are not known.
        """
        if self.table is None:
            raise ValueError("table: the losses under all masks are not measured, the optimum is not known")
        price = self.l0_penalty * self.active_parameters(all_gates(self.space).numpy())
        return np.asarray(-np.asarray(self.table, dtype=np.float64) - price)

    def losses(self, inputs: NDArray[np.int64], gates: Bits) -> NDArray[np.float32]:
        """Loss of inputs (rows,), indices into the split, under binary gates (rows, G).

        Served from the bundle's table or the bounded cache where possible; equal requests are computed once.

        Raises:
            ValueError: If there is not one mask of G gates for each input.
        """
        if gates.shape != (len(inputs), self.gates):
            raise ValueError(f"gates: shape {gates.shape}, expected {(len(inputs), self.gates)}")
        if self.table is not None:
            return np.asarray(self.table[inputs, mask_codes(gates)], dtype=np.float32)
        if not self.cache_bytes:
            return self.compute_losses(inputs, gates)
        return self._cached_losses(inputs, gates)

    def compute_losses(
        self, inputs: NDArray[np.int64], gates: Bits | None, *, batch_size: int = 256
    ) -> NDArray[np.float32]:
        """The same through the model, whatever is known already; without gates, of the bare backbone."""
        pieces = []
        with torch.inference_mode():
            for start in range(0, len(inputs), batch_size):
                index = torch.from_numpy(inputs[start : start + batch_size])
                rows, users = self.rows[index], self.user[index]
                examples = to_device(take(self.bundle.examples, rows), self.device)
                if gates is None:
                    losses = self._loss(index, examples, None, None, None)
                else:
                    if bool((users == users[0]).all()):
                        users = users[:1]
                    bits = torch.from_numpy(gates[start : start + batch_size]).to(self.device, torch.float32)
                    phi, own = self.parameters(users)
                    losses = self._loss(index, examples, phi, self.space.expand(bits), own)
                pieces.append(losses.float().cpu())
        return torch.cat(pieces).numpy()

    def _loss(
        self, inputs: Tensor, examples: Examples, phi: Tensor | None, mask: Tensor | None, users: Tensor | None
    ) -> Tensor:
        """Losses of inputs, with the means that were asked for."""
        if self.reward_metric is not None:
            return -self.model.metric(self.reward_metric, examples, phi, mask, users)
        if phi is not None and self.compile:
            losses: Tensor = self._compiled(examples, phi, mask, users)
            return losses
        if phi is not None and self.state_bytes:
            return self._states.losses(inputs, examples, phi, mask, users)
        return self.model.losses(examples, phi, mask, users=users)

    def outcome(self, index: int, gates: Bits) -> dict[str, Any]:
        """What the adapted model makes of one input under gates (G,), as parts to look at."""
        row = self.rows[index : index + 1]
        examples = to_device(take(self.bundle.examples, row), self.device)
        mask = self.space.expand(torch.from_numpy(gates[None]).to(self.device, torch.float32))
        phi, own = self.parameters(self.user[index : index + 1])
        return self.model.outcome(examples, phi if own is None else phi[own], mask)

    def relaxed_losses(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """Losses (rows,), differentiable with respect to gates (rows, G) in [0, 1].

        Raises:
            ValueError: If the reward is a metric that no gradient reaches.
        """
        if self.reward_metric is not None:
            raise ValueError(
                f"reward_metric={self.reward_metric!r}: no gradient reaches it; use an agent that needs none"
            )
        rows, users = self.rows[inputs], self.user[inputs]
        examples = to_device(take(self.bundle.examples, rows), self.device)
        mask = self.space.expand(gates.to(self.device))
        phi, own = self.parameters(users)
        losses = self.model.losses(examples, phi, mask, users=own)
        return losses.to(gates.device)

    @property
    def gate_features(self) -> NDArray[np.float32]:
        """What is known of each gate (G, F), see :attr:`dsa_gym.masks.MaskSpace.features`."""
        return self.space.features.numpy()

    def gate_magnitudes(self) -> NDArray[np.float32]:
        """Root mean square of the library's parameters that each gate switches, (G,)."""
        return self.space.gate_means(self.bundle.phi_meta.square()).sqrt().numpy()

    def forget(self) -> None:
        """Drop all that was remembered of computed losses and states, as if the problem were new.

        What a batch's neighbours are may change the last digit of a loss. A run that goes on from a file has nothing
        remembered, so one that is to equal it forgets when it saves.
        """
        self._cache.clear()
        self.__dict__.pop("_states", None)

    @property
    def hit_rate(self) -> float:
        """Share of the requests that the cache could answer; 0 before the first."""
        return self.hits / max(1, self.requests)

    def _cached_losses(self, inputs: NDArray[np.int64], gates: Bits) -> NDArray[np.float32]:
        packed = np.packbits(gates, axis=1)
        keys = [int(i).to_bytes(4, "little") + bits.tobytes() for i, bits in zip(inputs, packed, strict=True)]
        missing = {key: row for row, key in enumerate(keys) if key not in self._cache}
        known = {key: self._cache[key] for key in keys if key not in missing}
        self.requests += len(keys)
        self.hits += len(keys) - len(missing)
        if missing:
            rows = np.fromiter(missing.values(), np.int64)
            computed = self.compute_losses(inputs[rows], gates[rows]).tolist()
            known |= dict(zip(missing, computed, strict=True))
            self._remember(missing, computed, entry=sys.getsizeof(keys[0]) + _ENTRY_BYTES)
        return np.fromiter((known[key] for key in keys), np.float32, len(keys))

    def _remember(self, keys: dict[bytes, int], losses: list[float], *, entry: int) -> None:
        """Add losses and forget the oldest beyond the bound."""
        self._cache.update(zip(keys, losses, strict=True))
        for _ in range(max(0, len(self._cache) - self.cache_bytes // entry)):
            self._cache.popitem(last=False)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What results depend on beside gates and prices: the bundle's files, and the data that they were made from."""
        return {"files": self.bundle.manifest["files"], "data": self.bundle.manifest["data"]}

    @property
    def unit(self) -> str:
        """Unit of the loss: the domain's, or the name of the reward metric."""
        return self.reward_metric or domain_class(self.bundle.domain).unit

    def reference_gates(self) -> Bits:
        """Decisions of the bundle's reference gate for every input, (n, G).

        Raises:
            ValueError: If this granularity is coarser than the one that the library was trained under.
        """
        trained = self.bundle.space.granularity
        if GRANULARITIES.index(self.space.granularity) < GRANULARITIES.index(trained):
            raise ValueError(
                f"granularity={self.space.granularity!r}: coarser than {trained!r}, under which the bundle's reference "
                "gate was trained; its decisions cannot be expressed"
            )
        gate = self.bundle.reference_gate()
        with torch.inference_mode():
            logits = gate(*(torch.from_numpy(self.observations[name]) for name in ("user", "context")))
            gates = self.bundle.space.refine(gate.decide(logits), self.space)
        return gates.to(torch.uint8).numpy()

    @property
    def written(self) -> bool:
        """Whether the reward is of what the model writes, token by token, so that few masks can be scored."""
        return self.reward_metric is not None and self.reward_metric in domain_class(self.bundle.domain).written_metrics

    def support(self) -> GatingProblem:
        """The problem over the support inputs of this split's users."""
        rows = self.bundle.rows("support")
        chosen = torch.isin(self.bundle.user[rows], self.user.unique()).nonzero().flatten()
        return GatingProblem(
            self.bundle,
            "support",
            granularity=self.space.granularity,
            l0_penalty=self.l0_penalty,
            reward_metric=self.reward_metric,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            compile=self.compile,
            cache_bytes=self.cache_bytes,
            state_bytes=self.state_bytes,
            inputs=chosen,
        )


_ENTRY_BYTES = 120
"""About what one entry of the cache costs beside its key: the float and the ordered dictionary's slot."""


def check_metric(name: str | None, domain: str) -> None:
    """Refuse a reward metric that a domain does not have.

    Raises:
        ValueError: Naming those it has.
    """
    known = domain_class(domain).metrics
    if name is not None and name not in known:
        raise ValueError(f"reward_metric={name!r}: expected None or, for {domain!r}, one of {', '.join(known)}")


def check_dtype(name: str) -> torch.dtype:
    """The floating-point type of that name.

    Raises:
        ValueError: Naming those there are.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: expected one of {', '.join(DTYPES)}")
    kind: torch.dtype = getattr(torch, name)
    return kind


def mask_codes(gates: Bits) -> NDArray[np.int64]:
    """Column of a table for each row of gates (rows, G): gate i is bit i."""
    return gates.astype(np.int64) @ (1 << np.arange(gates.shape[1], dtype=np.int64))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:0'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: no CUDA device is available; use 'auto' or 'cpu'")
    return device
