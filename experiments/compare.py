"""Comparison of agents: every agent on every environment with every seed, each cell of the grid in its own process.

The folder of a comparison holds ``grid.json``, a run per cell in ``cells/ENV/AGENT/seedN`` and, gathered from them,
``rows.parquet``, ``rows.csv`` and ``users.parquet``. A cell is finished when it has its ``row.json`` and failed when it
has an ``error.txt``; one that has neither goes on from its last checkpoint when the comparison is started again.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsa_gym import storage
from dsa_gym.experiments.rows import write_row, write_rows
from dsa_gym.experiments.train import TrainConfig, train_in
from dsa_gym.problem import Bits
from dsa_gym.search import best_static

FULL_DISK = 74
"""Exit code of a cell that could not write; it has not failed, the comparison stops."""


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        envs: Environment id to what differs there of the configuration: ``bundle``, ``env_settings``.
        agents: Agent to its settings that differ from the tuned ones.
        seeds: Number of seeds, counted from 0.
        options: What all cells have in common of :class:`dsa_gym.experiments.train.TrainConfig`.
        steps: Agent to its environment steps where they are not those of ``options``: a step through the model's
            gradient costs many times a looked-up one.
    """

    envs: Mapping[str, Mapping[str, Any]]
    agents: Mapping[str, Mapping[str, Any]]
    seeds: int
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every cell's configuration.

        Raises:
            ValueError: If one is wrong, or nothing is compared.
        """
        if not self.envs or not self.agents:
            raise ValueError("env, agent: expected one or more of each")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: expected a positive number")
        self.cells(Path())

    def cells(self, out: Path) -> dict[Path, TrainConfig]:
        """Folder and configuration of every cell, seed by seed, so that an early look has all agents."""
        return {
            out / "cells" / env / agent / f"seed{seed}": TrainConfig(
                env=env,
                agent=agent,
                seed=seed,
                settings=dict(settings),
                **differs,
                **{**self.options, **({"steps": self.steps[agent]} if agent in self.steps else {})},
            )
            for seed in range(self.seeds)
            for env, differs in self.envs.items()
            for agent, settings in self.agents.items()
        }

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {
            "envs": self.envs,
            "agents": self.agents,
            "seeds": self.seeds,
            "options": self.options,
            "steps": self.steps,
        }
        record: dict[str, Any] = json.loads(json.dumps(values))
        return record


@dataclass(frozen=True)
class Task:
    """A cell to run: its folder, its configuration, and the threads that it may use."""

    folder: Path
    config: TrainConfig
    threads: int


def _cores() -> int:
    """Cores that this process may use, which a container or ``taskset`` can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Outcomes = Generator[tuple[Task, str | None] | None, None, None]
"""Tasks as they end, each with its error or None; in between None, now and then."""


def compare(
    grid: Grid, out: Path, *, engine: str = "local", workers: int | None = None, retry_failed: bool = False
) -> dict[str, str]:
    """Run the cells that are not finished, and gather all rows.

    Args:
        grid: What is compared; one that was begun in ``out`` may grow, but not change.
        out: The comparison's folder; with Ray one that all its nodes see.
        engine: A key of :data:`ENGINES`.
        workers: Cells at a time; None for one per core. A cell has the cores over the workers as threads.
        retry_failed: Whether failed cells are tried again.

    Returns:
        Failed cells, as ``ENV/AGENT/seedN``, with their error.

    Raises:
        ValueError: If another process works in ``out``, it holds another grid, or an argument is wrong.
        OSError: If the disk is full. The same call goes on when it no longer is.
        ImportError: If the engine's library is missing.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: expected one of {', '.join(ENGINES)}")
    cores = _cores()
    workers = cores if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers={workers}: expected a positive number")
    out = Path(out).resolve()
    with storage.locked(out):
        _claim(out, grid)
        cells = grid.cells(out)
        if retry_failed:
            for folder in cells:
                (folder / "error.txt").unlink(missing_ok=True)
        open_cells = [folder for folder in cells if not (folder / "row.json").is_file()]
        tasks = [
            Task(folder, cells[folder], max(1, cores // workers))
            for folder in open_cells
            if not (folder / "error.txt").is_file()
        ]
        try:
            with closing(ENGINES[engine](tasks, workers)) as outcomes:  # ends what runs, whatever happens
                _follow(outcomes, cells, tasks)
        finally:
            write_rows(out, [folder for folder in cells if (folder / "row.json").is_file()])
        failed = [folder for folder in cells if (folder / "error.txt").is_file()]
        return {str(folder.relative_to(out / "cells")): last_line(folder / "error.txt") for folder in failed}


def last_line(path: Path) -> str:
    """The last line of a traceback: the error itself."""
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else "unknown error"


def _claim(out: Path, grid: Grid) -> None:
    """Write ``grid.json``, or check that the grid there is part of this one.

    Raises:
        ValueError: If it is not; the message says what differs.
    """
    path, asked = out / "grid.json", grid.record()
    if path.is_file():
        known = storage.read_json(path)
        options = sorted({**known["options"], **asked["options"]})
        differ = [name for name in options if known["options"].get(name) != asked["options"].get(name)]
        differ += [
            f"{kind} {name!r}"
            for kind in ("envs", "agents", "steps")
            for name, value in known[kind].items()
            if asked[kind].get(name) != value
        ]
        differ += ["seeds"] if known["seeds"] > asked["seeds"] else []
        if differ:
            raise ValueError(
                f"out={str(out)!r}: holds another grid, which differs in {', '.join(differ)}; a grid may only grow by "
                "agents, environments and seeds; give the rest as it was, or a new folder"
            )
    storage.write_json(path, asked)


def _follow(outcomes: Outcomes, cells: Mapping[Path, TrainConfig], tasks: Sequence[Task]) -> None:
    """Show how far the cells are, in environment steps."""
    total, begun = sum(task.config.steps for task in tasks), sum(map(_steps, tasks))
    ended, failed, counted = len(cells) - len(tasks), 0, 0
    running = {task.folder: task for task in tasks}
    with tqdm(total=total, initial=begun, unit="step", unit_scale=True, desc="compare") as bar:
        for outcome in outcomes:
            if outcome is not None:
                task, error = outcome
                del running[task.folder]
                ended, failed, counted = ended + 1, failed + (error is not None), counted + task.config.steps
                if error is not None:
                    bar.write(f"failed: {'/'.join(task.folder.parts[-3:])}: {error}", file=sys.stderr)
            bar.set_postfix_str(f"{ended}/{len(cells)} cells" + (f", {failed} failed" if failed else ""), refresh=False)
            bar.update(counted + sum(_steps(task) for task in running.values()) - bar.n)


def _steps(task: Task) -> int:
    """Steps of a cell's last checkpoint."""
    path = task.folder / "agent.json"
    return min(int(storage.read_json(path)["steps"]), task.config.steps) if path.is_file() else 0


