"""Rows are accepted only if the saved agent earns what they say; the leaderboard is made of accepted ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsa_gym import storage
from dsa_gym.experiments.cli import main
from dsa_gym.experiments.compare import static_mask
from dsa_gym.experiments.leaderboard import leaderboard
from dsa_gym.experiments.rows import read_users, write_row, write_table
from dsa_gym.experiments.train import TrainConfig, train
from dsa_gym.experiments.verify import verify

CELL = "cells/DSA-TextTable-v0/rloo/seed0"


@pytest.fixture
def copied(comparison: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(comparison, tmp_path / "comparison"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    row = storage.read_json(path)
    change(row)
    storage.write_json(path, row)


def test_rows_are_reproduced(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = verify(comparison)
    assert len(checked) == 4
    assert set(checked.values()) == {None}
    for path in (comparison / CELL, comparison / CELL / "row.json"):
        assert verify(path) == {str(comparison / CELL): None}
    assert main(["verify", str(comparison / CELL)]) == 0
    assert "reproduced" in capsys.readouterr().out


def flip_mask(run: Path) -> None:
    masks = storage.read_array(run / "masks-unseen.npy").copy()
    masks[0, 0] ^= 0b1000_0000
    storage.write_array(run / "masks-unseen.npy", masks)


def flip_mask_and_row(run: Path) -> None:
    flip_mask(run)
    digest = storage.sha256(run / "masks-unseen.npy")
    edit(run / "row.json", lambda row: row["unseen"].update(masks_sha256=digest))


def another_agent(run: Path) -> None:
    tensors = storage.read_tensors(run / "agent.safetensors")
    storage.write_tensors(
        run / "agent.safetensors",
        {name: -value if value.is_floating_point() and name.startswith("gate") else value
         for name, value in tensors.items()},
    )  # fmt: skip


def better_user(run: Path) -> None:
    users = read_users(run)
    users.loc[0, "reward"] += 0.01
    write_table(run / "users.parquet", users)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run / "row.json").write_text("{}"), "is no row of a comparison"),
        (lambda run: (run / "row.json").write_text('{"env": '), "row.json"),
        (lambda run: edit(run / "row.json", lambda row: row["unseen"].update(reward=0.0)), "unseen: reward is"),
        (lambda run: edit(run / "row.json", lambda row: row["seen"].update(reward="x")), "seen: reward is"),
        (lambda run: edit(run / "row.json", lambda row: row["seen"].update(density=0.1)), "seen: density is"),
        (lambda run: edit(run / "row.json", lambda row: row["unseen"].update(normalized_score=2)), "normalized_score"),
        (lambda run: edit(run / "row.json", lambda row: row.update(agent="ppo")), "agent: the row says 'ppo'"),
        (lambda run: edit(run / "row.json", lambda row: row.update(seconds=0.1)), "seconds: the row says"),
        (lambda run: edit(run / "row.json", lambda row: row["config"].update(steps=8)), "config: the row says"),
        (lambda run: edit(run / "run.json", lambda record: record["config"].update(bundle="/nowhere")), "nowhere"),
        (lambda run: edit(run / "run.json", lambda record: record["bundle"]["files"].clear()), "has been made anew"),
        (lambda run: edit(run / "run.json", lambda record: record.pop("scores")), "not finished"),
        (flip_mask, "is not the file that the row names by its SHA-256"),
        (flip_mask_and_row, "the saved agent decides otherwise"),
        (another_agent, "the saved agent decides otherwise"),
        (better_user, "users.parquet does not hold the rewards"),
        (lambda run: (run / "users.parquet").write_bytes(b"no"), "users.parquet"),
        *((lambda run, name=name: (run / name).unlink(), name)
          for name in ("run.json", "agent.json", "agent.safetensors", "masks-seen.npy", "users.parquet")),
    ],
)  # fmt: skip
def test_damaged_rows_are_refused(
    copied: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Any], reason: str
) -> None:
    damage(copied / CELL)
    assert main(["verify", str(copied / CELL)]) == 1
    said = capsys.readouterr().out
    assert "refused" in said
    assert reason in said


def test_a_bundle_that_changed(bundle_folder: Path, tmp_path: Path, quiet_log: object) -> None:
    bundle = Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))
    config = TrainConfig(env="DSA-TextTable-v0", agent="none", bundle=str(bundle), steps=8, num_envs=2)
    run = train(config, tmp_path / "runs")
    write_row(run, static_mask(config))
    assert verify(run) == {str(run): None}
    table = bundle / "losses" / "test.npy"
    storage.write_array(table, storage.read_array(table) + 1)
    (reason,) = verify(run).values()
    assert reason is not None
    assert "test.npy" in reason
    shutil.rmtree(bundle)
    (reason,) = verify(run).values()
    assert reason is not None


@pytest.mark.parametrize("env", ["DSA-Text-v0", "DSA-Planted-v0"])
def test_models_and_planted_instances(bundle_folder: Path, tmp_path: Path, quiet_log: object, env: str) -> None:
    """Losses that a model computes, with no table of this granularity; and 64 gates whose optimum is known."""
    if env == "DSA-Planted-v0":
        config = TrainConfig(env=env, agent="random", steps=8, num_envs=2, env_settings={"gates": 64, "users": 20})
    else:
        # as a reward metric would be: nothing is measured, everything is computed
        config = TrainConfig(env=env, agent="random", bundle=str(bundle_folder), steps=8, num_envs=2,
                             env_settings={"cache_bytes": 0})  # fmt: skip
    run = train(config, tmp_path)
    row = write_row(run, static_mask(config))
    assert ("regret" in row["unseen"]) == (env == "DSA-Planted-v0")
    assert verify(run) == {str(run): None}
    edit(run / "row.json", lambda row: row["unseen"].update(reward=row["unseen"]["reward"] + 1e-4))
    (reason,) = verify(run).values()
    assert reason is not None
    assert reason.startswith("unseen: reward is")


def test_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "no row there" in capsys.readouterr().err


def test_leaderboard(copied: Path, comparison: Path, tmp_path: Path) -> None:
    path = tmp_path / "LEADERBOARD.md"
    assert main(["leaderboard", str(comparison), "--out", str(path)]) == 0
    whole = path.read_text(encoding="utf-8")
    row = storage.read_json(comparison / CELL / "row.json")
    name = Path(row["config"]["bundle"]).name
    assert f"## DSA-TextTable-v0, {row['fingerprint'][:12]} (bundle {name})" in whole
    lines = [line for line in whole.splitlines() if line.startswith(("| rloo", "| static"))]
    assert [line.split(" | ")[1] for line in lines] == ["2", "2"]
    assert row["command"].replace(row["config"]["bundle"], name) in whole
    assert row["config"]["bundle"] not in whole, "where it was on this machine is nobody's business"
    # a row that can't be reproduced is not on it, and the same folder twice counts once
    edit(copied / CELL / "row.json", lambda row: row["unseen"].update(reward=0.0))
    refused = leaderboard([copied, copied], path)
    assert list(refused) == [str(copied / CELL)]
    (line,) = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| rloo")]
    assert line.split(" | ")[1] == "1"


def test_leaderboard_of_nothing(copied: Path, tmp_path: Path) -> None:
    for path in copied.glob("cells/*/*/*/row.json"):
        path.write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(ValueError, match="no row is verified"):
        leaderboard([copied], tmp_path / "board.md")
    assert not (tmp_path / "board.md").exists()
