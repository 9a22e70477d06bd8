"""The C allocator, told that this process will want its memory again.

A training step frees what the next one allocates. glibc gives large blocks, and the top of its heap, back to the kernel
in between, which then zeroes every page anew: 3,000 to 6,000 page faults a step and a fifth of its processor time for a
model of 60,000 weights. Peak memory is the same; what is freed stays with the process, which ends with its run.
"""

from __future__ import annotations

import ctypes
import sys

# mallopt(3), malloc.h. The largest threshold that glibc takes is 32 MiB; blocks above it are mapped one by one, and
# weigh little beside what is computed in them.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 1 << 30, _TOP_PAD: 64 << 20}


def keep_freed_memory() -> bool:
    """Whether the allocator listens; another than glibc's is left as it is."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in _SETTINGS.items())
