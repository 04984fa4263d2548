"""Memory that a pass over a batch frees is used again by the next one, and given back to the system after the batch.

glibc hands large blocks back to the system as soon as they are free, and every page of the next one is then cleared and
mapped anew: for the activations of a language model that was a sixth of all processor time on a CPU. So blocks of any
size are kept in one heap (``M_MMAP_THRESHOLD``, ``M_TRIM_THRESHOLD``, ``M_ARENA_MAX`` in mallopt(3)), and ``give_back``
empties it when a batch is done. Elsewhere than on Linux with glibc, nothing is changed.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
_LARGEST = 2**31 - 1  # an int


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> bool:
    """Keep what is freed, in this process, until ``give_back``; whether that can be had here.

    To be called before the thread that computes is started: a thread stays with the heap that it found first.
    """
    libc = _glibc()
    if libc is None:
        return False
    one_heap = libc.mallopt(_ARENA_MAX, 1) == 1
    never_trimmed = libc.mallopt(_TRIM_THRESHOLD, _LARGEST) == 1
    # older versions of glibc allow 32 MiB and no more
    large_too = any(libc.mallopt(_MMAP_THRESHOLD, size) == 1 for size in (_LARGEST, 32 << 20))
    return one_heap and never_trimmed and large_too


def give_back() -> None:
    """Give what is free back to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)
