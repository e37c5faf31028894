"""What a policy does, in numbers: pure functions of its masks and probabilities.

Masks are (n, G) uint8, the decisions on n inputs; probabilities (n, G) in [0, 1] say how likely each gate is on, and
for a deterministic policy they are the decisions themselves. Entropies, divergences and information are in nats.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, kl_div

from dsa_gym.problem import Bits

Floats = NDArray[np.float64]


def bernoulli_entropy(p: Floats) -> Floats:
    """Entropy of Bernoulli gates, elementwise, for p in [0, 1]."""
    entropy: Floats = entr(p) + entr(1 - p)
    return entropy


def bernoulli_kl(p: Floats, q: Floats) -> Floats:
    """``KL(p || q)`` of Bernoulli gates, elementwise, for p and q in [0, 1]."""
    divergence: Floats = kl_div(p, q) + kl_div(1 - p, 1 - q)
    return divergence


class Information(NamedTuple):
    """What each gate tells of user and input, (G,) each; they sum to all that it tells of the input."""

    user: Floats
    input: Floats


def information(probabilities: Floats, users: NDArray[np.int64], *, seed: int = 0) -> Information:
    """Mutual information of each gate with the user, and with the input beyond the user.

    With inputs x drawn uniformly from those given, each of one user u, and gates m_g ~ Bernoulli(p_g(x)),

        I(m_g; x) = h(mean_x p_g(x)) - mean_x h(p_g(x)) = I(m_g; u) + I(m_g; x | u)
        I(m_g; u) = h(mean_x p_g(x)) - mean_u h(mean_{x of u} p_g(x))

    with h the entropy of a Bernoulli variable. The policy's own probabilities are used, so nothing has to be estimated
    from drawn masks. But a mean over a user's few inputs differs between users by chance, which makes the plug-in
    I(m_g; u) positive even for a policy that does not know the user. So it is adjusted as Vinh et al. (2010) adjust
    clusterings: with I_0 its mean over shuffles of the users among the inputs,

        user = I(m_g; x) (I(m_g; u) - I_0) / (I(m_g; x) - I_0),    input = I(m_g; x) - user

    ``user`` is 0 in expectation (slightly negative at times) if users do not matter and exactly I(m_g; x) if nothing
    but the user does. It is 0 also where nobody can tell: with one user, or one input for each.

    Args:
        probabilities: (n, G).
        users: User of each input (n,).
        seed: Seeds the shuffles: 32 of them, fewer of large arrays, where each tells more.
    """
    _, group, sizes = np.unique(users, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    share = (sizes / len(users))[:, None]
    marginal = bernoulli_entropy(probabilities.mean(0))

    def with_user(ordered: Floats) -> Floats:
        means = np.add.reduceat(ordered, starts, axis=0) / sizes[:, None]  # (users, G)
        return np.asarray(marginal - (share * bernoulli_entropy(np.clip(means, 0, 1))).sum(0))

    total = np.maximum(marginal - bernoulli_entropy(probabilities).mean(0), 0.0)
    generator = np.random.default_rng(seed)
    shuffles = min(32, max(2, 2**21 // probabilities.size))
    chance = np.mean([with_user(generator.permutation(probabilities)) for _ in range(shuffles)], axis=0)
    told, possible = with_user(probabilities[order]) - chance, total - chance
    meaningful = possible > 1e-9  # nats: below that it is rounding
    user = np.where(meaningful, total * told / np.where(meaningful, possible, 1.0), 0.0)
    return Information(user, total - user)


class Agreement(NamedTuple):
    """How a policy's masks agree with the best ones, gate by gate (G,); NaN where a share is of nothing.

    Attributes:
        precision: Of the inputs on which it is on, the share on which it should be.
        recall: Of the inputs on which it should be on, the share on which it is.
    """

    precision: Floats
    recall: Floats


def agreement(masks: Bits, best: Bits) -> Agreement:
    """Compare masks with the best masks of the same inputs, both (n, G)."""
    both = (masks & best).sum(0).astype(np.float64)
    on, wanted = masks.sum(0, dtype=np.int64), best.sum(0, dtype=np.int64)
    return Agreement(
        *(np.divide(both, count, out=np.full(len(both), np.nan), where=count > 0) for count in (on, wanted))
    )


def overall_agreement(masks: Bits, best: Bits) -> tuple[float, float]:
    """Precision and recall over all gates at once; NaN where nothing is on, or nothing should be."""
    pooled = agreement(masks.reshape(-1, 1), best.reshape(-1, 1))
    return float(pooled.precision[0]), float(pooled.recall[0])


class Diversity(NamedTuple):
    """How different a policy's masks are.

    Attributes:
        distinct: Number of distinct masks.
        entropy: Entropy of the distribution over them.
        hamming: Mean number of gates in which the masks of two different inputs differ.
    """

    distinct: int
    entropy: float
    hamming: float


def diversity(masks: Bits) -> Diversity:
    """Diversity of masks (n, G)."""
    n = len(masks)
    counts = np.unique(np.packbits(masks, axis=1), axis=0, return_counts=True)[1]
    on = masks.sum(0, dtype=np.int64)
    pairs = n * (n - 1) / 2
    hamming = float((on * (n - on)).sum() / pairs) if pairs else 0.0
    return Diversity(len(counts), float(entr(counts / n).sum()), hamming)


class UserMasks(NamedTuple):
    """A policy user by user.

    Attributes:
        user: The users, ascending, int64 (users,).
        first: Index of the first input of each, int64 (users,).
        rate: How often each gate is on for each, (users, G).
        frequent: The mask that each gets most often, uint8 (users, G).
    """

    user: NDArray[np.int64]
    first: NDArray[np.int64]
    rate: Floats
    frequent: Bits


def by_user(masks: Bits, users: NDArray[np.int64]) -> UserMasks:
    """Summarise masks (n, G) of inputs whose users are (n,)."""
    names, first = np.unique(users, return_index=True)
    own = [masks[users == name] for name in names]
    return UserMasks(names, first, np.stack([each.mean(0) for each in own]), np.stack([*map(_most_frequent, own)]))


def _most_frequent(masks: Bits) -> Bits:
    """The most frequent of masks (rows, G), the first of those that are equally so."""
    return np.frombuffer(Counter(map(bytes, masks)).most_common(1)[0][0], dtype=np.uint8)
