"""The gating network and its relaxations: exact counts, straight-through gradients, distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_gym.gating import GateConfig, GatingNetwork


def make(gates: int = 8, group: int = 4, **settings: object) -> GatingNetwork:
    return GatingNetwork(3, 5, gates, group, GateConfig(**settings)).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30)
@given(
    group=st.integers(1, 6),
    groups=st.integers(1, 3),
    active=st.integers(1, 6),
    rows=st.integers(1, 4),
    ties=st.booleans(),
    seed=st.integers(0, 100),
)
def test_topk_switches_exactly_active_on(
    group: int, groups: int, active: int, rows: int, ties: bool, seed: int
) -> None:
    active = min(active, group)
    network = make(group * groups, group, active=active)
    logits = torch.zeros(rows, group * groups) if ties else torch.randn(rows, group * groups, generator=seeded(seed))
    for gates in (network.decide(logits), network.sample(logits, 0.7, seeded(seed))):
        assert gates.shape == logits.shape
        assert set(gates.unique().tolist()) <= {0.0, 1.0}
        assert (gates.view(rows, groups, group).sum(-1) == active).all()


def test_topk_decides_for_the_largest_logits() -> None:
    logits = torch.tensor([[0.1, 3.0, -1.0, 2.0, 5.0, -5.0, -6.0, -7.0]])
    assert make(active=2).decide(logits).tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]


def test_binary_decides_by_sign() -> None:
    logits = torch.tensor([[0.1, -3.0, 0.0, 2.0]])
    assert make(4, 4, relaxation="binary").decide(logits).tolist() == [[1, 0, 0, 1]]


def soft_gates(network: GatingNetwork, logits: Tensor, temperature: float, seed: int) -> Tensor:
    """The relaxed gates of the same draw, from the definitions."""
    uniform = torch.rand(logits.shape, generator=seeded(seed)).clamp(1e-6, 1 - 1e-6)
    if network.config.relaxation == "binary":
        return torch.sigmoid((logits + torch.log(uniform / (1 - uniform))) / temperature)
    gumbel = -torch.log(-torch.log(uniform))
    grouped = ((logits + gumbel) / temperature).view(-1, network.gates // network.group, network.group)
    return (network.config.active * grouped.softmax(-1)).view_as(logits)


@pytest.mark.parametrize("relaxation", ["topk", "binary"])
def test_straight_through(relaxation: str) -> None:
    """The value is exactly binary, the gradient that of the relaxed gates."""
    network = make(relaxation=relaxation)
    logits = torch.randn(50, 8, generator=seeded(1)).requires_grad_()
    gates = network.sample(logits, 0.6, seeded(2))
    soft = soft_gates(network, logits, 0.6, 2)
    assert ((gates == 0) | (gates == 1)).all()
    if relaxation == "binary":
        assert torch.equal(gates, (soft > 0.5).float())
    else:
        chosen = soft.view(-1, 2, 4).topk(2, dim=-1).indices
        assert (gates.view(-1, 2, 4).gather(-1, chosen) == 1).all()
    weight = torch.randn(50, 8, generator=seeded(3))
    (straight,) = torch.autograd.grad((gates * weight).sum(), logits)
    (relaxed,) = torch.autograd.grad((soft * weight).sum(), logits)
    assert relaxed.abs().max() > 0.01
    torch.testing.assert_close(straight, relaxed, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_binary_frequency_is_the_sigmoid(temperature: float) -> None:
    """P(gate on) = sigmoid(logit) at any temperature; within five standard errors."""
    logit = torch.tensor([-2.0, -0.5, 0.0, 1.5])
    n = 20_000
    gates = make(4, 4, relaxation="binary").sample(logit.expand(n, -1), temperature, seeded())
    p = torch.sigmoid(logit)
    assert ((gates.mean(0) - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_first_choice_frequency_is_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    n = 20_000
    gates = make(4, 4, active=1).sample(logits.expand(n, -1), 0.5, seeded())
    p = logits.softmax(0)
    assert ((gates.mean(0) - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_pair_frequency_is_sampling_without_replacement() -> None:
    """Gumbel-top-k draws a pair {i, j} with probability p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    logits = torch.tensor([0.0, 1.0, -1.0])
    n = 20_000
    gates = make(3, 3, active=2).sample(logits.expand(n, -1), 0.5, seeded())
    p = logits.softmax(0).tolist()
    for left_out in range(3):
        i, j = (k for k in range(3) if k != left_out)
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        found = float((gates[:, left_out] == 0).float().mean())
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("relaxation", ["topk", "binary"])
def test_without_noise_samples_are_decisions(relaxation: str) -> None:
    network = make(relaxation=relaxation, noise=0.0)
    logits = torch.randn(20, 8, generator=seeded())
    assert torch.equal(network.sample(logits, 1.0, seeded(1)), network.decide(logits))