def run_cell(task: Task) -> str | None:
    """Train and judge one cell; what it prints goes to ``log.txt``.

    Returns:
        None, or the error of a failed cell, whose traceback is in ``error.txt``.

    Raises:
        OSError: If the disk is full.
    """
    torch.set_num_threads(task.threads)
    folder = task.folder
    # a cell whose comparison was killed ends within the second
    with (
        storage.locked(folder, patience=30),
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        try:
            static = static_mask(task.config, folder.parents[3] / "static")
            train_in(folder, task.config, static=static)
            write_row(folder, static)
        except Exception as error:
            if disk_is_full(error):
                raise full_disk(task) from error
            storage.write_text(folder / "error.txt", traceback.format_exc())
            return f"{type(error).__name__}: {error}"
    return None


def static_mask(config: TrainConfig, known: Path | None = None) -> Bits:
    """The best static mask of a configuration's environment (G,).

    Args:
        config: The cell.
        known: Folder of those that were found already, which one search per environment fills.
    """
    train = config.problem("train")
    if known is None:
        return best_static(train)
    about = [config.env, config.env_arguments, train.fingerprint]
    path = known / f"{storage.digest([json.dumps(about, sort_keys=True).encode()])[:16]}.npy"
    if not path.is_file():
        storage.write_array(path, best_static(train))
    return storage.read_array(path)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that of a full disk or a used-up quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # libraries have exceptions of their own
            return True
        error = error.__cause__ or error.__context__
    return False


def local(tasks: Sequence[Task], workers: int) -> Outcomes:
    """Run cells in processes of this machine, each in its own."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["dsa_gym.experiments.compare"])  # imports are paid for once
    waiting = list(tasks)
    running: dict[Any, tuple[Any, Task]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task = waiting.pop(0)
                process = context.Process(target=_child, args=(task,), daemon=True)
                process.start()
                running[process.sentinel] = (process, task)
            for sentinel in wait(list(running), timeout=1):
                process, task = running.pop(sentinel)
                process.join()
                yield task, _outcome(task, process.exitcode)
            yield None
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def _child(task: Task) -> None:
    """A cell's process: it ends with the comparison, which alone is interrupted from the keyboard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        error = run_cell(task)
    except OSError as full:
        if not disk_is_full(full):
            raise
        sys.exit(FULL_DISK)
    sys.exit(0 if error is None else 1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _outcome(task: Task, code: int) -> str | None:
    """What became of a cell whose process ended.

    Raises:
        OSError: If the disk is full.
    """
    if code == 0:
        return None
    if code == FULL_DISK:
        raise full_disk(task)
    path = task.folder / "error.txt"
    if not path.is_file():
        _crashed(task, f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")
    return last_line(path)


def _crashed(task: Task, how: str) -> None:
    log = task.folder / "log.txt"
    tail = log.read_text(encoding="utf-8", errors="replace")[-4000:] if log.is_file() else ""
    storage.write_text(task.folder / "error.txt", f"{tail}\nthe cell crashed: {how}\n".lstrip())


def full_disk(task: Task) -> OSError:
    """The error of a full disk, in words that help."""
    return OSError(
        errno.ENOSPC, "the disk is full; make room, the same command goes on where it stopped", str(task.folder)
    )


def on_ray(tasks: Sequence[Task], workers: int) -> Outcomes:
    """Run cells as tasks of the Ray cluster of ``RAY_ADDRESS``, or of a local one with ``workers`` CPUs.

    Raises:
        ImportError: If Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray: pip install 'dsa-gym[ray]'") from error
    address = os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
    ray.init(log_to_driver=False, **settings)
    # A process per cell, as on this machine: what a cell leaves behind meets no other.
    remote = ray.remote(num_cpus=1, max_calls=1, max_retries=0)(run_cell)
    pending = {remote.remote(task): task for task in tasks}
    try:
        while pending:
            for ready in ray.wait(list(pending), timeout=1)[0]:
                task = pending.pop(ready)
                yield task, _result(ray, ready, task)
            yield None
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
        ray.shutdown()


def _result(ray: Any, reference: Any, task: Task) -> str | None:
    """What became of a cell's task.

    Raises:
        OSError: If the disk is full.
    """
    try:
        error: str | None = ray.get(reference)
        return error
    except ray.exceptions.RayError as failure:
        if disk_is_full(failure):
            raise full_disk(task) from failure
        _crashed(task, str(failure))
        return last_line(task.folder / "error.txt")


ENGINES: dict[str, Callable[[Sequence[Task], int], Outcomes]] = {"local": local, "ray": on_ray}
"""Where cells run."""
