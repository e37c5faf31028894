"""Comparisons: every cell once, whatever is killed, crashes, diverges or fills the disk."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dsa_gym import storage
from dsa_gym.experiments import compare as module
from dsa_gym.experiments.cli import main
from dsa_gym.experiments.compare import ENGINES, Grid, Task, compare, disk_is_full, local, run_cell
from dsa_gym.experiments.rows import command, read_row
from dsa_gym.experiments.train import TrainConfig, load_run

ENV = "DSA-TextTable-v0"
UNSTABLE = ("seconds",)


def cells(out: Path) -> dict[str, Path]:
    return {str(path.parent.relative_to(out / "cells")): path for path in sorted(out.glob("cells/*/*/*/row.json"))}


def same_rows(one: Path, other: Path) -> None:
    """The rows of two comparisons are equal apart from how long they took."""
    tables = [pd.read_parquet(out / "rows.parquet").drop(columns=[*UNSTABLE]) for out in (one, other)]
    for table in tables:
        table.sort_values(["env", "agent", "seed"], inplace=True, ignore_index=True)
    pd.testing.assert_frame_equal(*tables)
    users = [pd.read_parquet(out / "users.parquet") for out in (one, other)]
    for table in users:
        table.sort_values(["env", "agent", "seed", "part", "user"], inplace=True, ignore_index=True)
    pd.testing.assert_frame_equal(*users)


@pytest.fixture
def copied(comparison: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(comparison, tmp_path / "comparison"))


@pytest.fixture
def no_cells(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Tasks are noted and nothing is run."""
    noted: list[Task] = []

    def engine(tasks: Any, workers: int) -> Any:
        noted.extend(tasks)
        yield None

    monkeypatch.setitem(ENGINES, "local", engine)
    return noted


def test_every_cell_is_a_row(comparison: Path, bundle_folder: Path) -> None:
    expected = {f"{ENV}/{agent}/seed{seed}" for agent in ("rloo", "static") for seed in (0, 1)}
    assert set(cells(comparison)) == expected
    table = pd.read_parquet(comparison / "rows.parquet")
    assert len(table) == 4
    assert len(pd.read_csv(comparison / "rows.csv")) == 4
    for name, path in cells(comparison).items():
        row, run = read_row(path), path.parent
        config, agent = load_run(run)
        assert name == f"{row['env']}/{row['agent']}/seed{row['seed']}"
        assert row["config"]["bundle"] == str(bundle_folder)
        assert row["versions"] == storage.versions()
        for part, split in (("unseen", "test"), ("seen", "seen")):
            problem = config.problem(split)
            masks = agent.masks(problem)
            rewards = problem.rewards(np.arange(len(problem)), masks)
            assert row[part]["reward"] == rewards.mean()
            assert row[part]["masks_sha256"] == storage.sha256(run / f"masks-{part}.npy")
            stored = np.unpackbits(storage.read_array(run / f"masks-{part}.npy"), axis=1, count=problem.gates)
            np.testing.assert_array_equal(stored, masks)
            best = problem.best_rewards(np.arange(len(problem))).mean()
            assert row[part]["regret"] == pytest.approx(best - row[part]["reward"])
            scale = max(row[part]["reference"] - row[part]["static"], 1e-6)
            score = (row[part]["reward"] - row[part]["static"]) / scale
            assert row[part]["normalized_score"] == pytest.approx(score)
        if row["agent"] == "static":
            assert row["seen"]["normalized_score"] == row["unseen"]["normalized_score"] == 0


def test_users_average_to_the_row(comparison: Path) -> None:
    users = pd.read_parquet(comparison / "users.parquet")
    for path in cells(comparison).values():
        row = read_row(path)
        own = users[(users["agent"] == row["agent"]) & (users["seed"] == row["seed"])]
        for part in ("unseen", "seen"):
            measured = own[own["part"] == part]
            assert (len(measured), measured["inputs"].sum()) == (row[part]["users"], row[part]["inputs"])
            for name in ("reward", "static", "reference"):
                assert np.average(measured[name], weights=measured["inputs"]) == pytest.approx(row[part][name])


def test_the_command_of_a_row_trains_it_anew(comparison: Path, tmp_path: Path) -> None:
    run = cells(comparison)[f"{ENV}/rloo/seed1"].parent
    words = shlex.split(read_row(run)["command"])
    assert words[:2] == ["dsa-gym", "train"]
    assert main([*words[1:], "--logdir", str(tmp_path)]) == 0
    again = tmp_path / f"{ENV}-rloo-seed1" / "agent.safetensors"
    assert again.read_bytes() == (run / "agent.safetensors").read_bytes()


def test_a_command_names_what_differs() -> None:
    config = TrainConfig(
        env="DSA-Planted-v0", agent="rloo", seed=3, settings={"masks": 4}, env_settings={"gates": 16, "noise": 0.5}
    )
    assert command(config) == (
        "dsa-gym train --env DSA-Planted-v0 --agent rloo --seed 3 --set masks=4 --env-set gates=16 noise=0.5"
    )


