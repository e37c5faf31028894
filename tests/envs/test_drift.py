"""Drifting environments: who is there changes at the stated rate, what is shown of the user does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest


def make_vec(bundle: Path, num_envs: int = 64, **kwargs: Any) -> Any:
    return gym.make_vec("DSA-TextDrift-v0", num_envs=num_envs, bundle=str(bundle), **kwargs)


@pytest.mark.parametrize("drift", [0.0, 0.25, 1.0])
def test_users_change_at_the_rate(bundle_folder: Path, drift: float) -> None:
    envs = make_vec(bundle_folder, 200, drift=drift, episode_length=12)
    _, infos = envs.reset(seed=0)
    users = [infos["user"]]
    for _ in range(11):
        users.append(envs.step(envs.action_space.sample())[4]["user"])
    users = np.array(users[1:])
    owners = np.unique(envs.problem.user.numpy())
    # a draw may hit the same user again
    expected = drift * (1 - 1 / len(owners))
    changes = (users[1:] != users[:-1]).mean()
    assert changes == pytest.approx(expected, abs=4 * np.sqrt(0.25 / users[1:].size))
    assert set(np.unique(users)) <= set(owners)


def test_what_is_seen(bundle_folder: Path) -> None:
    envs = make_vec(bundle_folder, 32, drift=0.5, episode_length=6)
    observation, infos = envs.reset(seed=1)
    problem, first = envs.problem, infos["input"]
    assert not observation["mask"].any() and not observation["reward"].any()
    stale = False
    for step in range(5):
        actions = envs.action_space.sample()
        observation, rewards, ended, _, infos = envs.step(actions)
        assert not ended.any()
        np.testing.assert_array_equal(observation["user"], problem.observations["user"][first])
        np.testing.assert_array_equal(observation["mask"], actions)
        np.testing.assert_allclose(observation["reward"][:, 0], rewards, rtol=1e-6)
        np.testing.assert_allclose(rewards, problem.rewards(infos["input"], actions.astype(np.uint8)))
        assert (problem.user.numpy()[infos["input"]] == infos["user"]).all()
        stale |= bool(step and (infos["user"] != problem.user.numpy()[first]).any())
    assert stale
    *_, ended, _, infos = envs.step(envs.action_space.sample())
    assert ended.all()


def test_hidden_user(bundle_folder: Path) -> None:
    seen, hidden = (make_vec(bundle_folder, hidden_user=value) for value in (False, True))
    (first, _), (second, _) = seen.reset(seed=0), hidden.reset(seed=0)
    assert first["user"].any() and not second["user"].any()
    np.testing.assert_array_equal(first["context"], second["context"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"drift": 1.5}, "drift=1.5: expected a probability"), ({"hidden_user": 1}, "hidden_user=1: expected True or")],
)
def test_bad_arguments(bundle_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vec(bundle_folder, **arguments)
