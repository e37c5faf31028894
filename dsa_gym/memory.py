"""Memory that the C library keeps instead of giving it back."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import cache

KEPT_BYTES = 2**30
"""Freed memory that may stay with the process."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h


@cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory for the next step; nothing is done elsewhere.

    A step frees and asks for the same tens of megabytes as the one before it. By default glibc returns them to the
    system and takes thousands of page faults to get them back, which can be a third of a step's time.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_MMAP_THRESHOLD, KEPT_BYTES)
            mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
