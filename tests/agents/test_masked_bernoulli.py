"""The masked Bernoulli distribution against enumeration and against sb3-contrib's, and MaskablePPO over it."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.distributions import MaskableBernoulliDistribution
from torch import Tensor

from dsa_gym.agents import make_agent
from dsa_gym.agents.masked_bernoulli import (
    MaskedBernoulliDistribution,
    MaskedBernoulliPolicy,
    MaskedDictRolloutBuffer,
    MaskedRolloutBuffer,
)
from dsa_gym.envs.sb3 import GymnasiumVecEnv
from dsa_gym.envs.wrappers import AllowedGates, VectorAllowedGates

GATES = 3
EVERY = torch.tensor(list(itertools.product([0.0, 1.0], repeat=GATES)), dtype=torch.float64)
PAIRS = [(False, True), (True, False), (True, True)]
LOGITS = [0.3, -1.2, 2.0]


def masked(logits: Tensor, mask: Any) -> MaskedBernoulliDistribution:
    made = MaskedBernoulliDistribution(logits.shape[-1]).proba_distribution(logits)
    made.apply_masking(mask)
    return made


def wide(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Masks (..., n) of what may be on as pairs (..., 2n): off is always allowed."""
    return np.stack([np.ones_like(mask), mask], axis=-1).reshape(*mask.shape[:-1], -1)


def reference(logits: Tensor, pairs: Any) -> Tensor:
    """Probability of every mask, by the definition: what is left of a gate's two probabilities, normalised."""
    total = torch.ones(len(EVERY), dtype=torch.float64)
    for gate, (off, on) in enumerate(pairs):
        p = torch.sigmoid(logits[gate])
        both = torch.stack([(1 - p) * off, p * on])
        total = total * (both / both.sum())[EVERY[:, gate].long()]
    return total


