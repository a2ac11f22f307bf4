"""Control when glibc returns freed CPU memory to the operating system. No effect on systems without glibc."""

import ctypes
import sys
from typing import Any

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h


def keep_freed() -> None:
    """Keep freed memory in this process from now on, so that the next step reuses it.

    By default glibc returns blocks above 32 MiB to the system. Activations of that size would then cause page
    faults in every step; docs/performance.md gives the cost.
    """
    if mallopt := glibc("mallopt"):
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Return all free memory to the system, once."""
    if malloc_trim := glibc("malloc_trim"):
        malloc_trim(0)


def glibc(name: str) -> Any:
    """Return a function of the C library, or None if it has no such function or the system is not Linux."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
