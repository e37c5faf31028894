"""Adaptation on quadratics with a known optimum: budgets, supports, users who do not see each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_gym.adaptation import METHODS, AdaptationConfig, SupportLoss, adapt_users, keep_largest

P, USERS = 20, 3
FIXED_SUPPORT = ("magnitude", "fisher", "snip", "random")


def phi_meta() -> Tensor:
    return torch.randn(P, generator=torch.Generator().manual_seed(3))


def planted(users: int = USERS, nonzero: int = 4) -> Tensor:
    """Each user's best change (users, P): a few large entries."""
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(users, P)
    for row in target:
        where = torch.randperm(P, generator=generator)[:nonzero]
        row[where] = (torch.randint(0, 2, (nonzero,), generator=generator) * 2.0 - 1) * 0.5
    return target


def quadratic(target: Tensor) -> SupportLoss:
    """Half the squared distance of ``phi_u - phi_meta`` to each user's target; ignores the generator."""

    def loss(phi: Tensor, generator: torch.Generator) -> Tensor:
        return 0.5 * (phi - phi_meta() - target).square().sum(1)

    return loss


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 1.0])
def test_budget(method: str, share: float) -> None:
    delta = adapt_users(
        phi_meta(),
        USERS,
        quadratic(planted(nonzero=P)),
        AdaptationConfig(method, share, steps=5, learning_rate=0.05),
    )
    assert delta.shape == (USERS, P)
    assert not delta.requires_grad
    # the target has no zeros, so whatever may change does
    wanted = P if method == "dense" else round(share * P)
    assert (delta != 0).sum(1).tolist() == [wanted] * USERS


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_users_one_by_one(method: str) -> None:
    target = planted(nonzero=P) + 0.1 * torch.randn(USERS, P, generator=torch.Generator().manual_seed(1))
    config = AdaptationConfig(method, 0.2, steps=8, learning_rate=0.05)
    together = adapt_users(phi_meta(), USERS, quadratic(target), config)
    alone = [adapt_users(phi_meta(), 1, quadratic(target[u : u + 1]), config) for u in range(USERS)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("method", ["iht", "topk"])
def test_planted_support_is_recovered(method: str) -> None:
    target = planted()
    noise = 0.02 * torch.randn(USERS, P, generator=torch.Generator().manual_seed(1))
    config = AdaptationConfig(method, 4 / P, steps=150, learning_rate=0.02)
    delta = adapt_users(phi_meta(), USERS, quadratic(target + noise), config)
    assert torch.equal(delta != 0, target != 0)
    torch.testing.assert_close(delta, (target + noise) * (target != 0), atol=0.02, rtol=0)


def test_dense_reaches_the_optimum() -> None:
    target = planted(nonzero=P)
    delta = adapt_users(phi_meta(), USERS, quadratic(target), AdaptationConfig("dense", steps=300, learning_rate=0.02))
    torch.testing.assert_close(delta, target, atol=1e-2, rtol=0)


@pytest.mark.parametrize("method", FIXED_SUPPORT)
def test_fixed_support_is_chosen_first(method: str) -> None:
    """The support is that of the rule's scores at phi_meta, whatever the training does."""
    target = planted(nonzero=P) * torch.linspace(0.5, 1.5, P).roll(7)
    k = 5
    config = AdaptationConfig(method, k / P, steps=20, learning_rate=0.05, seed=4)
    delta = adapt_users(phi_meta(), USERS, quadratic(target), config)
    gradient = -target
    scores = {
        "magnitude": phi_meta().abs().expand(USERS, -1),
        "fisher": gradient.square(),
        "snip": (phi_meta() * gradient).abs(),
        "random": torch.rand(P, generator=torch.Generator().manual_seed(4)).expand(USERS, -1),
    }[method]
    for user in range(USERS):
        assert set(delta[user].nonzero().flatten().tolist()) == set(scores[user].topk(k).indices.tolist())
    # and within it every entry goes where its user wants it
    changed = delta != 0
    assert (delta[changed].sign() == target[changed].sign()).all()


def test_random_support_depends_on_the_seed() -> None:
    def support(seed: int) -> Tensor:
        config = AdaptationConfig("random", 0.3, steps=2, seed=seed)
        return adapt_users(phi_meta(), 1, quadratic(planted(1, P)), config) != 0

    assert torch.equal(support(0), support(0))
    assert not torch.equal(support(0), support(1))


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_draws(method: str) -> None:
    """The loss draws its batches from the generator that it is given."""

    def noisy(phi: Tensor, generator: torch.Generator) -> Tensor:
        target = torch.randn(USERS, P, generator=generator)
        return (phi - target).square().sum(1)

    def run(seed: int) -> Tensor:
        return adapt_users(phi_meta(), USERS, noisy, AdaptationConfig(method, 0.5, steps=4, seed=seed))

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_no_steps_no_change() -> None:
    for method in METHODS:
        config = AdaptationConfig(method, 0.5, steps=0)
        assert not adapt_users(phi_meta(), 2, quadratic(planted(2)), config).any()


@settings(max_examples=30)
@given(rows=st.integers(1, 4), k=st.integers(0, 6), seed=st.integers(0, 100))
def test_keep_largest(rows: int, k: int, seed: int) -> None:
    delta = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    kept = keep_largest(delta, k)
    for before, after in zip(delta.tolist(), kept.tolist(), strict=True):
        largest = sorted(before, key=abs, reverse=True)[:k]
        assert after == [value if value in largest else 0.0 for value in before]


@pytest.mark.parametrize("method", ["dense", "topk", "iht", "fisher", "random"])
def test_loss_that_is_not_finite_names_its_users(method: str) -> None:
    def loss(phi: Tensor, generator: torch.Generator) -> Tensor:
        return phi.sum(1) * torch.tensor([1.0, float("nan"), float("inf")])

    with pytest.raises(FloatingPointError, match=r"users \[1, 2\] is not finite: lower learning_rate"):
        adapt_users(torch.ones(P), 3, loss, AdaptationConfig(method, 0.5, steps=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lasso"}, "method='lasso': expected one of dense, topk"),
        ({"share": -0.1}, "share=-0.1"),
        ({"share": 1.1}, "share=1.1"),
        ({"share": float("nan")}, "share=nan"),
        ({"steps": -1}, "steps=-1"),
        ({"score_batches": 0}, "score_batches=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptationConfig(**settings)
