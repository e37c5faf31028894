"""Bernoulli gates under action masks, for sb3-contrib's MaskablePPO.

sb3-contrib makes a Python list of categorical distributions of ``MultiBinary(n)``, one for each gate, and has 2n
outputs for them. Here it is one layer of n logits and a few operations on whole tensors, whatever n is:

    model = MaskablePPO(MaskedBernoulliPolicy, env, rollout_buffer_class=MaskedDictRolloutBuffer)

Action masks are n long (whether a gate may be on) or 2n long, sb3-contrib's pairs of (may be off, may be on) for each
gate. Its own rollout buffer takes the latter only; the buffers here take both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.distributions import MaskableDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor
from torch import Tensor, nn

from dsa_gym.agents.policy_gradient import bernoulli_entropy

Masks = NDArray[Any] | Tensor | None


class MaskedBernoulliDistribution(MaskableDistribution):
    """Independent Bernoulli gates, of which some may not be on, or not be off.

    A gate that may not be on is off with probability 1, one that may not be off is on with probability 1; neither adds
    to log-probability, entropy or gradient. A mask of gates that breaks this has log-probability ``-inf``.

    Attributes:
        gates: Number of gates n.
        logits: Logit of each gate (rows, n): minus or plus infinity where it has no choice.
    """

    def __init__(self, gates: int) -> None:
        """Make a distribution of ``gates`` gates."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.gates = gates

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        """The layer that gives the logits: one for each gate."""
        return nn.Linear(latent_dim, self.gates)

    def proba_distribution(self, action_logits: Tensor) -> MaskedBernoulliDistribution:
        """Take logits (rows, n); all gates are free."""
        self._given = self.logits = action_logits.view(-1, self.gates)
        self._forced: Tensor | None = None
        return self

    def apply_masking(self, masks: Masks) -> None:
        """Restrict gates; None frees all.

        Args:
            masks: Whether each gate may be on (rows, n), or pairs of whether it may be off and may be on (rows, 2n).

        Raises:
            ValueError: If the masks have another shape, or a gate may be neither off nor on.
        """
        self.logits, self._forced = self._given, None
        if masks is None:
            return
        allowed = torch.as_tensor(masks, device=self._given.device).bool()
        width = allowed.shape[-1] if allowed.ndim else 0
        if width not in (self.gates, 2 * self.gates) or allowed.numel() not in (width, width * len(self._given)):
            raise ValueError(
                f"action_masks: shape {tuple(allowed.shape)}, expected {self.gates} or {2 * self.gates} for each of "
                f"{len(self._given)} rows"
            )
        allowed = allowed.reshape(-1, width).expand(len(self._given), width)
        if width == self.gates:
            self._forced = ~allowed
            self.logits = self._given.masked_fill(self._forced, -torch.inf)
            return
        off, on = allowed.view(-1, self.gates, 2).unbind(-1)  # each (rows, n)
        if not bool((off | on).all()):
            raise ValueError("action_masks: a gate may be neither off nor on; allow one of them")
        self._forced = ~(off & on)
        self.logits = self._given.masked_fill(~on, -torch.inf).masked_fill(~off, torch.inf)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability (rows,) of gates (rows, n): the sum of ``log sigmoid(theta)`` or ``log sigmoid(-theta)``."""
        on = actions.view(-1, self.gates).bool()
        return nn.functional.logsigmoid(torch.where(on, self.logits, -self.logits)).sum(1)

    def entropy(self) -> Tensor:
        """Entropy (rows,) in nats: the sum over gates that are free."""
        each = bernoulli_entropy(self._given)
        return (each if self._forced is None else each.masked_fill(self._forced, 0.0)).sum(1)

    def sample(self) -> Tensor:
        """Gates (rows, n)."""
        return torch.bernoulli(torch.sigmoid(self.logits))

    def mode(self) -> Tensor:
        """The likeliest gates (rows, n); off where both are as likely."""
        return (self.logits > 0).to(self.logits.dtype)

    def actions_from_params(self, action_logits: Tensor, deterministic: bool = False) -> Tensor:
        """Gates (rows, n) of logits, all of them free."""
        return self.proba_distribution(action_logits).get_actions(deterministic=deterministic)

    def log_prob_from_params(self, action_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Gates (rows, n) drawn of logits, all of them free, and their log-probability (rows,)."""
        actions = self.actions_from_params(action_logits)
        return actions, self.log_prob(actions)


class MaskedBernoulliPolicy(MaskableActorCriticPolicy):
    """Actor-critic policy over :class:`MaskedBernoulliDistribution`, for vectors and dictionaries of them."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], *args: Any, **kwargs: Any
    ):
        """Build it; the arguments are those of sb3-contrib's policies.

        Raises:
            ValueError: If the actions are not ``MultiBinary(n)``.
        """
        if not isinstance(action_space, spaces.MultiBinary) or len(action_space.shape) != 1:
            raise ValueError(f"action_space={action_space}: expected MultiBinary(n)")
        if isinstance(observation_space, spaces.Dict):
            kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(observation_space, action_space, *args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = MaskedBernoulliDistribution(int(self.action_space.shape[0]))  # type: ignore[index]
        super()._build(lr_schedule)


class _AnyWidth:
    """Makes room for masks of the width of the first that it is given."""

    action_masks: NDArray[Any]
    mask_dims: int
    pos: int

    def add(self, *args: Any, action_masks: NDArray[Any] | None = None, **kwargs: Any) -> None:
        """Add a step of all environments, with their masks (environments, n) or (environments, 2n)."""
        if action_masks is not None and self.pos == 0:
            self.mask_dims = np.shape(action_masks)[-1]
            self.action_masks = np.ones((*self.action_masks.shape[:2], self.mask_dims), np.float32)
        super().add(*args, action_masks=action_masks, **kwargs)  # type: ignore[misc]


class MaskedRolloutBuffer(_AnyWidth, MaskableRolloutBuffer):
    """Rollout buffer for n-long and 2n-long masks."""


class MaskedDictRolloutBuffer(_AnyWidth, MaskableDictRolloutBuffer):
    """The same for dictionaries of observations."""
