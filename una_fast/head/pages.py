"""Large pages for large buffers on a CPU."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

PAGE = 2 << 20  # bytes of a large page
LEAST = 32 << 20  # smaller memory may share its pages with other owners


def large_pages(fresh: Tensor) -> Tensor:
    """Ask for large pages behind new memory of a CPU, and return it.

    The first write to a page waits for the kernel. In pages of 4 KiB that costs a fifth of the
    product that fills a buffer of logits with 512 columns in the sum; in large pages a tenth of
    this. A hint: a system that gives none is left as it is.

    fresh: contiguous, not written yet
    """
    madvise = _madvise()
    if madvise is None or fresh.device.type != "cpu" or fresh.nbytes < LEAST:
        return fresh
    start = -(-fresh.data_ptr() // PAGE) * PAGE
    stop = (fresh.data_ptr() + fresh.nbytes) // PAGE * PAGE
    madvise(start, stop - start, mmap.MADV_HUGEPAGE)
    return fresh


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's madvise; None where it has no large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
