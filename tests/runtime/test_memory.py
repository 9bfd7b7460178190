"""Laws of the memory that the process holds on to."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from gptq_awq.models import load

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


FAULTS = """
import resource
import sys
import torch
from gptq_awq.runtime.memory import keep_freed, return_large
(keep_freed if sys.argv[1] == "True" else return_large)()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25 * 2**20)  # 100 MB: a window's logits
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
WRITES = """
import resource
import sys
import torch
from gptq_awq.runtime.memory import make_private
weights = torch.from_file(sys.argv[2], shared=False, size=2**22)
if sys.argv[1] == "True":
    make_private([weights])
assert weights.sum() == 2**22
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
weights.add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def outputs(program: str, *args: str) -> list[float]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD", "THP_"))}
    command = [sys.executable, "-c", program, *args]
    return [float(line) for line in subprocess.run(command, capture_output=True, check=True, env=own).stdout.split()]


@glibc
def test_memory_that_was_freed_is_used_again_without_the_system():
    (returned,), (kept,) = outputs(FAULTS, "False"), outputs(FAULTS, "True")
    assert kept < 0.1 * returned


@glibc
def test_large_tensors_leave_no_holes_where_memory_is_scarce():
    plain = max(outputs(HOLES, "False")[0] for _ in range(3))  # where heaps begin is random, and decides some
    assert plain > 40  # 20 × 5 MB lie between what is still used
    assert outputs(HOLES, "True")[0] < plain / 3


@pytest.mark.skipif(sys.platform != "linux", reason="pages are made private on Linux alone")
def test_weights_mapped_from_a_file_are_written_to_without_the_system_and_the_file_stays(tmp_path):
    file = tmp_path / "weights"
    torch.ones(2**22).numpy().tofile(file)
    before = file.read_bytes()
    (mapped,), (own,) = outputs(WRITES, "False", str(file)), outputs(WRITES, "True", str(file))
    assert mapped >= 2**22 * 4 / 4096
    assert own < 0.1 * mapped
    assert file.read_bytes() == before


def test_models_are_loaded_into_pages_of_their_own(tiny_folder, monkeypatch):
    made = []
    monkeypatch.setattr(load, "make_private", lambda tensors: made.extend(tensors))
    model, _ = load.load_folder(tiny_folder, "float32", "cpu", "model.path=tiny")
    assert {id(x) for x in made} == {id(x) for x in model.parameters()}
