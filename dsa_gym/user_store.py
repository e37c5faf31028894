"""The compact record per user: the user's own sparse change and embedding, one small file each.

A user owns `phi_u = phi_meta + delta_u` with `||delta_u||_0 <= k`. Only `delta_u` is stored, and its size
on disk is what the whole method is judged by, so a record is coded close to its entropy:

* the **indices** as gaps (varints of the distance to the previous index) or as a bitmap, each plain or
  deflated, whichever is smallest; lossless;
* the **values** as `int8` with one bfloat16 scale per block of consecutive stored values, or as `float16`,
  each plain or deflated, whichever is smaller;
* the **embedding** as `float16`.

The file is a safetensors file, so any other tool can open it; its metadata name the codings. A checksum
covers every byte of it. There is no index beside the records: a file's name says whose it is (see
`file_name`), so nothing can get out of step, and a writer that is killed costs at most the record it was
writing.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from dsa_gym.storage import atomic_path, is_temporary, read_json, write_json

__all__ = ["UserAdapter", "UserStore", "file_name"]

Values = Literal["float16", "int8"]

FORMAT_VERSION = 1
STORE_FILE = "store.json"
RECORDS_FOLDER = "users"

_SUFFIX = ".safetensors"
# 255 bytes is what most file systems allow for a name; this leaves room for the prefix and the suffix.
_LONGEST_ENCODED = 200
_SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-")
_METADATA_KEY = "dsa-gym"
_CHECKSUM_DIGITS = 32
_NO_CHECKSUM = "0" * _CHECKSUM_DIGITS
_LARGEST_INT8 = 127
# A scale below the smallest normal number would lose bits, one above this would decode 127 to infinity.
_SMALLEST_SCALE = 2.0**-126
_LARGEST_SCALE = 129 * 2.0**114  # largest bfloat16 not above float32's maximum / 127


@dataclass(frozen=True, eq=False)
class UserAdapter:
    """A user's sparse change `delta_u` to the shared adapter parameters, and the user's embedding.

    Attributes:
        size: P, length of the flat vector that is changed.
        indices: positions that are changed, int64 `(n,)`, strictly increasing, `0 <= index < P`.
        values: the change at these positions, float32 `(n,)`. A value may be 0: its index is stored all the
            same.
        embedding: the user's embedding, float32 `(e,)`.
    """

    size: int
    indices: Tensor
    values: Tensor
    embedding: Tensor

    def __post_init__(self) -> None:
        """Check shapes, dtypes and the order of the indices."""
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        expected = {"indices": torch.int64, "values": torch.float32, "embedding": torch.float32}
        for name, dtype in expected.items():
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.ndim != 1:
                raise ValueError(
                    f"{name} must be {dtype} of shape (n,), got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        if len(self.indices) != len(self.values):
            raise ValueError(f"got {len(self.indices)} indices but {len(self.values)} values")
        if len(self.indices) == 0:
            return
        if bool((self.indices.diff() <= 0).any()):
            raise ValueError("indices must be strictly increasing")
        first, last = int(self.indices[0]), int(self.indices[-1])
        if first < 0 or last >= self.size:
            raise ValueError(f"indices must lie in [0, {self.size}), got {first} to {last}")

    @classmethod
    def from_dense(cls, delta: Tensor, embedding: Tensor) -> UserAdapter:
        """Keep what is not zero of a flat change.

        Args:
            delta: change `(P,)`, any floating dtype and device.
            embedding: embedding `(e,)`.
        """
        if delta.ndim != 1:
            raise ValueError(f"delta must be flat, got shape {tuple(delta.shape)}")
        flat = delta.detach().to("cpu", torch.float32)
        indices = flat.nonzero().squeeze(1)  # (P,) -> (n,)
        return cls(len(flat), indices, flat[indices], embedding.detach().to("cpu", torch.float32))

    def dense(self) -> Tensor:
        """The change as a flat vector `(P,)`, float32."""
        flat = torch.zeros(self.size, dtype=torch.float32, device=self.values.device)
        flat[self.indices] = self.values
        return flat


class UserStore:
    """A folder with one record per user.

    Several processes may read, and write different users, at the same time; the last write of one user wins.

    Args:
        folder: a folder made by `UserStore.create`.

    Raises:
        FileNotFoundError: the folder is no user store.
        ValueError: its `store.json` is damaged or of another format version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._records = self.folder / RECORDS_FOLDER
        path = self.folder / STORE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder} is not a user store, it has no {STORE_FILE}: make one with UserStore.create"
            )
        settings = _check_settings(path, read_json(path))
        self.size: int = settings["size"]
        """P, the length of every user's flat change."""
        self.embedding_dim: int = settings["embedding_dim"]
        """Length of every user's embedding."""
        self.values: Values = settings["values"]
        """How values are stored."""
        self.block: int = settings["block"]
        """Consecutive stored values that share one scale (int8 only)."""

    @classmethod
    def create(
        cls, folder: Path, *, size: int, embedding_dim: int, values: Values = "int8", block: int = 256
    ) -> UserStore:
        """Make an empty store.

        Args:
            folder: where; it may exist, but must not be a store yet.
            size: P, the length of every user's flat change.
            embedding_dim: length of every user's embedding.
            values: `int8`, one byte a number and an error of at most half a step (the block's largest value
                / 254), or `float16`, two bytes a number and exact for numbers that are float16.
            block: consecutive stored values that share one scale. A small block keeps one large value from
                coarsening others; each costs two bytes.

        Raises:
            FileExistsError: there is a store in this folder.
            ValueError: a setting is out of range.
        """
        path = Path(folder) / STORE_FILE
        if path.exists():
            raise FileExistsError(f"{folder} is a user store already: open it with UserStore(folder)")
        settings = {
            "format": "dsa-gym user store",
            "version": FORMAT_VERSION,
            "size": size,
            "embedding_dim": embedding_dim,
            "values": values,
            "block": block,
        }
        _check_settings(path, settings)
        (Path(folder) / RECORDS_FOLDER).mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return cls(folder)

    def write(self, user: str, adapter: UserAdapter) -> int:
        """Store or replace a user's record, atomically.

        Returns:
            Bytes of the file.

        Raises:
            ValueError: the adapter does not fit this store, has a value that is not finite, or (float16)
                one too large; the message names the user.
        """
        data = self._encode(user, adapter)
        with atomic_path(self._path(user)) as temporary:
            temporary.write_bytes(data)
        return len(data)

    def read(self, user: str) -> UserAdapter:
        """Read a user's record.

        Raises:
            KeyError: there is no such user.
            ValueError: the file is damaged or belongs to another store or user; the message names it.
        """
        path, record, tensors = self._load(user)
        try:
            indices = _decode_indices(_bytes(tensors["indices"]), record["indices"], record["count"], self.size)
            values = _decode_values(_bytes(tensors["values"]), record["values"], tensors["scales"], self.block)
            return UserAdapter(self.size, torch.from_numpy(indices), values, tensors["embedding"].to(torch.float32))
        except (ValueError, KeyError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def read_dense(self, users: Sequence[str]) -> Tensor:
        """Changes of several users, `(len(users), P)` float32, in the order asked for."""
        dense = torch.zeros(len(users), self.size, dtype=torch.float32)
        for row, user in enumerate(users):
            adapter = self.read(user)
            dense[row, adapter.indices] = adapter.values
        return dense

    def embeddings(self, users: Sequence[str]) -> Tensor:
        """Embeddings of several users, `(len(users), e)` float32, in the order asked for."""
        rows = torch.zeros(len(users), self.embedding_dim, dtype=torch.float32)
        for row, user in enumerate(users):
            _, _, tensors = self._load(user)
            rows[row] = tensors["embedding"].to(torch.float32)
        return rows

    def users(self) -> list[str]:
        """Names of all users, sorted. Opens no file but those whose names are hashes of long user names."""
        return sorted(self._user_of(name) for name in self._names())

    def bytes(self, user: str) -> int:
        """Bytes of a user's file.

        Raises:
            KeyError: there is no such user.
        """
        try:
            return self._path(user).stat().st_size
        except FileNotFoundError:
            raise self._unknown(user) from None

    def delete(self, user: str) -> None:
        """Remove a user's record.

        Raises:
            KeyError: there is no such user.
        """
        try:
            self._path(user).unlink()
        except FileNotFoundError:
            raise self._unknown(user) from None

    def __len__(self) -> int:
        """Number of users."""
        return sum(1 for _ in self._names())

    def __contains__(self, user: object) -> bool:
        """Whether the user has a record."""
        return isinstance(user, str) and self._path(user).is_file()

    def _path(self, user: str) -> Path:
        return self._records / file_name(user)

    def _unknown(self, user: str) -> KeyError:
        return KeyError(f"no user {user!r} in {self.folder} ({len(self)} users)")

    def _names(self) -> Iterator[str]:
        """File names of all records, in no order, without the leftovers of writers that were killed."""
        with os.scandir(self._records) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX) and not is_temporary(entry.name):
                    yield entry.name

    def _user_of(self, name: str) -> str:
        """The user whose record has this file name."""
        stem = name.removesuffix(_SUFFIX)
        if stem.startswith("u-"):
            return unquote_to_bytes(stem[2:]).decode("utf-8")
        path = self._records / name
        return cast(str, _parse(path, path.read_bytes())["user"])

    def _encode(self, user: str, adapter: UserAdapter) -> builtins.bytes:
        """The bytes of a record."""
        self._check(user, adapter)
        indices, index_coding = _encode_indices(adapter.indices.cpu().numpy(), self.size)
        values, scales = _quantise(user, adapter.values.detach().cpu(), self.values, self.block)
        value_data, value_coding = _deflated(values, self.values)
        tensors = {
            "embedding": _float16(user, "embedding", adapter.embedding.detach().cpu()),
            "indices": _tensor(indices),
            "scales": scales,
            "values": _tensor(value_data),
        }
        record = {
            "checksum": _NO_CHECKSUM,
            "version": FORMAT_VERSION,
            "user": user,
            "size": self.size,
            "count": len(adapter.indices),
            "indices": index_coding,
            "values": value_coding,
        }
        return _sealed(tensors, record)

    def _check(self, user: str, adapter: UserAdapter) -> None:
        """Refuse what this store cannot hold."""
        if adapter.size != self.size:
            raise ValueError(f"user {user!r}: the adapter has size {adapter.size}, the store has {self.size}")
        if len(adapter.embedding) != self.embedding_dim:
            raise ValueError(
                f"user {user!r}: the embedding has {len(adapter.embedding)} numbers, the store has {self.embedding_dim}"
            )
        for name, tensor in (("values", adapter.values), ("embedding", adapter.embedding)):
            bad = tensor[~tensor.isfinite()]
            if len(bad):
                raise ValueError(f"user {user!r}: {name} must be finite, got {float(bad[0])}")

    def _load(self, user: str) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
        """A user's file, its record and its tensors, after all checks but those of the codings."""
        path = self._path(user)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise self._unknown(user) from None
        record = _parse(path, data)
        if record["user"] != user:
            raise ValueError(f"{path} should be the record of user {user!r} but is that of {record['user']!r}")
        if record["size"] != self.size:
            raise ValueError(f"{path} belongs to another store: its size is {record['size']}, here {self.size}")
        tensors = load_safetensors(data)
        if len(tensors["embedding"]) != self.embedding_dim:
            raise ValueError(
                f"{path} belongs to another store: its embedding has {len(tensors['embedding'])} numbers, "
                f"here {self.embedding_dim}"
            )
        return path, record, tensors


