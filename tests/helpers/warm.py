"""Imports that nearly every program in tests needs, made once in the process that they are forked off.

Imports that wait until they are needed, and tables that parsers build when they are first called.
"""

import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gptq_awq.experiment.options import check_options
from helpers.paths import CONFIGS

with initialize_config_dir(str(CONFIGS), version_base="1.3"):
    composed = compose("config", overrides=["method=gptq", "bits=3", "out=x"])
OmegaConf.resolve(composed)
check_options(composed)
