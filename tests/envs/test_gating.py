"""The gating environment: what its gates, options, caches and refusals mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsa_gym.bundle import Bundle
from dsa_gym.envs.gating import GatingEnv, GatingVectorEnv
from dsa_gym.masks import GRANULARITIES, MaskSpace
from dsa_gym.problem import GatingProblem

ID = "DSA-Text-v0"


def make(bundle: Path, **kwargs: Any) -> GatingEnv:
    env = gym.make(ID, bundle=str(bundle), **kwargs).unwrapped
    assert isinstance(env, GatingEnv)
    return env


def make_vec(bundle: Path, num_envs: int = 4, **kwargs: Any) -> GatingVectorEnv:
    env = gym.make_vec(ID, num_envs=num_envs, bundle=str(bundle), **kwargs)
    assert isinstance(env, GatingVectorEnv)
    return env


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that went through the model, call by call."""
    calls: list[int] = []
    compute = GatingProblem.compute_losses

    def counted(self: Any, inputs: Any, gates: Any, **kwargs: Any) -> Any:
        calls.append(len(inputs))
        return compute(self, inputs, gates, **kwargs)

    monkeypatch.setattr(GatingProblem, "compute_losses", counted)
    return calls


# --------------------------------------------------------------------------------------------- granularities


def as_gates(bundle: Bundle, coarse: NDArray[np.uint8], granularity: str) -> NDArray[np.uint8]:
    """Pathway gates said in another granularity."""
    pathway, space = MaskSpace(bundle.shape, "pathway"), MaskSpace(bundle.shape, granularity)
    return pathway.refine(torch.from_numpy(coarse).float(), space).to(torch.uint8).numpy()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equal_masks_have_equal_rewards(granularity: str, bundle_folder: Path) -> None:
    coarse = np.array([[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=np.uint8)
    reference = make_vec(bundle_folder, split="test")
    reference.reset(seed=0)
    expected = reference.step(coarse)
    for cache_bytes in (0, 2**20):
        env = make_vec(bundle_folder, split="test", granularity=granularity, cache_bytes=cache_bytes)
        env.reset(seed=0)
        gates = as_gates(reference.problem.bundle, coarse, granularity)
        assert gates.shape == env.action_space.shape
        got = env.step(gates)
        np.testing.assert_allclose(got[1], expected[1], atol=1e-5, rtol=0)
        for name in ("active_parameters", "density", "input"):
            np.testing.assert_array_equal(got[4]["final_info"][name], expected[4]["final_info"][name])
        assert "model" in env.problem.__dict__ or granularity == "pathway"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_kind_of_gate_acts(granularity: str, bundle_folder: Path) -> None:
    env = make(bundle_folder, granularity=granularity, cache_bytes=0, l0_penalty=0.0)
    off = np.zeros(env.action_space.shape, np.int8)
    on = off.copy()
    on[::2] = 1  # of single parameters some of both matrices: one without the other changes nothing
    losses = []
    for action in (off, on, np.ones_like(off)):
        env.reset(seed=0)
        losses.append(env.step(action)[4]["loss"])
    assert len(set(losses)) == 3


# ---------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("granularity", ["pathway", "site"])
def test_caches_do_not_change_rewards(granularity: str, bundle_folder: Path, rng: np.random.Generator) -> None:
    envs = [make_vec(bundle_folder, granularity=granularity, cache_bytes=size) for size in (0, 2_000, 2**22)]
    for env in envs:
        env.reset(seed=1)
    masks = rng.integers(0, 2, (3, 4, envs[0].problem.gates), dtype=np.uint8)
    for now in range(9):
        rewards = [env.step(masks[now % 3])[1] for env in envs]
        for other in rewards[1:]:
            np.testing.assert_allclose(other, rewards[0], atol=1e-5, rtol=0)


def test_equal_requests_are_computed_once(bundle_folder: Path, computed: list[int]) -> None:
    env = make_vec(bundle_folder, num_envs=6, granularity="layer")
    gates = np.zeros(env.action_space.shape, np.int8)
    gates[3:, 0] = 1
    for _ in range(2):
        env.reset(options={"input": 3})
        _, rewards, *_ = env.step(gates)
        assert len(set(rewards[:3])) == len(set(rewards[3:])) == 1 and rewards[0] != rewards[3]
    assert computed == [2], "two distinct masks of one input, and none the second time"


def test_bounded_cache_stays_bounded(bundle_folder: Path, computed: list[int], rng: np.random.Generator) -> None:
    bound = 5_000
    env = make_vec(bundle_folder, num_envs=32, granularity="site", cache_bytes=bound)
    env.reset(seed=0)
    first = rng.integers(0, 2, env.action_space.shape, dtype=np.int8)
    for now in range(3):
        env.step(first if now == 0 else rng.integers(0, 2, env.action_space.shape, dtype=np.int8))
        assert 0 < len(env.problem._cache) <= bound // 150
    env.reset(seed=0)
    env.step(first)
    assert len(computed) == 4, "what was forgotten is computed again"


def test_table_of_the_bundle_is_used(bundle_folder: Path, computed: list[int]) -> None:
    env = make_vec(bundle_folder)
    env.reset(seed=0)
    env.step(np.ones(env.action_space.shape, np.int8))
    assert computed == []
    assert "model" not in env.problem.__dict__


# --------------------------------------------------------------------------------------------------- options


def test_options_fix_user_and_input(bundle_folder: Path) -> None:
    env = make(bundle_folder, split="test", episode_length=3)
    env.reset(seed=0)
    owners, users = env.problem.user.numpy(), env.problem.bundle.users
    user = int(owners[-1])
    for value in (user, np.int64(user), users[user], [user], np.array([users[user]])):
        assert {env.reset(options={"user": value})[1]["user"] for _ in range(5)} == {user}
    for _ in range(3):
        assert env.step(np.zeros(4, np.int8))[4]["user"] == user
    for i in (0, len(owners) - 1):
        observation, info = env.reset(options={"input": i})
        assert info == {"user": owners[i], "input": i}
        np.testing.assert_array_equal(observation["context"], env.problem.observations["context"][i])
    assert env.reset(options={"user": user, "input": len(owners) - 1})[1]["input"] == len(owners) - 1
    assert env.reset(options={"user": None})[1]["user"] in owners


def test_options_of_a_batch(bundle_folder: Path) -> None:
    env = make_vec(bundle_folder, episode_length=3)
    env.reset(seed=0)
    owners, users = env.problem.user.numpy(), env.problem.bundle.users
    some = np.unique(owners)[[0, 2, 2, 1]]
    for value in (some, some.tolist(), [users[some[0]], some[1], np.int64(some[2]), users[some[3]]]):
        np.testing.assert_array_equal(env.reset(options={"user": value})[1]["user"], some)
    assert (env.reset(options={"user": users[some[1]]})[1]["user"] == some[1]).all()
    np.testing.assert_array_equal(env.reset(options={"input": [3, 1, 4, 1]})[1]["input"], [3, 1, 4, 1])

    before = env.step(np.zeros((4, 4), np.int8))
    mask = np.array([False, True, False, True])
    observation, info = env.reset(options={"reset_mask": mask, "input": [9, 5, 9, 6]})
    np.testing.assert_array_equal(info["input"][mask], [5, 6])
    np.testing.assert_array_equal(info["_input"], mask)
    np.testing.assert_array_equal(observation["user"][~mask], before[0]["user"][~mask])
    ended = [env.step(np.zeros((4, 4), np.int8))[2].tolist() for _ in range(3)]
    assert ended == [[False] * 4, [True, False, True, False], [False, True, False, True]]


def test_reset_mask_seeds_only_what_it_resets(bundle_folder: Path) -> None:
    env, other = (make_vec(bundle_folder, num_envs=2) for _ in range(2))
    for one in (env, other):
        one.reset(seed=0)
    env.reset(seed=50, options={"reset_mask": np.array([True, False])})
    other.reset(options={"reset_mask": np.array([True, False])})
    draws = [[one.step(np.zeros((2, 4), np.int8))[4]["input"] for _ in range(8)] for one in (env, other)]
    first, second = np.array(draws[0]), np.array(draws[1])
    np.testing.assert_array_equal(first[:, 1], second[:, 1])
    assert (first[:, 0] != second[:, 0]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"person": 0}, r"unknown key 'person'"),
        ({0: 0}, r"unknown key '0'"),
        ({"user": "nobody"}, r"options\['user'\]='nobody'"),
        ({"user": -1}, r"options\['user'\]=-1"),
        ({"user": 10_000}, r"options\['user'\]=10000"),
        ({"user": 1.0}, r"options\['user'\]=1.0"),
        ({"user": True}, r"options\['user'\]=True"),
        ({"user": [0, 1]}, r"options\['user'\]=\[0, 1\]"),
        ({"user": [[0], [1, 2]]}, r"options\['user'\]"),
        ({"input": -1}, r"options\['input'\]=-1.*0 to "),
        ({"input": 10**30}, r"options\['input'\]"),
        ({"input": "persona-0000-Hugo"}, r"options\['input'\]='persona"),
        ({"input": []}, r"options\['input'\]=\[\]"),
    ],
)
def test_bad_options(options: dict[Any, Any], message: str, bundle_folder: Path) -> None:
    env = make(bundle_folder)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)


