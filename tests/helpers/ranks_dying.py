"""run.py, for test_distributed.py, of which rank 1 is killed when it comes to the second block."""

import os
import runpy
import signal

from gptq_awq.quantization.block import BlockStep
from helpers.paths import ROOT

run = BlockStep.run


def die(self, inputs):
    """Be killed, as by kill -9."""
    if self.index == 1 and os.environ["SLURM_PROCID"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    run(self, inputs)


BlockStep.run = die
runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
