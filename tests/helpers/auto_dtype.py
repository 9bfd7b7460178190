"""Lets `compute_dtype=auto` mean one dtype in this process and in the forked ones, whatever the processor.

On import: where GPTQ_AWQ_TEST_DTYPE is set (float32 or bfloat16), that is what "auto" resolves to. So the suite can be
run as on a processor that multiplies bfloat16 natively, and as on one that doesn't. Processes that tests start in
other ways keep the processor's choice; where such a run is compared with another, the test says its compute dtype.
"""

import os

import torch

from gptq_awq.numerics import dtypes

VARIABLE = "GPTQ_AWQ_TEST_DTYPE"

if os.environ.get(VARIABLE):
    forced = getattr(torch, os.environ[VARIABLE])
    dtypes.native_dtype = lambda device: forced