def test_user_and_input_that_do_not_belong_together(bundle_folder: Path) -> None:
    env = make(bundle_folder)
    env.reset(seed=0)
    owners = env.problem.user.numpy()
    stranger = int(next(user for user in owners if user != owners[0]))
    with pytest.raises(ValueError, match=f"input 0 belongs to user {owners[0]}, not {stranger}"):
        env.reset(options={"user": stranger, "input": 0})
    unseen = next(i for i in range(len(env.problem.bundle.users)) if i not in owners)
    with pytest.raises(ValueError, match="user of this split"):
        env.reset(options={"user": unseen})


@pytest.mark.parametrize("mask", [np.zeros(4, bool), np.ones(3, bool), np.ones(4, int), [True, False]])
def test_bad_reset_mask(mask: Any, bundle_folder: Path) -> None:
    env = make_vec(bundle_folder)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": mask})


def test_first_reset_begins_everything(bundle_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"reset_mask.*first reset"):
        make_vec(bundle_folder).reset(options={"reset_mask": np.array([True, False, True, True])})


@pytest.mark.parametrize("seed", [-1, 1.5, "one", [0, 1], [0, 1, 2, -3], [0, 1, 2, "x"]])
def test_bad_seeds(seed: Any, bundle_folder: Path) -> None:
    with pytest.raises(ValueError, match="seed"):
        make_vec(bundle_folder).reset(seed=seed)
    if not isinstance(seed, list):
        with pytest.raises(ValueError, match="seed="):
            make(bundle_folder).reset(seed=seed)