@pytest.mark.parametrize("relaxation", ["topk", "binary"])
def test_generators_make_samples_repeatable(relaxation: str) -> None:
    network = make(relaxation=relaxation)
    logits = torch.randn(20, 8, generator=seeded())
    first = network.sample(logits, 1.0, seeded(1))
    assert torch.equal(first, network.sample(logits, 1.0, seeded(1)))
    assert not torch.equal(first, network.sample(logits, 1.0, seeded(2)))


def test_temperature_is_geometric() -> None:
    config = GateConfig(temperature=2.0, final_temperature=0.5)
    assert [config.temperature_at(x) for x in (-1, 0, 0.5, 1, 2)] == pytest.approx([2, 2, 1, 0.5, 0.5])


@pytest.mark.parametrize("relaxation", ["topk", "binary"])
def test_load_balance(relaxation: str) -> None:
    """1 when the pathways share the work, the size of the group when one does all of it."""
    network = make(relaxation=relaxation, active=1)
    uniform = torch.full((4, 8), -50.0)
    for row in range(4):
        uniform[row, [row, 4 + row]] = 50.0  # each input has a pathway of its own
    assert network.load_balance(uniform, network.decide(uniform)).item() == pytest.approx(1.0)
    collapsed = torch.full((4, 8), -50.0)
    collapsed[:, [2, 5]] = 50.0
    assert network.load_balance(collapsed, network.decide(collapsed)).item() == pytest.approx(4.0)


def test_load_balance_pulls_apart() -> None:
    """Its gradient lowers the logit of the pathway that is used most."""
    network = make(4, 4, active=1)
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]]).expand(8, -1).clone().requires_grad_()
    network.load_balance(logits, network.decide(logits)).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_network_shapes_and_eval_mode() -> None:
    network = make(dropout=0.5)
    user, context = torch.randn(6, 3), torch.randn(6, 5)
    logits = network(user, context)
    assert logits.shape == (6, 8)
    assert torch.equal(logits, network(user, context))
    assert not torch.equal(logits, network(user + 1, context))
    assert not torch.equal(logits, network(user, context + 1))
    assert not torch.equal(network.train()(user, context), network.train()(user, context))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relaxation": "soft"}, "relaxation='soft': expected one of topk, binary"),
        ({"active": 0}, "active=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"final_temperature": -1.0}, "final_temperature=-1.0"),
        ({"noise": -0.5}, "noise=-0.5"),
        ({"balance": -0.5}, "balance=-0.5"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateConfig(**settings)


@pytest.mark.parametrize(
    ("gates", "group", "message"),
    [(7, 4, "gates=7: expected a multiple of group=4"), (2, 1, "active=2: expected at most the 1 pathways")],
)
def test_gates_that_do_not_fit_their_groups(gates: int, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(gates, group)


def test_binary_ignores_active() -> None:
    assert make(2, 1, relaxation="binary").gates == 2
    with pytest.raises(ValueError, match="gates=4: expected a multiple of group=0"):
        make(4, 0)
