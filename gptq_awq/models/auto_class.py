"""Choice of transformers' auto class for a config: causal language model, or multimodal model that contains one."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def also_sees(config: PreTrainedConfig) -> bool:
    """Whether the config is of a multimodal model, whose language model is one part beside e.g. a vision tower."""
    return config.get_text_config() is not config


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads the config's whole model. Language models in encoder-decoders are not looked for."""
    whole = also_sees(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if whole and not config.is_encoder_decoder else AutoModelForCausalLM
