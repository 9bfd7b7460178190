"""What memory the process holds on to."""

import os
import platform
import subprocess
import sys

import pytest

HOLES = """
import sys
import torch
from gptq_awq.runtime.memory import resident_bytes, return_large
if sys.argv[1] == "True":
    return_large()
for _ in range(3):  # the C library learns from what is freed: sizes below the largest so far come from the heap
    torch.ones(30 * 2**18)
kept = []
before = resident_bytes()
for _ in range(20):
    large, small = torch.ones(5 * 2**18), torch.ones(2**14)
    kept.append((large, small))
kept = [small for _, small in kept]
del large
print((resident_bytes() - before) / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_tensors_leave_no_holes_where_memory_is_scarce():
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD"))}
    commands = ([sys.executable, "-c", HOLES, str(scarce)] for scarce in (False, True))
    held = [float(subprocess.run(c, capture_output=True, check=True, env=own).stdout) for c in commands]
    assert held[0] > 40  # 20 × 5 MB lie between what is still used
    assert held[1] < held[0] / 3