@pytest.mark.parametrize("pairs", list(itertools.product(PAIRS, repeat=GATES)))
def test_against_enumeration(pairs: Any) -> None:
    """Probabilities, entropy, their gradients and the mode, under every pattern of masks."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    made = masked(logits.expand(len(EVERY), -1), np.array(pairs).reshape(-1))
    expected = reference(logits, pairs)
    log_prob = made.log_prob(EVERY)
    torch.testing.assert_close(log_prob.exp(), expected)
    assert (log_prob[expected == 0] == -torch.inf).all()
    possible = expected > 0
    entropy = -(expected[possible] * expected[possible].log()).sum()
    torch.testing.assert_close(made.entropy(), entropy.expand(len(EVERY)))
    for own, true in (
        (log_prob[possible].sum(), expected[possible].log().sum()),
        (made.entropy()[0], entropy),
    ):
        found = torch.autograd.grad(own, logits, retain_graph=True)[0]
        wanted = torch.autograd.grad(true, logits, retain_graph=True)[0]
        torch.testing.assert_close(found, wanted)
    assert expected[(made.mode()[:1] == EVERY).all(1)].item() == pytest.approx(expected.max().item())


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=GATES)))
def test_short_masks_are_pairs_that_allow_off(mask: Any) -> None:
    logits = torch.tensor([LOGITS] * len(EVERY))
    short, long = masked(logits, np.array(mask)), masked(logits, wide(np.array(mask)))
    assert torch.equal(short.log_prob(EVERY), long.log_prob(EVERY))
    assert torch.equal(short.entropy(), long.entropy())
    assert torch.equal(short.mode(), long.mode())


finite = st.floats(-30, 30, width=32)


@given(
    logits=hnp.arrays(np.float32, (4, 5), elements=finite),
    on=hnp.arrays(np.bool_, (4, 5)),
    off=hnp.arrays(np.bool_, (4, 5)),
    seed=st.integers(0, 1000),
)
def test_equals_sb3_contribs(logits: Any, on: Any, off: Any, seed: int) -> None:
    """Of pairs of logits (0, theta) their categoricals are these Bernoullis."""
    off = off | ~on
    pairs = np.stack([off, on], axis=-1).reshape(4, 10)
    theta = torch.from_numpy(logits).double()
    made = masked(theta, pairs)
    theirs = MaskableBernoulliDistribution(5).proba_distribution(
        torch.stack([torch.zeros_like(theta), theta], dim=-1).flatten(1)
    )
    theirs.apply_masking(pairs)
    torch.manual_seed(seed)
    drawn = made.sample()
    assert (drawn.bool() <= torch.from_numpy(on)).all() and (~drawn.bool() <= torch.from_numpy(off)).all()
    torch.testing.assert_close(made.log_prob(drawn), theirs.log_prob(drawn.long()))
    torch.testing.assert_close(made.entropy(), theirs.entropy())
    decided = theta.abs() > 1e-6  # their softmax may round nearer ones to a tie
    assert torch.equal(made.mode()[decided], theirs.mode().double()[decided])
    assert torch.isfinite(made.log_prob(drawn)).all()


@given(
    logits=hnp.arrays(np.float32, (2, 6), elements=st.floats(-1e6, 1e6, width=32)), mask=hnp.arrays(np.bool_, (2, 6))
)
def test_gates_that_may_not_be_on(logits: Any, mask: Any) -> None:
    """They are off, and neither log-probability, entropy nor gradient knows them; extreme logits stay finite."""
    theta = torch.from_numpy(logits).requires_grad_()
    made = masked(theta, mask)
    drawn = made.sample()
    free = torch.from_numpy(mask)
    assert (drawn[~free] == 0).all() and (made.mode()[~free] == 0).all()
    total = made.log_prob(made.mode()) + made.entropy()
    assert torch.isfinite(total).all() and (made.entropy() >= -1e-6).all()
    gradient = torch.autograd.grad(total.sum(), theta)[0]
    assert torch.isfinite(gradient).all() and (gradient[~free] == 0).all()
    only = [masked(theta[row : row + 1, free[row]], None) for row in range(2) if free[row].any()]
    shares = [one.entropy()[0] for one in only]
    torch.testing.assert_close(made.entropy()[free.any(1)], torch.stack(shares) if shares else torch.zeros(0))


def test_frequencies() -> None:
    torch.manual_seed(0)
    made = masked(torch.tensor([LOGITS]).expand(20_000, -1), np.array([True, False, True]))
    expected = torch.sigmoid(torch.tensor(LOGITS)) * torch.tensor([1, 0, 1])
    torch.testing.assert_close(made.sample().mean(0), expected, rtol=0, atol=0.015)


def test_masks_are_lifted() -> None:
    logits = torch.tensor([LOGITS])
    made = masked(logits, np.zeros(GATES))
    assert made.entropy().item() == 0 and made.mode().sum() == 0
    made.apply_masking(None)
    assert torch.equal(made.entropy(), masked(logits, None).entropy()) and made.mode().sum() == 2


@pytest.mark.parametrize("mask", [np.ones(4), np.ones((3, 3)), np.ones(()), np.ones((2, 9))])
def test_masks_of_another_shape(mask: Any) -> None:
    with pytest.raises(ValueError, match=r"action_masks: shape .*, expected 3 or 6 for each of 2 rows"):
        masked(torch.zeros(2, 3), mask)


def test_a_gate_without_a_choice() -> None:
    with pytest.raises(ValueError, match="neither off nor on"):
        masked(torch.zeros(2, 3), np.array([1, 1, 0, 0, 1, 1]))


class Masks(gym.Wrapper[Any, Any, Any, Any]):
    """Offers given masks, and notes the actions."""

    def __init__(self, env: Any, masks: Any) -> None:
        super().__init__(env)
        self.masks, self.actions = np.asarray(masks), []  # type: ignore[var-annotated]

    def action_masks(self) -> Any:
        return self.masks

    def step(self, action: Any) -> Any:
        self.actions.append(np.asarray(action))
        return self.env.step(action)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "masks", [[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1]], ids=["as long as gates", "pairs"]
)
def test_policy_by_itself(masks: Any, flat: bool, planted: Any, planted_env: Any) -> None:
    env: Any = Masks(planted_env(planted(0, users=5)), masks)
    buffer: Any = MaskedDictRolloutBuffer
    if flat:
        env = Masks(gym.wrappers.FlattenObservation(planted_env(planted(0, users=5))), masks)
        buffer = MaskedRolloutBuffer
    settings: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "seed": 0, "device": "cpu", "gamma": 0.0}
    model = MaskablePPO(MaskedBernoulliPolicy, env, rollout_buffer_class=buffer, **settings)
    model.learn(64)
    done = np.stack(env.actions)
    assert len(done) == 64
    short = np.array(masks).reshape(6, -1)[:, -1].astype(bool)
    assert (done[:, ~short] == 0).all() and 0 < done[:, short].mean() < 1
    if len(masks) == 12:
        assert (done[:, 3] == 1).all(), "it may not be off"
    weights = model.policy.action_net.weight
    assert weights.shape == (6, 64), "one output for each gate"
    observation, _ = env.reset(seed=0)
    action, _ = model.predict(observation, deterministic=True, action_masks=np.array(masks))
    assert (action[~short] == 0).all()


def test_pairs_need_no_buffer_of_ours(planted: Any, planted_env: Any) -> None:
    env = Masks(planted_env(planted(0, users=5)), [1, 0] * 6)
    MaskablePPO(MaskedBernoulliPolicy, env, n_steps=16, batch_size=8, seed=0, device="cpu").learn(16)
    assert (np.stack(env.actions) == 0).all()


def test_policy_of_other_actions() -> None:
    box = spaces.Box(-1, 1, (3,), np.float32)
    with pytest.raises(ValueError, match=r"action_space=Discrete\(4\): expected MultiBinary"):
        MaskedBernoulliPolicy(box, spaces.Discrete(4), lambda _: 1e-3)


SMALL: dict[str, Any] = {"hidden": [8], "n_steps": 4, "batch_size": 16, "epochs": 1}


@pytest.mark.parametrize("scalar", [False, True])
def test_agent_keeps_to_the_environments_masks(
    scalar: bool, planted: Any, planted_env: Any, planted_vec_env: Any, tmp_path: Any
) -> None:
    problem = planted(0, users=10)
    env: Any = AllowedGates(planted_env(problem), allowed=[0, 1, 4])
    if not scalar:
        vectors = planted_vec_env(problem, 4).envs
        env = GymnasiumVecEnv(VectorAllowedGates(vectors, allowed=[0, 1, 4]))
    agent: Any = make_agent("maskable_ppo", env, 0, **SMALL)
    agent.learn(64)
    with torch.no_grad():
        agent.model.policy.action_net.bias.fill_(5.0)  # it wants all of them
    assert (agent.masks(problem) == [1, 1, 0, 0, 1, 0]).all()
    agent.save(tmp_path)
    plain = make_agent("maskable_ppo", planted_env(planted(0, users=10)), 0, **SMALL)
    assert plain.masks(problem).any()
    plain.load(tmp_path)
    assert (plain.masks(problem) == [1, 1, 0, 0, 1, 0]).all(), "the masks are the agent's"


def test_masks_that_differ_between_environments(planted: Any, planted_vec_env: Any, monkeypatch: Any) -> None:
    vectors = VectorAllowedGates(planted_vec_env(planted(0, users=5), 2).envs, allowed=[0])
    monkeypatch.setattr(vectors, "action_masks", lambda: np.eye(2, 6, dtype=bool))
    with pytest.raises(ValueError, match="action masks differ"):
        make_agent("maskable_ppo", GymnasiumVecEnv(vectors), 0, **SMALL)


def test_without_masks_it_is_plain_ppo(planted: Any, planted_vec_env: Any) -> None:
    """The same network, and nearly the same numbers, up to how entropy and log-probability are computed."""
    problem = planted(0, users=10)
    plain, ours = (make_agent(name, planted_vec_env(problem, 4), 0, **SMALL) for name in ("ppo", "maskable_ppo"))
    for agent in (plain, ours):
        agent.learn(256)
    for key, value in plain.state().items():
        torch.testing.assert_close(ours.state()[key], value, rtol=1e-3, atol=1e-4)
