"""Tables under all masks: what the model says, resumed bit for bit, refused when they are of something else."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from dsa_gym import storage
from dsa_gym.bundle import Bundle
from dsa_gym.model import all_gates
from dsa_gym.problem import GatingProblem
from dsa_gym.tables import build_table, read_table, table_record


def problem(folder: Path, granularity: str = "pathway") -> GatingProblem:
    return GatingProblem(Bundle.open(folder), "validation", granularity=granularity, cache_bytes=0)


def test_a_table_is_what_the_model_says(bundle_folder: Path, tmp_path: Path) -> None:
    own = problem(bundle_folder)
    build_table(own, tmp_path, key={"bundle": "x"})
    table, about = read_table(tmp_path, "validation"), table_record(tmp_path, "validation")["about"]
    assert about["bundle"] == "x" and table.shape == (len(own), 16)
    masks = all_gates(own.space).numpy()
    for row in (0, len(own) - 1):
        np.testing.assert_allclose(table[row], own.compute_losses(np.full(16, row), masks), atol=1e-5)
    measured = Bundle.open(bundle_folder).table("validation")
    np.testing.assert_allclose(table, measured, atol=1e-3)


def test_a_killed_build_goes_on_bit_for_bit(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = problem(bundle_folder)
    build_table(own, tmp_path / "unbroken", key={}, every=2)
    original, calls = own.compute_losses, [0]

    def killed(*arguments: np.ndarray) -> np.ndarray:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(own, "compute_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        build_table(own, tmp_path / "killed", key={}, every=2)
    with pytest.raises(ValueError, match="no finished table of split 'validation'"):
        read_table(tmp_path / "killed", "validation")
    build_table(own, tmp_path / "killed", key={}, every=2)
    assert calls[0] == 6 + len(own) - 4, "inputs before the last mark are not computed again"
    first, second = (read_table(tmp_path / name, "validation") for name in ("unbroken", "killed"))
    np.testing.assert_array_equal(first, second)
    build_table(own, tmp_path / "killed", key={})
    assert calls[0] == 6 + len(own) - 4, "a finished table is not built again"


def test_tables_that_cannot_be_used(bundle_folder: Path, tmp_path: Path) -> None:
    own = problem(bundle_folder)
    build_table(own, tmp_path, key={"bundle": Bundle.open(bundle_folder).checksum})
    with pytest.raises(ValueError, match="holds a table of something else"):
        build_table(own, tmp_path, key={"bundle": "another"})
    with pytest.raises(ValueError, match=r"component'.* gates, expected at most 16"):
        build_table(problem(bundle_folder, "component"), tmp_path / "wide", key={})
    env = gym.make("DSA-TextTable-v0", bundle=str(bundle_folder), split="validation", table=str(tmp_path))
    env.reset(seed=0)
    assert "regret" in env.step(np.ones(4, np.int8))[4]
    with pytest.raises(ValueError, match="no finished table of split 'test'"):
        gym.make("DSA-TextTable-v0", bundle=str(bundle_folder), split="test", table=str(tmp_path))
    record = storage.read_json(tmp_path / "validation.json")
    storage.write_json(tmp_path / "validation.json", record | {"about": record["about"] | {"bundle": "another"}})
    with pytest.raises(ValueError, match="was built of another bundle"):
        gym.make("DSA-TextTable-v0", bundle=str(bundle_folder), split="validation", table=str(tmp_path))
    data = bytearray((tmp_path / "validation.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "validation.npy").write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        read_table(tmp_path, "validation")
