"""The memory of this process: its peak, and giving back what was freed."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")
# An option in glibc's malloc.h, and its largest value, which it takes by itself once
# large blocks are freed.
_MMAP_THRESHOLD, _LARGEST = -3, 32 << 20
# What a decoder layer computes of 512 tokens is larger, where the model is large.
_LARGE = 4 << 20


def peak_memory() -> int:
    """Highest resident size of this process so far, in bytes.

    Where the system says it, without that of the process that started this one.
    """
    if STATUS.is_file():
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it for later.

    glibc keeps freed blocks of up to 32 MiB, in every thread's own arena: hundreds of MiB after a
    pass over the calibration text.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Within it, blocks of 4 MiB and more go back to the system as soon as they are freed.

    glibc would cut smaller blocks from those up to 32 MiB that it keeps: of the passes over the
    calibration text, a seventh of the peak was memory that nobody used.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _LARGEST)
