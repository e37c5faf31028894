"""The comparison with rivals: each does the same work, and what is reported is what was timed."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from rich.console import Console

from dsa_gym.domains import take
from dsa_gym.experiments import rivals
from dsa_gym.experiments.bench import different_users


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch itself, to compile
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_result() -> None:
    result = rivals.rivals(num_envs=(4, 5), repetitions=2, ppo_steps=1000, users=(3,))
    names = set(rivals.LABELS) - (set() if importlib.util.find_spec("peft") else {"peft"})
    for count, expected in ((4, names), (5, names - {"peft", "bfloat16", "dummy"})):
        batch = result["batches"][count]
        assert set(batch["milliseconds"]) == expected and set(batch["share"]) == expected - {"step"}
        assert all(value["median"] > 0 for value in batch["milliseconds"].values())
        assert result["difference"][count]["nothing_kept"] < 1e-5
        assert result["difference"][count]["compiled"] < 1e-4
    assert 0 < result["difference"][4]["bfloat16"] < 0.1
    assert sum(result["profile"].values()) == pytest.approx(1) and min(result["profile"].values()) > 0
    assert result["cache"]["hit_rate"] > 0 and result["cache"]["largest_difference"] < 1e-5
    assert set(result["scaling"]) == {64, 256, 1024} and set(result["users"]) == {3}
    assert result["table"] > 0 and result["ppo"] > 0
    console = Console(file=io.StringIO(), width=200)
    rivals.show(result, console)
    assert "DummyVecEnv" in console.file.getvalue()  # type: ignore[attr-defined]


def test_hugging_face_scores_the_same() -> None:
    envs = gym.make_vec("DSA-Text-v0", num_envs=8, cache_bytes=0)
    inputs, _ = different_users(envs, 0)
    problem = envs.unwrapped.problem  # type: ignore[attr-defined]
    assert len(set(problem.user[inputs].tolist())) == 8
    examples = take(problem.bundle.examples, problem.rows[torch.from_numpy(inputs)])
    with torch.no_grad():
        model = rivals._hugging_face(problem.bundle.manifest["backbone"]["source"])
        theirs = rivals._loss(model, problem.model.domain.prefix_tokens, examples)
    np.testing.assert_allclose(theirs.numpy(), problem.compute_losses(inputs, None), atol=1e-4)


@pytest.mark.parametrize("arguments", [{"num_envs": (0,)}, {"repetitions": 1}, {"ppo_steps": 0}, {"users": (0,)}])
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        rivals.rivals(**arguments)
