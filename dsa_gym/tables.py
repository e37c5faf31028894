"""Tables of losses under all masks, built input by input; a killed build goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dsa_gym import storage
from dsa_gym.model import all_gates
from dsa_gym.problem import GatingProblem

MOST_GATES = 16
"""A table has 2^G columns."""


def build_table(problem: GatingProblem, out: Path, *, key: dict[str, Any], every: int = 16) -> Path:
    """Write ``SPLIT.npy``, the losses of a problem's inputs under all masks, float32 (n, 2^G), gate i being bit i.

    Args:
        problem: The inputs and the gates.
        out: Folder; ``SPLIT.json`` beside the table says what it is of, and its checksum.
        key: What the losses depend on, for the record; a folder that holds another table is refused.
        every: Inputs between the marks at which a killed build continues.

    Returns:
        The table's file.

    Raises:
        ValueError: If there are more than 16 gates, or ``out`` holds another table of this split.
        FloatingPointError: If a loss is not finite.
    """
    if problem.gates > MOST_GATES:
        kind = problem.space.granularity
        raise ValueError(f"granularity={kind!r}: {problem.gates} gates, expected at most {MOST_GATES}")
    final, record = out / f"{problem.split}.npy", out / f"{problem.split}.json"
    partial = out / f"{problem.split}.partial.npy"
    masks = all_gates(problem.space).numpy()
    shape = (len(problem), len(masks))
    about = {**key, "split": problem.split, "granularity": problem.space.granularity, "shape": list(shape)}
    state: dict[str, Any] = storage.read_json(record) if record.is_file() else {"about": about, "done": 0}
    if state["about"] != about:
        raise ValueError(f"out={str(out)!r}: holds a table of something else; give a new folder")
    if final.is_file() and "sha256" in state:
        return final
    out.mkdir(parents=True, exist_ok=True)
    if not partial.is_file():
        state["done"] = 0
        storage.write_json(record, state)
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape).flush()
    table: NDArray[np.float32] = np.lib.format.open_memmap(partial, mode="r+")
    bar = tqdm(total=len(problem), initial=state["done"], desc=f"table {problem.split}", unit="input")
    while state["done"] < len(problem):
        rows = np.arange(state["done"], min(state["done"] + every, len(problem)))
        for row in rows:
            losses = problem.compute_losses(np.full(len(masks), row), masks)
            if not np.isfinite(losses).all():
                raise FloatingPointError(f"losses of input {row} are not finite")
            table[row] = losses
            bar.update()
        table.flush()  # type: ignore[attr-defined]
        state["done"] = int(rows[-1]) + 1
        storage.write_json(record, state)
    bar.close()
    del table
    partial.replace(final)
    state |= {"sha256": storage.sha256(final), "versions": storage.versions()}
    storage.write_json(record, state)
    return final


def table_record(folder: Path, split: str) -> dict[str, Any]:
    """What a finished table is of (``about``), its checksum and the versions that built it; the table is not read.

    Raises:
        ValueError: If it is missing or unfinished.
    """
    final, record = folder / f"{split}.npy", folder / f"{split}.json"
    state: dict[str, Any] = storage.read_json(record) if record.is_file() else {}
    if not final.is_file() or "sha256" not in state:
        raise ValueError(f"table={str(folder)!r}: no finished table of split {split!r}; build it with 'dsa-gym table'")
    return state


def read_table(folder: Path, split: str) -> NDArray[np.float32]:
    """A finished table, memory-mapped.

    Raises:
        ValueError: If it is missing, unfinished or damaged.
    """
    record, final = table_record(folder, split), folder / f"{split}.npy"
    if storage.sha256(final) != record["sha256"]:
        raise ValueError(f"table={str(final)!r}: is damaged, its checksum is another; build it again")
    return storage.read_array(final, mmap=True)