def test_finished_cells_are_not_repeated(small_grid: Grid, copied: Path, no_cells: list[Task]) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.glob("cells/*/*/*/*")}
    assert len(before) >= 28
    assert compare(small_grid, copied) == {}
    assert no_cells == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_grid_may_grow(small_grid: Grid, copied: Path, no_cells: list[Task]) -> None:
    compare(replace(small_grid, seeds=3, agents={**small_grid.agents, "all": {}}), copied)
    added = {str(task.folder.relative_to(copied / "cells" / ENV)) for task in no_cells}
    assert added == {"rloo/seed2", "static/seed2", "all/seed0", "all/seed1", "all/seed2"}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system gives a process all cores")
@pytest.mark.parametrize(("workers", "threads"), [(None, 1), (1, 3), (2, 1)])
def test_cells_share_the_cores_that_the_process_may_use(
    small_grid: Grid, copied: Path, no_cells: list[Task], monkeypatch: pytest.MonkeyPatch, workers: Any, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 5})
    compare(replace(small_grid, seeds=3), copied, workers=workers)
    assert [task.threads for task in no_cells] == [threads, threads]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda grid: {"seeds": 1}, "seeds"),
        (lambda grid: {"agents": {"rloo": grid.agents["rloo"]}}, "agents 'static'"),
        (lambda grid: {"agents": {**grid.agents, "rloo": {"masks": 8}}}, "agents 'rloo'"),
        (lambda grid: {"options": {**grid.options, "steps": 512}}, "steps"),
        (lambda grid: {"envs": {ENV: {}}}, f"envs '{ENV}'"),
    ],
)
def test_another_grid_is_refused(
    small_grid: Grid, copied: Path, no_cells: list[Task], change: Callable[[Grid], dict[str, Any]], what: str
) -> None:
    with pytest.raises(ValueError, match=f"holds another grid, which differs in {what}"):
        compare(replace(small_grid, **change(small_grid)), copied)
    assert no_cells == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"envs": {}}, "env, agent: expected one or more"),
        ({"seeds": 0}, "seeds=0: expected a positive number"),
        ({"agents": {"rlo": {}}}, "agent='rlo'.*did you mean 'rloo'"),
        ({"envs": {"DSA-Tex-v0": {}}}, "env='DSA-Tex-v0'"),
        ({"options": {"steps": 0}}, "steps=0"),
    ],
)
def test_bad_grids(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**{"envs": {ENV: {}}, "agents": {"rloo": {}}, "seeds": 1, **arguments})


@pytest.mark.parametrize(("arguments", "message"), [({"engine": "dask"}, "engine='dask': expected one of local, ray"),
                                                    ({"workers": 0}, "workers=0")])  # fmt: skip
def test_bad_arguments(small_grid: Grid, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(small_grid, tmp_path, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "DSA-Text-v0=x"], r"--bundle 'DSA-Text-v0=x': expected one of DSA-TextTable-v0"),
        (["--set", "ppo.epochs=1"], "--set 'ppo.epochs=1': expected one of rloo"),
        (["--set", "rloo.epoch=1"], "--set: unknown setting 'epoch'"),
        (["--set", "rloo"], "--set 'rloo': expected one of rloo"),
        (["--env-set", f"{ENV}.gates=1"], "env_settings: DSA-TextTable-v0 takes no 'gates'"),
        (["--granularity", "layer"], "granularity='layer': DSA-TextTable-v0 takes no granularity"),
        (["--agent", "rlo"], "did you mean 'rloo'"),
    ],
)
def test_bad_command_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = ["compare", "--env", ENV, "--agent", "rloo", "--seeds", "1", "--steps", "8", "--out", str(tmp_path / "out")]
    assert main([*given, *arguments]) in (1, 2)
    assert message in capfd.readouterr().err
    assert not list(tmp_path.glob("out/cells/*/*/*/row.json"))


def test_two_comparisons_of_one_folder(small_grid: Grid, copied: Path, no_cells: list[Task]) -> None:
    with storage.locked(copied), pytest.raises(ValueError, match="another process is at work there"):
        compare(small_grid, copied)
    assert compare(small_grid, copied) == {}