def file_name(user: str) -> str:
    """Name of a user's file. Users may be called anything.

    Short names are percent-encoded behind `u-`, so that listing a store needs no file to be opened. Capital
    letters are encoded too: there are file systems for which `Ann` and `ann` are one file. The prefix keeps
    reserved names (`con`, `..`) and empty ones away. Names that would be too long are a hash behind `h-`;
    the true one is in the record.

    Raises:
        TypeError: the name is no string.
        ValueError: the name has half of a surrogate pair, which has no UTF-8.
    """
    if not isinstance(user, str):
        raise TypeError(f"user must be a string, got {user!r} of type {type(user).__name__}")
    try:
        encoded = user.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"user {user!r} is not valid Unicode: {error.reason}") from error
    quoted = "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in encoded)
    if len(quoted) > _LONGEST_ENCODED:
        return f"h-{hashlib.sha256(encoded).hexdigest()}{_SUFFIX}"
    return f"u-{quoted}{_SUFFIX}"


def _check_settings(path: Path, settings: Any) -> dict[str, Any]:
    """The content of `store.json`, or an error that says what is wrong with it."""
    if not isinstance(settings, dict) or settings.get("format") != "dsa-gym user store":
        raise ValueError(f"{path} does not describe a dsa-gym user store")
    if settings.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {settings.get('version')}, this reads {FORMAT_VERSION}")
    for name, least in (("size", 1), ("embedding_dim", 0), ("block", 1)):
        value = settings.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{path}: {name} must be an integer of at least {least}, got {value!r}")
    if settings.get("values") not in get_args(Values):
        raise ValueError(f"{path}: values must be one of {get_args(Values)}, got {settings.get('values')!r}")
    return settings