def test_any_size_of_seed(bundle_folder: Path) -> None:
    for seed in (0, 2**63, 2**64 - 1, 2**70):
        scalar = [make(bundle_folder).reset(seed=seed + i)[1]["input"] for i in range(2)]
        np.testing.assert_array_equal(make_vec(bundle_folder, num_envs=2).reset(seed=seed)[1]["input"], scalar)


# --------------------------------------------------------------------------------------------------- actions


@pytest.mark.parametrize(
    "action",
    [
        np.zeros(3, np.int8),
        np.zeros((1, 4), np.int8),
        np.int8(1),
        [[0], [0, 1], 1, 1],
        [0, 1, 1],
        None,
        "0101",
        ["0", "1", "0", "1"],
        {"gates": 1},
        np.array([0, 1, 2, 0]),
        np.array([0, -1, 1, 0]),
        np.array([0, 256, 1, 0]),
        np.array([0.0, 0.5, 1.0, 0.0]),
        np.array([0.0, np.nan, 1.0, 0.0]),
        np.array([0.0, np.inf, 1.0, 0.0]),
        np.array([0.0, -1.0, 1e30, 0.0]),
        np.array([0, 1, 1, 0], dtype=complex),
        np.array([0, 1, None, 0], dtype=object),
    ],
    ids=repr,
)
def test_bad_actions(action: Any, bundle_folder: Path) -> None:
    env, vector = make(bundle_folder), make_vec(bundle_folder, num_envs=2)
    env.reset(seed=0)
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        env.step(action)
    with pytest.raises(ValueError, match="action"):
        vector.step(np.stack([action, action]) if isinstance(action, np.ndarray) else action)
    assert env.step(np.zeros(4, np.int8))[2], "a refused action is no step"


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, bool, np.float32, np.float64])
def test_any_binary_type_of_action(dtype: Any, bundle_folder: Path) -> None:
    env = make(bundle_folder)
    rewards = []
    for action in (np.array([0, 1, 1, 0], np.int8), np.array([0, 1, 1, 0]).astype(dtype), [0, 1, 1, 0]):
        env.reset(seed=0)
        rewards.append(env.step(action)[1])
    assert len(set(rewards)) == 1


