"""Memory of a CPU: what a step frees is kept for the next one. Where there is no glibc, nothing here does anything."""

import ctypes
import sys
from typing import Any

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # malloc.h


def keep_freed() -> None:
    """From now on this process gives no freed memory back to the system. glibc would do so with blocks of over 32 MiB, and a
    step's activations of that size would be paged in anew in every step (docs/performance.md says what that takes)."""
    if mallopt := glibc("mallopt"):
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)


def give_back() -> None:
    """What is free goes back to the system, once."""
    if malloc_trim := glibc("malloc_trim"):
        malloc_trim(0)


def glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
