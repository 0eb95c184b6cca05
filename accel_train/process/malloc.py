"""Freed memory stays with the process: a step on a CPU then takes the pages of the step before.

glibc gives the end of its heap back to the kernel as soon as it is free, and the next step faults those
pages in again, zeroed: 4,000 to 19,000 faults in a step of the anchor model, a tenth of its time on two
cores (docs/notes.md). What a process needs is its peak in either case.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

# Of malloc.h; the numbers are part of glibc's interface. Sizes are C ints.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER_TRIM = -1
_MAPPED_FROM = 32 << 20
"""Bytes. Setting one limit ends their adjustment, so this one gets the largest value that glibc adjusts it to. Beyond
it a block that fits nowhere in the heap is mapped alone: the heap would grow by one hole after another, since an
aligned block does not fit where one of its size has been."""

_SAID_BY_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell glibc's malloc to keep what is freed; the whole process is affected, from now on.

    Nothing is changed where malloc is not glibc's (``LD_PRELOAD`` of another allocator, musl, macOS, Windows), or
    where ``environment`` has said how it is to behave (``MALLOC_TRIM_THRESHOLD_`` and its like, ``GLIBC_TUNABLES``).

    Returns:
        Whether it is in force.
    """
    if any(name in environment for name in _SAID_BY_THE_USER) or "malloc" in environment.get("GLIBC_TUNABLES", ""):
        return False
    try:
        # Bound at run time to whoever provides malloc; ctypes raises where nobody provides this.
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM) and mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM))
