"""Which of transformers' classes a config stands for: a causal language model, or one that also sees and holds one."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def also_sees(config: PreTrainedConfig) -> bool:
    """Whether a language model is but a part of it, beside a vision tower and what projects its features."""
    return config.get_text_config() is not config


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads all of it. Language models within encoder-decoders are not looked for."""
    whole = also_sees(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if whole and not config.is_encoder_decoder else AutoModelForCausalLM