# ------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split", "training"),
        ("split", None),
        ("granularity", "neuron"),
        ("granularity", None),
        ("l0_penalty", -1e-9),
        ("l0_penalty", float("nan")),
        ("l0_penalty", float("inf")),
        ("l0_penalty", "0.1"),
        ("episode_length", 0),
        ("episode_length", 1.5),
        ("episode_length", True),
        ("cache_bytes", -1),
        ("cache_bytes", "1 MB"),
        ("bundle", "/nowhere"),
    ],
)
@pytest.mark.parametrize("vector", [False, True])
def test_bad_arguments(name: str, value: Any, vector: bool, bundle_folder: Path) -> None:
    arguments = {"bundle": str(bundle_folder), name: value}
    with pytest.raises(ValueError, match=f"{name}="):
        gym.make_vec(ID, num_envs=2, **arguments) if vector else gym.make(ID, **arguments)


@pytest.mark.parametrize("number", [0, -1, 2.0, True])
def test_bad_number_of_environments(number: Any, bundle_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"num_envs={number}"):
        make_vec(bundle_folder, num_envs=number)


def test_bad_render_mode(bundle_folder: Path) -> None:
    arguments: dict[str, Any] = {"domain": "text", "bundle": bundle_folder}
    with pytest.raises(ValueError, match="render_mode='video'"):
        GatingEnv(render_mode="video", **arguments)
    with pytest.raises(ValueError, match="render_mode='video'"):
        GatingVectorEnv(render_mode="video", **arguments)
    env = GatingEnv(**arguments)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="render_mode=None"):
        env.render()


def test_unknown_id() -> None:
    with pytest.raises(gym.error.NameNotFound):
        gym.make("DSA-Txt-v0")
    with pytest.raises(gym.error.VersionNotFound):
        gym.make("DSA-Text-v1")


def test_domain_of_another_bundle(bundle_folder: Path) -> None:
    with pytest.raises(ValueError, match="is of domain 'text', expected 'image'"):
        GatingEnv(domain="image", bundle=bundle_folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device(bundle_folder: Path) -> None:
    env = make(bundle_folder, device="cuda")
    with pytest.raises(ValueError, match="device='cuda'"):
        env.reset(seed=0)


def test_unknown_device(bundle_folder: Path) -> None:
    env = make(bundle_folder, device="abacus")
    with pytest.raises(ValueError, match="device='abacus'"):
        env.reset(seed=0)


@pytest.fixture
def copy(bundle_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_folder, tmp_path / "copy"))


def test_bundle_of_another_format(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        make(copy)
    (copy / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="format None"):
        make(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"bundle=.*manifest\.json"):
        make(copy)


@pytest.mark.parametrize("name", ["library.safetensors", "losses/train.npy"])
def test_changed_or_missing_file_is_found_at_reset(name: str, copy: Path) -> None:
    env, vector = make(copy), make_vec(copy)
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    for one in (env, vector):
        with pytest.raises(ValueError, match=f"{name}: checksum mismatch"):
            one.reset(seed=0)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        env.reset(seed=0)


# ----------------------------------------------------------------------------------- scalar and vector agree

Action = st.sampled_from(["step", "reset", "seed", "some"])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(1, 3),
    num_envs=st.integers(1, 3),
    plan=st.lists(Action, max_size=12),
    bits=st.integers(0),
)
def test_scalar_and_vector_stay_in_step(
    length: int, num_envs: int, plan: list[str], bits: int, bundle_folder: Path
) -> None:
    kwargs: dict[str, Any] = {"bundle": str(bundle_folder), "num_envs": num_envs, "episode_length": length}
    native = gym.make_vec(ID, **kwargs)
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
    scalars = gym.make_vec(ID, vectorization_mode="sync", vector_kwargs=same_step, **kwargs)
    rng = np.random.default_rng(bits)
    native.reset(seed=1)
    scalars.reset(seed=1)
    for what in plan:
        if what == "step":
            action = rng.integers(0, 2, (num_envs, 4), dtype=np.int8)
            mine, theirs = native.step(action), scalars.step(action)
            for a, b in zip(mine[1:4], theirs[1:4], strict=True):
                np.testing.assert_array_equal(a, b)
        else:
            seed = int(rng.integers(100)) if what == "seed" else None
            mask = rng.random(num_envs) < 0.5
            mask[0] = True
            pair = [{"reset_mask": mask.copy()} if what == "some" else None for _ in range(2)]
            mine, theirs = native.reset(seed=seed, options=pair[0]), scalars.reset(seed=seed, options=pair[1])
        for name in ("user", "context"):
            np.testing.assert_array_equal(mine[0][name], theirs[0][name])
        info, reference = mine[-1], theirs[-1]
        for name in ("user", "input"):
            np.testing.assert_array_equal(info[name], reference[name])
