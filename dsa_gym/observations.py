"""What a gate sees: compact, whitened views of the user and of the input.

Raw hidden states invite memorising the training users; a few whitened principal components, fitted on training users
only, generalise (docs/design.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 5.0
"""Observations are clipped to ``[-LIMIT, LIMIT]`` standard deviations."""


@dataclass(frozen=True)
class Projection:
    """Whitened principal components: ``clip((x - mean) @ directions, -LIMIT, LIMIT)``.

    Attributes:
        mean: (F,).
        directions: (F, D), each column divided by the standard deviation along it. Columns beyond the rank of what it
            was fitted on are zero.
    """

    mean: Tensor
    directions: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Project features (rows, F) to observations (rows, D), float32."""
        return ((features.float() - self.mean) @ self.directions).clamp(-LIMIT, LIMIT)


def fit_projection(features: Tensor, dim: int) -> Projection:
    """Fit whitened principal components.

    Args:
        features: Samples (N, F), float.
        dim: Components D to keep.

    Raises:
        ValueError: If there are fewer than two samples, ``dim`` is not positive, or a feature is not finite.
    """
    if features.shape[0] < 2 or dim < 1:
        raise ValueError(f"dim={dim} of {features.shape[0]} samples: expected dim >= 1 and two samples or more")
    if not torch.isfinite(features).all():
        broken = (~torch.isfinite(features)).any(1).nonzero().flatten().tolist()
        raise ValueError(f"features: samples {broken[:5]} are not finite")
    features = features.double()
    mean = features.mean(0)
    _, singular, directions = torch.linalg.svd(features - mean, full_matrices=False)
    deviation = singular / (features.shape[0] - 1) ** 0.5
    usable = min(dim, int((deviation > 1e-6 * deviation[0].clamp_min(1e-12)).sum()))
    whitened = torch.zeros(features.shape[1], dim, dtype=torch.float64)
    whitened[:, :usable] = directions[:usable].T / deviation[:usable]
    # the sign of a principal component is arbitrary: fix it, so that a re-fit gives the same observations
    strongest = whitened.abs().argmax(0)
    whitened *= torch.where(whitened.gather(0, strongest[None]) < 0, -1.0, 1.0)
    return Projection(mean.float(), whitened.float())
