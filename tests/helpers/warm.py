"""What nearly every program in tests needs, loaded once in the process that they are forked off.

Imports that wait until they are needed, tables that parsers build when they are first called, and compiled kernels.
"""

from contextlib import suppress

import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401
from hydra import compose, initialize_config_dir
from numba.core.registry import CPUDispatcher
from omegaconf import OmegaConf

from gptq_awq.experiment.options import check_options
from gptq_awq.kernels import columns, descent, softmax
from helpers.paths import CONFIGS

with initialize_config_dir(str(CONFIGS), version_base="1.3"):
    composed = compose("config", overrides=["method=gptq", "bits=3", "out=x"])
OmegaConf.resolve(composed)
check_options(composed)

for module in (columns, descent, softmax):
    for kernel in vars(module).values():
        # Loaded from the files that an earlier process left, not run: a process with threads can't be forked.
        if isinstance(kernel, CPUDispatcher):
            with suppress(Exception):  # numba has no public list of these files; without it programs load their own
                for signature, *_ in kernel._cache._cache_file._load_index():
                    kernel.compile(signature)
