"""Files of bytes, lines or text, plain or compressed by their suffix; their errors name the file and the line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

__all__ = ["COMPRESSIONS", "DataError", "compression", "open_binary", "read_lines", "read_whole"]

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# A file without line ends must not be pulled into memory as a whole.
_LONGEST_LINE = 1 << 26
# Zstandard: the largest window that its format's tools write; dumps of archives use it (`--long=31`).
_LARGEST_WINDOW = 1 << 31
# Compressed bytes taken at a time, few because what they decompress to is held in memory.
_CHUNK = 1 << 12


class DataError(ValueError):
    """Users' data cannot be used; the message says which file, where in it, and what would be right."""


def compression(path: Path) -> str:
    """Compression of a file by its name, "" for none."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, plain or compressed, as (number from 1, line with its line end).

    Lines are decoded one by one, so that errors have a line.

    Raises:
        DataError: the file is missing, damaged or not UTF-8, or a line is endless.
    """
    with open_binary(path) as stream:
        number = 0
        while line := stream.readline(_LONGEST_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > _LONGEST_LINE:
                raise DataError(f"{where} is longer than {_LONGEST_LINE >> 20} MiB: is it one row per line?")
            try:
                # Excel and PowerShell begin UTF-8 with a byte order mark.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}, byte {error.start + 1}: not UTF-8 (0x{line[error.start]:02x}); save the file as UTF-8"
                ) from error


def read_whole(path: Path, limit: int) -> str:
    """The text of a UTF-8 file, plain or compressed, of at most `limit` bytes.

    Raises:
        DataError: the file is missing, damaged, not UTF-8 or larger.
    """
    with open_binary(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"{path} is larger than {limit / 2**20:g} MiB, too much to be read as a whole")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start + 1}: not UTF-8; save the file as UTF-8") from error


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """A file's decompressed bytes as a stream; errors while it is open name the file."""
    if not path.exists():
        raise DataError(f"there is no file {path}")
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    try:
        with _opened(path) as stream:
            yield stream
    except DataError:
        raise
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}, it may be truncated or damaged: {error}") from error


def _opened(path: Path) -> BinaryIO:
    """Open a file by its compression."""
    kind = compression(path)
    if kind == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if kind == ".bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if kind == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if kind == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(path.open("rb")), 1 << 16))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a Zstandard file of any number of frames.

    Neither zstandard's own reader, which takes a truncated file for a short one, nor pyarrow's, which refuses the
    long windows of large dumps.
    """

    def __init__(self, source: BinaryIO) -> None:
        import zstandard

        self._source = source
        self._errors = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as bytes are at hand; 0 at the end.

        Raises:
            EOFError: the last frame has no end.
            OSError: a frame is damaged.
        """
        while not self._ready:
            compressed = self._frame.unused_data or self._source.read(_CHUNK)
            if self._frame.eof:
                self._frame, self._inside = self._decompressor.decompressobj(), False
            if not compressed:
                if self._inside:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._inside = True
            try:
                self._ready = memoryview(self._frame.decompress(compressed))
            except self._errors as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        """Close the file as well."""
        self._source.close()
        super().close()
