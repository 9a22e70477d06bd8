"""Freed memory is used again: page faults are counted, not time."""

from __future__ import annotations

import subprocess
import sys

# Three blocks of 8 MiB at once, freed together, again and again: what activations do.
SCRIPT = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault where this counts 512
import torch
from rlhf_trainer.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
else:  # what glibc starts with; it moves its thresholds with what is freed, and where that ends is luck
    ctypes.CDLL(None).mallopt(-3, 128 << 10)
def cycle():
    blocks = [torch.ones(2 << 20) for _ in range(3)]
for _ in range(5):
    cycle()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    cycle()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_step_does_not_ask_the_kernel_for_what_the_last_one_had() -> None:
    given_back = faults("given back")
    assert given_back >= 20 * 6144, "control: 24 MiB are 6,144 pages, given back and asked for in each cycle"
    assert faults("kept") < given_back / 10, "the heap may still grow once or twice"
