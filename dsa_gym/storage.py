"""Safe files: atomic writes, readable errors, no pickle.

Everything that dsa-gym leaves on disk (bundles, user stores, checkpoints, reports) goes through these
functions, so a process that is killed in the middle of a write leaves the old file or none, never half of
one. Formats are JSON for records, safetensors for tensors and NPY for arrays: none of them can run code
when it is opened.

A missing file is a `FileNotFoundError`; one that is there but cannot be understood is a `ValueError` that
names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = [
    "atomic_path",
    "checksums",
    "is_temporary",
    "load_optimizer_tensors",
    "locked",
    "optimizer_tensors",
    "read_array",
    "read_json",
    "read_metadata",
    "read_tensors",
    "sha256",
    "versions",
    "write_array",
    "write_json",
    "write_tensors",
    "write_text",
]

TEMPORARY_PREFIX = ".tmp-"
"""Start of the name of every file that is still being written, see `is_temporary`."""

_PACKAGES = ("torch", "transformers", "gymnasium", "stable-baselines3", "numpy", "dsa-gym")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that becomes `path` if the block ends without an exception.

    The temporary file lies in the same folder because a rename is only atomic within one file system. Missing
    parent folders are created.

    Args:
        path: the file to write or to replace.

    Yields:
        A path that does not exist yet, with the suffix of `path`; the block must create a file there.

    Raises:
        FileNotFoundError: the block ended well but wrote nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkstemp: it creates the file with mode 0600, which would survive the rename.
    temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{path.suffix}"
    try:
        yield temporary
        if not temporary.is_file():
            raise FileNotFoundError(f"nothing was written for {path}: create a file at the path that is given")
        _sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        # After the rename there is nothing left to remove.
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes out of a folder (those that ask) while the block runs; the folder is made if it is missing.

    The operating system gives the lock back when the process ends, however it ends.

    Args:
        folder: what is locked.
        patience: seconds to wait for another process to give it back.

    Raises:
        ValueError: another process has it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise ValueError(f"{folder}: another process is at work there; let it end or give another folder") from error
    try:
        yield
    finally:
        lock.release()


def is_temporary(name: str) -> bool:
    """Whether a file of this name is being written, or was when its process was killed.

    safetensors has temporary files of its own beside ours, `.tmp` and six letters.
    """
    return name.startswith(".tmp")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON, atomically.

    NumPy scalars and paths are accepted. NaN and infinities are not: they are no JSON, and other readers
    refuse them.

    Raises:
        ValueError: `obj` holds something that JSON cannot say.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
        data = (text + "\n").encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot write {path} as JSON: {error}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 or not JSON; the message has the file and the line.
    """
    _require_file(path)
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically. They may be on any device, strided, or share storage.

    Args:
        path: file to write.
        tensors: tensors by name.
        metadata: strings kept in the header; see `read_metadata`.

    Raises:
        TypeError: a value is not a tensor.
        ValueError: safetensors cannot hold a tensor, or the metadata are not strings.
    """
    if not all(isinstance(text, str) for item in (metadata or {}).items() for text in item):
        raise ValueError(f"metadata of {path} must map strings to strings, got {dict(metadata or {})!r}")
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} for {path} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise ValueError(f"cannot write {path} as safetensors: {name!r} is {tensor.layout}, make it dense")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses two names for one storage (tied weights); on disk they are two tensors.
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with atomic_path(path) as temporary:
        try:
            save_file(plain, str(temporary), metadata=dict(metadata) if metadata else None)
        except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"cannot write {path} as safetensors: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or is no safetensors file.
    """
    _require_file(path)
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read {path} as safetensors: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Read the strings kept in the header of a safetensors file; empty if there are none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or is no safetensors file.
    """
    _require_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as safetensors: {error}") from error


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as NPY, atomically.

    Raises:
        ValueError: the array holds Python objects, which only pickle could store.
    """
    if array.dtype.hasobject:
        raise ValueError(f"cannot write {path}: dtype {array.dtype} needs pickle, use numbers or fixed-width strings")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path, mmap: bool = False) -> np.ndarray:
    """Read an NPY file.

    Args:
        path: file to read.
        mmap: leave the data on disk and map it read-only, for arrays that are read in parts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is no NPY file or holds pickled objects.
    """
    _require_file(path)
    try:
        # Not np.load: it would also open NPZ archives and pickles.
        if mmap:
            return np.lib.format.open_memmap(path, mode="r")
        with Path(path).open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"cannot read {path} as NPY: {error}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat tensors ``optimizer.INDEX.KEY``, for :func:`write_tensors`."""
    return {
        f"optimizer.{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over what :func:`optimizer_tensors` returned; other names are passed over."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits.

    Raises:
        FileNotFoundError: there is no such file.
    """
    _require_file(path)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of files by their name, by their whole path where several have the same name.

    That of a folder is the digest of its files' paths and checksums.
    """
    names = [Path(path).name for path in paths]
    return {
        name if names.count(name) == 1 else str(path): _folder_sha256(Path(path))
        if Path(path).is_dir()
        else sha256(Path(path))
        for name, path in zip(names, paths, strict=True)
    }


def _folder_sha256(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\n".encode() for path in files)


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of bytes that come in parts, as 64 hexadecimal digits."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib_metadata.version(package)
        except importlib_metadata.PackageNotFoundError:
            continue
    return found


def _require_file(path: Path) -> None:
    """Say that a file is missing, or a folder, before a library says it in its own words."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")


def _plain(value: Any) -> Any:
    """What JSON can say for a NumPy scalar or a path; called by `json` for types that it does not know."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _sync(path: Path) -> None:
    """Push a file's data to the disk, or a crash after the rename could leave an empty file in its place."""
    # Open for writing: Windows refuses to flush a descriptor that is read-only.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Push a rename to the disk. Only POSIX can open a folder for that; elsewhere renames are journalled."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
