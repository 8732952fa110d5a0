"""A setting of glibc's allocator that torch's CPU passes need."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Has malloc reuse large blocks in place of mapping and unmapping each one.

    By default glibc maps every block above 128 kB to 32 MB anew, and the kernel zeroes it page by page
    on first touch: an activation is allocated a hundred times in a pass. The process keeps the memory
    of its largest pass from then on.

    Returns:
        Whether the setting was made; False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
