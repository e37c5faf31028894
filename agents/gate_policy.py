"""Networks from an observation to the logits of G independent gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

POLICIES = ("mlp", "structured")


def make_policy(
    kind: str, observed: int, gates: int, hidden: Sequence[int], features: Callable[[], NDArray[np.float32]]
) -> nn.Module:
    """A policy whose gates all start at one half.

    Args:
        kind: ``"mlp"``, a perceptron with an output for each gate, or ``"structured"``, see :class:`StructuredPolicy`.
        observed: Size of the observation.
        gates: Number of gates G.
        hidden: Widths of the hidden layers.
        features: Gives the features of the gates (G, F) if they are needed.

    Raises:
        ValueError: If the kind is unknown, or a structured policy has no hidden layer.
    """
    if kind not in POLICIES:
        raise ValueError(f"policy={kind!r}: expected one of {', '.join(POLICIES)}")
    if kind == "mlp":
        return perceptron([observed, *hidden, gates], last=0.01)
    if not hidden:
        raise ValueError("hidden=[]: a structured policy needs a hidden layer")
    return StructuredPolicy(observed, features(), hidden)


def perceptron(sizes: Sequence[int], *, last: float = 1.0) -> nn.Sequential:
    """Linear layers with tanh in between; the last one's weights are orthogonal with gain ``last``, its bias is 0."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    out = layers[-2]
    assert isinstance(out, nn.Linear)
    nn.init.orthogonal_(out.weight, last)
    nn.init.zeros_(out.bias)
    return nn.Sequential(*layers[:-1])


class StructuredPolicy(nn.Module):
    """Gates scored against the state: ``logit_i = e(features_i) . f(state) / sqrt(d) + b . features_i``.

    What is known of a gate (its layer, its kind of site, its pathway, its size) is encoded by e, user and context by f.
    No parameter belongs to a single gate or user, so that one policy serves every number of gates whose features are
    described alike: its ``state_dict`` loads into a policy over the gates of another granularity.
    """

    features: Tensor

    def __init__(self, observed: int, features: NDArray[np.float32], hidden: Sequence[int]) -> None:
        """Build the network.

        Args:
            observed: Size of the observation.
            features: Of each gate, (G, F).
            hidden: Widths of the hidden layers of both encoders; d is the last of them.
        """
        super().__init__()
        # not saved: another granularity has others
        self.register_buffer("features", torch.from_numpy(np.asarray(features, np.float32)), persistent=False)
        described = self.features.shape[1]
        self.state = perceptron([observed, *hidden, hidden[-1]], last=0.01)  # every gate starts at one half
        self.gate = nn.Sequential(*perceptron([described, *hidden, hidden[-1]]), nn.LayerNorm(hidden[-1], bias=False))
        for layer in self.gate:  # gates that are described differently get codes that differ, of equal length
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.bias = nn.Linear(described, 1)
        nn.init.zeros_(self.bias.weight)
        nn.init.zeros_(self.bias.bias)

    def forward(self, observed: Tensor) -> Tensor:
        """Logits (rows, G) of observations (rows, dim)."""
        gates = self.gate(self.features)  # (G, d)
        logits: Tensor = self.state(observed) @ gates.T / gates.shape[1] ** 0.5 + self.bias(self.features)[:, 0]
        return logits