def test_a_cell_that_fails_does_not_stop_the_others(
    bundle_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A rate at which the weights overflow: the cell is failed, is not tried again unasked, and the report says so."""
    arguments = ["compare", "--env", ENV, "--bundle", f"{ENV}={bundle_folder}", "--agent", "rloo", "none"]
    arguments += ["--seeds", "1", "--steps", "256", "--num-envs", "4", "--out", str(tmp_path)]
    arguments += ["--set", "rloo.learning_rate=1e30", "rloo.batch_size=8"]
    assert main(arguments) == 1
    errors = capfd.readouterr().err
    assert f"failed: {ENV}/rloo/seed0: FloatingPointError" in errors
    assert "--retry-failed" in errors
    assert set(cells(tmp_path)) == {f"{ENV}/none/seed0"}
    traceback = tmp_path / "cells" / ENV / "rloo" / "seed0" / "error.txt"
    assert "Traceback" in traceback.read_text(encoding="utf-8")
    assert "FloatingPointError" in (tmp_path / "report.md").read_text(encoding="utf-8")
    before = traceback.stat().st_mtime_ns
    assert main(arguments) == 1
    assert traceback.stat().st_mtime_ns == before
    assert main([*arguments, "--retry-failed"]) == 1
    assert traceback.stat().st_mtime_ns != before


def test_a_cell_whose_process_dies_is_failed(small_grid: Grid, tmp_path: Path) -> None:
    (folder, config), *_ = small_grid.cells(tmp_path).items()
    engine = local([Task(folder, replace(config, steps=10_000_000), 1)], 1)
    assert next(engine) is None
    (child,) = multiprocessing.active_children()
    child.kill()
    outcomes = [outcome for outcome in engine if outcome is not None]
    assert [(task.folder, error) for task, error in outcomes] == [
        (folder, "the cell crashed: its process ended with SIGKILL")
    ]
    assert (folder / "error.txt").is_file()


def fill(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_no_failure_of_the_cell(
    small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train_in", fill)
    (folder, config), *_ = small_grid.cells(tmp_path).items()
    with pytest.raises(OSError, match="the disk is full; make room"):
        run_cell(Task(folder, config, 1))
    assert not (folder / "error.txt").exists()

    def full_engine(tasks: Any, workers: int) -> Any:
        yield tasks[0], run_cell(tasks[0])

    monkeypatch.setitem(ENGINES, "local", full_engine)
    with pytest.raises(OSError, match="the disk is full; make room"):
        compare(small_grid, tmp_path)
    assert not list(tmp_path.glob("**/.tmp-*"))
    assert (tmp_path / "rows.parquet").is_file()


def test_what_a_full_disk_looks_like() -> None:
    nested = ValueError("cannot write")
    nested.__cause__ = OSError(errno.EDQUOT, "quota")
    assert disk_is_full(nested)
    assert disk_is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not disk_is_full(OSError(errno.EACCES, "permission"))


def test_a_damaged_row_is_named(small_grid: Grid, copied: Path) -> None:
    path = cells(copied)[f"{ENV}/rloo/seed0"]
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"seed0/row\.json"):
        compare(small_grid, copied)


def test_ray_missing(small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'dsa-gym\[ray\]'"):
        compare(small_grid, tmp_path, engine="ray")


def start(out: Path, bundle: Path, *arguments: str) -> subprocess.Popen[bytes]:
    given = ["--env", ENV, "--bundle", f"{ENV}={bundle}", "--agent", "rloo", "static", "--seeds", "2", "--workers", "2"]
    sizes = ["--steps", "4096", "--evaluate-every", "128", "--num-envs", "4"]
    sizes += ["--set", "rloo.batch_size=8", "rloo.masks=4", "rloo.hidden=[8]"]
    line = [sys.executable, "-m", "dsa_gym.experiments.cli", "compare", *given, *sizes, "--out", str(out), *arguments]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.02)


def ended(out: Path) -> bool:
    """Whether no process works on a cell."""
    for folder in out.glob("cells/*/*/*"):
        try:
            with storage.locked(folder):
                pass
        except ValueError:
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_continued(bundle_folder: Path, tmp_path: Path, with_signal: signal.Signals) -> None:
    """The comparison is killed when two cells are finished and others half-way; its cells end with it."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    process = start(out, bundle_folder)

    def half_way() -> bool:
        saved = out.glob("cells/*/rloo/*/agent.json")
        return any(128 <= json.loads(path.read_text())["steps"] < 4096 for path in saved)

    until(half_way, process)
    process.send_signal(with_signal)
    process.wait()
    assert process.returncode == (-signal.SIGKILL if with_signal == signal.SIGKILL else 130)
    limit = time.monotonic() + 60
    while not ended(out):
        assert time.monotonic() < limit, "a cell outlived its comparison"
        time.sleep(0.05)
    done = {path: path.read_bytes() for path in cells(out).values()}
    assert len(done) < 4
    for folder in (out, whole):
        assert start(folder, bundle_folder).wait() == 0
    assert {path: path.read_bytes() for path in done} == done
    same_rows(whole, out)
    for name, path in cells(whole).items():
        files = [folder / "cells" / name / "agent.safetensors" for folder in (whole, out)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert len(pd.read_csv(path.parent / "curve.csv")) == len(pd.read_csv(files[1].parent / "curve.csv"))


@pytest.mark.slow
def test_ray_gives_the_same_rows(comparison: Path, bundle_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: what Ray leaves behind in one must not meet other tests."""
    arguments = ["--steps", "256", "--evaluate-every", "128", "--engine", "ray"]
    assert start(tmp_path, bundle_folder, *arguments).wait() == 0
    same_rows(comparison, tmp_path)
