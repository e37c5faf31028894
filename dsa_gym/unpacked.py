"""The sparse changes of very many users, decoded once and memory-mapped.

The records of the user store are coded close to their entropy; decoding 64 of them takes as long as the step that needs
them. Where the users' parameters do not fit into memory, this keeps the decoded changes in two files, so that a step
costs the same whatever the number of users, and the memory that it takes is the page cache's to take back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dsa_gym import storage
from dsa_gym.user_store import UserStore

_ENTRY = np.dtype([("index", "<i4"), ("value", "<f4")])


class UnpackedChanges:
    """``delta_u`` of all users, in the order of the bundle.

    Attributes:
        ends: Where each user's entries end, int64 (users + 1,), the first 0.
        entries: Memory-mapped pairs of position and value, of all users one after the other.
    """

    def __init__(self, ends: NDArray[np.int64], entries: NDArray[np.void]) -> None:
        """Wrap what :meth:`open` has read."""
        self.ends, self.entries = ends, entries

    @classmethod
    def open(cls, folder: Path, store: UserStore, users: Sequence[str], checksum: str) -> UnpackedChanges:
        """Read the files of a bundle with this checksum, or write them first, with a progress bar.

        Args:
            folder: Where they are.
            store: The users' records.
            users: Names in the order of the bundle.
            checksum: Of the bundle.

        Raises:
            OSError: If they are not there and cannot be written.
        """
        entries, ends = (folder / f"{checksum[:32]}.{suffix}" for suffix in ("entries", "npy"))
        if not ends.is_file():  # the last that is written
            counts = [0]
            with storage.atomic_path(entries) as temporary, temporary.open("wb") as file:
                for user in tqdm(users, desc="unpack users", unit="user"):
                    change = store.read(user)
                    rows = np.empty(len(change.indices), _ENTRY)
                    rows["index"], rows["value"] = change.indices.numpy(), change.values.numpy()
                    rows.tofile(file)
                    counts.append(len(rows))
            storage.write_array(ends, np.cumsum(counts))
        places = storage.read_array(ends)
        empty = np.zeros(0, _ENTRY)  # nothing can be mapped of an empty file
        return cls(places, np.memmap(entries, _ENTRY, mode="r") if places[-1] else empty)

    def add_to(self, phi: Tensor, users: Tensor) -> Tensor:
        """``phi + delta_u`` for flat parameters (P,) of users, int64 (n,): float32 (n, P)."""
        rows = phi.expand(len(users), -1).clone()
        changes = [self.entries[self.ends[user] : self.ends[user + 1]] for user in users.tolist()]
        begins = np.repeat(np.arange(len(users)) * len(phi), [len(change) for change in changes])
        entries = np.concatenate(changes)
        flat = rows.view(-1).numpy()  # the same memory
        flat[begins + entries["index"]] += entries["value"]
        return rows
