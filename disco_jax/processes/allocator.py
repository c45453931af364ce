"""How this process's memory allocator treats memory that is freed."""

import ctypes
import sys

# Options of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def reuse_freed_memory() -> None:
    """Makes glibc reuse freed memory instead of returning it to the system.

    On CPUs, XLA allocates the temporaries of every step anew, and returning them to the system
    costs a page fault for every page. Must be called before JAX starts its threads, which otherwise
    have arenas of their own. Does nothing on systems without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_ARENA_MAX, 1)
