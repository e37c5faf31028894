"""Planted gating problems: generated instances whose best mask and expected loss are known exactly.

The gates come in channels of equal size. A user is of one of a few kinds and writes in some registers; kind and
register of an input decide which one gate of each channel it needs:

    need(u, x, c) = (kind_u[c] + register_x[c]) mod s

with s the size of a channel. With a_c the weight of channel c (they sum to 1), rho the interference and m the mask,

    loss(m; u, x) = sum_c a_c ((1 - m_need) + rho m_need sum_{j in c, j != need} m_j / (s - 1))

So a gate that is not needed does harm only where it is on together with the one that is, and the best mask is known:
the needed gates whose weight is worth the price of a gate, nothing else. With rho = 0 everything on is as good, so a
static mask is enough; with rho = 1 everything on is as bad as nothing on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsa_gym.observations import LIMIT
from dsa_gym.population import SPLITS

Bits = NDArray[np.uint8]

OBSERVED = 16
"""Size of the user embedding and of the context."""


@dataclass(frozen=True)
class PlantedConfig:
    """An instance.

    Attributes:
        users: Users of a split.
        inputs: Inputs of each user.
        gates: Gates G, at most 4096.
        active: Share of gates that an input needs; 1 / ``active`` is the size of a channel.
        interference: rho, harm that the other gates of a channel do to the needed one, in [0, 1].
        kinds: Kinds of users.
        registers: Registers that a user writes in.
        all_registers: Registers there are.
        noise: Standard deviation of the noise on embedding and context, whose signal has variance 1.
        seed: Seeds what is needed, weights, users and noise.
    """

    users: int = 200
    inputs: int = 12
    gates: int = 8
    active: float = 0.25
    interference: float = 1.0
    kinds: int = 4
    registers: int = 2
    all_registers: int = 4
    noise: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        for name in ("users", "inputs", "gates", "kinds", "registers", "all_registers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive integer")
        if self.gates > 4096:
            raise ValueError(f"gates={self.gates}: expected at most 4096")
        if (
            not 0 < self.active <= 1
            or self.gates % self.channel_size
            or abs(self.active * self.channel_size - 1) > 1e-6
        ):
            raise ValueError(
                f"active={self.active}: expected 1 / s for a whole number s of gates in a channel that divides "
                f"gates={self.gates}"
            )
        if not 0 <= self.interference <= 1:
            raise ValueError(f"interference={self.interference}: expected a share in [0, 1]")
        if self.registers > self.all_registers:
            raise ValueError(f"registers={self.registers}: expected at most all_registers={self.all_registers}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise={self.noise}: expected a standard deviation >= 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r}: expected an integer from 0 to 2^32 - 1")

    @property
    def channel_size(self) -> int:
        """Gates of a channel, s."""
        return max(1, round(1 / self.active)) if self.active > 0 else 1


class PlantedProblem:
    """Inputs of one split of an instance; offers what :class:`dsa_gym.problem.GatingProblem` does, and the optimum.

    Every gate switches one parameter.

    Attributes:
        config: The instance.
        split: Its users: each split has its own, but ``seen`` has other inputs of those of ``train``.
        l0_penalty: lambda, price of a gate that is on.
        user: User of each input, int64 (n,).
        need: The gate of each channel that each input needs, int64 (n, channels).
        weight: a_c, float64 (channels,).
        table: None: losses are computed, not looked up.
    """

    table = None
    even_table = None
    optimum_known = True
    unit = "expected loss"

    def __init__(self, config: PlantedConfig, split: str = "train", *, l0_penalty: float = 0.0) -> None:
        """Draw the users and inputs of a split.

        Raises:
            ValueError: If an argument is out of range.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        if not 0 <= l0_penalty < float("inf"):
            raise ValueError(f"l0_penalty={l0_penalty!r}: expected a finite number >= 0, per active parameter")
        self._draw(config, split, part=SPLITS.index(split))
        self.l0_penalty = float(l0_penalty)

    def _draw(self, config: PlantedConfig, split: str, part: int) -> None:
        self.config, self.split, size = config, split, config.channel_size
        channels = config.gates // size
        rule = np.random.default_rng((config.seed, 0))
        of_kind = rule.integers(0, size, (config.kinds, channels))
        of_register = rule.integers(0, size, (config.all_registers, channels))
        self.weight = rule.dirichlet(np.full(channels, 4.0))
        signals = [rule.standard_normal((count, OBSERVED)) for count in (config.kinds, config.all_registers)]
        group = "train" if split == "seen" else split
        people = np.random.default_rng((config.seed, 1, SPLITS.index(group)))
        kind = people.integers(0, config.kinds, config.users)
        own = people.permuted(np.tile(np.arange(config.all_registers), (config.users, 1)), axis=1)[
            :, : config.registers
        ]
        embedding = signals[0][kind] + config.noise * people.standard_normal((config.users, OBSERVED))
        inputs = np.random.default_rng((config.seed, 2, part))
        users = np.repeat(np.arange(config.users), config.inputs)
        register = own[users, inputs.integers(0, config.registers, len(users))]
        context = signals[1][register] + config.noise * inputs.standard_normal((len(users), OBSERVED))
        self._user = users
        self.need = (of_kind[kind[users]] + of_register[register]) % size
        self.observations: dict[str, NDArray[np.float32]] = {
            "user": np.clip(embedding, -LIMIT, LIMIT).astype(np.float32)[users],
            "context": np.clip(context, -LIMIT, LIMIT).astype(np.float32),
        }

    def __len__(self) -> int:
        """Number of inputs n."""
        return len(self._user)

    @cached_property
    def user(self) -> Tensor:
        """User of each input, int64 (n,)."""
        return torch.from_numpy(self._user)

    @property
    def gates(self) -> int:
        """Number of gates G."""
        return self.config.gates

    @property
    def space(self) -> PlantedProblem:
        """Itself: it has ``gates`` and ``granularity``."""
        return self

    granularity = "pathway"

    def losses(self, inputs: NDArray[np.int64], gates: Bits) -> NDArray[np.float32]:
        """Expected loss of inputs (rows,) under gates (rows, G).

        Raises:
            ValueError: If there is not one mask of G gates for each input.
        """
        if gates.shape != (len(inputs), self.gates):
            raise ValueError(f"gates: shape {gates.shape}, expected {(len(inputs), self.gates)}")
        return self._losses(torch.from_numpy(np.asarray(inputs)), torch.from_numpy(gates).float()).numpy()

    def relaxed_losses(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """The same (rows,), differentiable with respect to gates (rows, G) in [0, 1]."""
        return self._losses(inputs, gates)

    def _losses(self, inputs: Tensor, gates: Tensor) -> Tensor:
        size = self.config.channel_size
        channels = gates.unflatten(1, (-1, size))  # (rows, channels, s)
        need = torch.from_numpy(self.need)[inputs.cpu()].to(gates.device)
        on = channels.gather(2, need[..., None])[..., 0]  # (rows, channels)
        others = (channels.sum(2) - on) / max(1, size - 1)
        weight = torch.from_numpy(self.weight).to(gates)
        losses: Tensor = ((1 - on) + self.config.interference * on * others) @ weight
        return losses

    def active_parameters(self, gates: Bits) -> NDArray[np.int64]:
        """Gates that are on, int64 (rows,)."""
        return np.asarray(gates.sum(1, dtype=np.int64))

    def rewards(self, inputs: NDArray[np.int64], gates: Bits) -> NDArray[np.float64]:
        """``-loss - l0_penalty * active_parameters`` of inputs (rows,) under gates (rows, G)."""
        return -self.losses(inputs, gates).astype(np.float64) - self.l0_penalty * self.active_parameters(gates)

    def optimum(self, inputs: NDArray[np.int64]) -> Bits:
        """The best mask of each input (rows, G): what it needs, as far as it is worth the price."""
        need, size = self.need[inputs], self.config.channel_size
        worth = self.weight > self.l0_penalty
        gates = np.zeros((len(inputs), self.gates), np.uint8)
        rows, channels = np.nonzero(np.broadcast_to(worth, need.shape))
        gates[rows, channels * size + need[rows, channels]] = 1
        return gates

    def best_masks(self, group: NDArray[np.int64]) -> Bits:
        """The mask with the best mean reward over the inputs of each group, exactly.

        Of k gates that are on in a channel, the best are those that most inputs of the group need. With f_j the share
        that needs gate j, they earn ``a_c (1 - rho (k - 1) / (s - 1)) sum_j f_j - lambda k``.

        Args:
            group: Group of each input (n,), from 0 without a gap.

        Returns:
            Masks (groups, G).
        """
        size, (n, channels) = self.config.channel_size, self.need.shape
        needed = np.zeros((int(group.max()) + 1, channels, size))
        np.add.at(needed, (np.repeat(group, channels), np.tile(np.arange(channels), n), self.need.ravel()), 1)
        share = needed / np.bincount(group)[:, None, None]
        order = np.argsort(-share, axis=2, kind="stable")
        served = np.take_along_axis(share, order, axis=2).cumsum(2)
        on = np.arange(1, size + 1)
        harm = self.config.interference * (on - 1) / max(1, size - 1)
        gain = self.weight[:, None] * (1 - harm) * served - self.l0_penalty * on
        count = np.concatenate([np.zeros_like(gain[..., :1]), gain], axis=2).argmax(2)  # (groups, channels)
        masks = np.zeros(share.shape, np.uint8)
        np.put_along_axis(masks, order, (on <= count[..., None]).astype(np.uint8), axis=2)
        return masks.reshape(len(masks), -1)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What results depend on beside gates and prices: the instance."""
        return {"instance": asdict(self.config)}

    @property
    def sizes(self) -> NDArray[np.float64]:
        """Parameters that each gate switches, float64 (G,): one."""
        return np.ones(self.gates)

    @property
    def gate_features(self) -> NDArray[np.float32]:
        """Random codes of each gate's channel and of its place there, (G, F): of channel c the same for every G."""
        size = self.config.channel_size
        of_channel, of_place = (
            np.random.default_rng(part).standard_normal((count, OBSERVED), np.float32)
            for part, count in enumerate((self.gates // size, size))
        )
        return np.hstack([of_channel.repeat(size, axis=0), np.tile(of_place, (self.gates // size, 1))])

    def gate_magnitudes(self) -> NDArray[np.float32]:
        """Magnitude of each gate's one parameter, (G,): all alike, it tells nothing of what the gate is worth."""
        return np.ones(self.gates, np.float32)

    def best_rewards(self, inputs: NDArray[np.int64]) -> NDArray[np.float64]:
        """Reward of the best mask of each input (rows,)."""
        return np.full(len(inputs), -np.minimum(self.weight, self.l0_penalty).sum())

    def reference_gates(self) -> Bits:
        """The optimum of every input, (n, G): nothing was trained that could be a reference."""
        return self.optimum(np.arange(len(self)))

    def support(self) -> PlantedProblem:
        """Other inputs of the same users."""
        other = object.__new__(PlantedProblem)
        other._draw(self.config, self.split, part=len(SPLITS) + SPLITS.index(self.split))
        other.l0_penalty = self.l0_penalty
        return other