def _sealed(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes:
    """A safetensors file with its own checksum in it.

    The checksum is that of the whole file while it reads zeros, so that it covers the header as well. All
    metadata are one JSON string: safetensors does not promise an order of several, and equal records must
    be equal bytes.
    """
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    data = save_safetensors(dict(tensors), metadata={_METADATA_KEY: text})
    return data.replace(_NO_CHECKSUM.encode(), _checksum(data).encode(), 1)


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    """The record of a file, after its checksum was found right.

    Raises:
        ValueError: the file is damaged or of another format version.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        record = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA_KEY])
        checksum = record["checksum"].encode()
        load_safetensors(data)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or no user's record: {error}") from error
    if len(checksum) != _CHECKSUM_DIGITS or _checksum(data.replace(checksum, _NO_CHECKSUM.encode(), 1)) != (
        checksum.decode()
    ):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    if record["version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {record['version']}, this reads {FORMAT_VERSION}")
    return cast(dict[str, Any], record)


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_CHECKSUM_DIGITS // 2).hexdigest()


def _deflated(data: bytes, coding: str) -> tuple[bytes, str]:
    """The data as they are or deflated, whichever is smaller, and the name of that coding."""
    packed = min((_deflate(data, strategy) for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY)), key=len)
    return (packed, f"{coding}+deflate") if len(packed) < len(data) else (data, coding)


def _deflate(data: bytes, strategy: int) -> bytes:
    # Huffman only is the better one for noise (no repeats to refer to), the default for indices in clusters.
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    return compressor.compress(data) + compressor.flush()


def _inflated(data: bytes, coding: str) -> tuple[bytes, str]:
    """Undo `_deflated`."""
    plain, plus, method = coding.partition("+")
    if not plus:
        return data, plain
    if method != "deflate":
        raise ValueError(f"unknown coding {coding!r}")
    return zlib.decompress(data, -zlib.MAX_WBITS), plain


def _encode_indices(indices: npt.NDArray[np.int64], size: int) -> tuple[bytes, str]:
    """The shortest coding of strictly increasing indices, and its name."""
    bitmap = np.zeros(size, dtype=bool)
    bitmap[indices] = True
    gaps = np.diff(indices, prepend=-1) - 1
    candidates = (_deflated(_varints(gaps), "gaps"), _deflated(np.packbits(bitmap).tobytes(), "bitmap"))
    return min(candidates, key=lambda candidate: len(candidate[0]))


def _decode_indices(data: bytes, coding: str, count: int, size: int) -> npt.NDArray[np.int64]:
    """Undo `_encode_indices`."""
    data, layout = _inflated(data, coding)
    raw = np.frombuffer(data, dtype=np.uint8)
    if layout == "gaps":
        indices = np.cumsum(_from_varints(raw) + 1) - 1
    elif layout == "bitmap":
        indices = np.flatnonzero(np.unpackbits(raw, count=size))
    else:
        raise ValueError(f"unknown coding of indices {coding!r}")
    if len(indices) != count:
        raise ValueError(f"{len(indices)} indices where {count} were written")
    return indices.astype(np.int64)


def _varints(numbers: npt.NDArray[np.int64]) -> bytes:
    """Non-negative numbers in 7-bit groups, the lowest first; the top bit says that another group follows."""
    lengths = np.ones(len(numbers), dtype=np.int64)
    rest = numbers >> 7
    while rest.any():
        lengths += rest > 0
        rest = rest >> 7
    out = np.zeros(int(lengths.sum()), dtype=np.uint8)
    starts = np.cumsum(lengths) - lengths
    for group in range(int(lengths.max(initial=0))):
        has = lengths > group
        more = (lengths[has] > group + 1).astype(np.int64) << 7
        out[starts[has] + group] = (numbers[has] >> (7 * group) & 127) | more
    return out.tobytes()


def _from_varints(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Undo `_varints`."""
    if len(raw) == 0:
        return np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(raw < 128)
    starts = np.concatenate(([0], ends[:-1] + 1))
    group = np.arange(len(raw)) - np.repeat(starts, ends - starts + 1)
    return np.add.reduceat((raw & 127).astype(np.int64) << (7 * group), starts)


def _quantise(user: str, values: Tensor, kind: Values, block: int) -> tuple[bytes, Tensor]:
    """Values `(n,)` as bytes, and the scales `(blocks,)` bfloat16 that belong to them (none for float16).

    int8 is symmetric: `value = scale * q` with `|q| <= 127` and `scale = max|value| / 127` over the block.
    A scale rounded to bfloat16 is off by at most 1/256, so the block's largest value still becomes `q =
    127`, and `127 * scale` is exact in float32: quantising what was read gives the same scale and the same
    bytes.
    """
    if kind == "float16":
        return _float16(user, "values", values).numpy().tobytes(), torch.zeros(0, dtype=torch.bfloat16)
    n = len(values)
    blocks = torch.zeros(-(-n // block), block, dtype=torch.float64)  # (n,) -> (blocks, block)
    blocks.view(-1)[:n] = values.double()
    scales = (blocks.abs().amax(1) / _LARGEST_INT8).clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.bfloat16)
    steps = (blocks / scales.double().unsqueeze(1)).round().clamp(-_LARGEST_INT8, _LARGEST_INT8)
    return steps.view(-1)[:n].to(torch.int8).numpy().tobytes(), scales


def _decode_values(data: bytes, coding: str, scales: Tensor, block: int) -> Tensor:
    """Undo `_quantise`: float32 `(n,)`."""
    data, kind = _inflated(data, coding)
    if kind == "float16":
        return torch.from_numpy(np.frombuffer(data, dtype="<f2").astype(np.float32))
    if kind != "int8":
        raise ValueError(f"unknown coding of values {coding!r}")
    steps = torch.from_numpy(np.frombuffer(data, dtype=np.int8).astype(np.float32))
    if -(-len(steps) // block) != len(scales):
        raise ValueError(f"{len(scales)} scales for {len(steps)} values in blocks of {block}")
    return steps * scales.float().repeat_interleave(block)[: len(steps)]


def _float16(user: str, name: str, values: Tensor) -> Tensor:
    """Values as float16, or an error where one is too large for it."""
    half = values.to(torch.float16)
    too_large = values[~half.isfinite()]
    if len(too_large):
        remedy = "use values='int8' or smaller values" if name == "values" else "scale the embedding down"
        raise ValueError(
            f"user {user!r}: {name} {float(too_large[0]):g} does not fit float16 (at most 65504): {remedy}"
        )
    return half


def _tensor(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _bytes(tensor: Tensor) -> bytes:
    """Undo `_tensor`."""
    return tensor.numpy().tobytes()
