"""Options that mlx-lm's class of a model insists on, where transformers' configs leave them out or spell them newly.

No table of models is kept: the class is asked what it takes, and made without weights; what it complains of is
stated from the model's own config.
"""

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from gptq_awq.models.auto_class import also_sees

LACKING = re.compile(r"missing \d+ required positional arguments?: (.*)")
"""How Python says that a class wasn't told some options."""


def classes(config: Mapping[str, Any]) -> Any:
    """mlx-lm's class of a model, and that of its options."""
    return importlib.import_module("mlx_lm.utils")._get_classes(dict(config))


def made(config: Mapping[str, Any]) -> Any:
    """mlx-lm's model of a config.json; its weights are computed when they are asked for."""
    kind, options = classes(config)
    return kind(options.from_dict(dict(config)))


def options_for_mlx(config: PreTrainedConfig, written: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that mlx-lm's class can be made from.

    Args:
        config: config of the model.
        written: its config.json.

    Raises:
        Exception: whatever mlx-lm raises for a model that it doesn't know.
    """
    _, options = classes(written)
    text, part = config.get_text_config(), text_part_of(config)
    stated = dict(written)
    for name, option in inspect.signature(options).parameters.items():
        if name not in written and (option.default is option.empty or (part and hasattr(text, name))):
            stated[name] = option_of(config, name)
    if part:  # one option of transformers' that is of the whole model
        stated[part] = stated[part] | {"tie_word_embeddings": config.tie_word_embeddings}
    return _completed(config, stated)


def _completed(config: PreTrainedConfig, stated: dict[str, Any]) -> dict[str, Any]:
    """The options with those of the text part that the class complains of, one complaint after the other."""
    part = text_part_of(config)
    while True:
        try:
            made(stated)
        except TypeError as error:
            lacking = LACKING.search(str(error))
            names = re.findall(r"'(\w+)'", lacking[1]) if lacking else []
            if part is None or not names or set(names) <= stated[part].keys():
                raise
            stated = stated | {part: stated[part] | {name: option_of(config, name) for name in names}}
        else:
            return stated


def text_part_of(config: PreTrainedConfig) -> str | None:
    """Name of the part of a config that describes its language model, such as text_config; None where there is none."""
    text = config.get_text_config()
    return next((name for name, each in vars(config).items() if each is text), None) if also_sees(config) else None


def option_of(config: PreTrainedConfig, name: str) -> Any:
    """An option, or what transformers' classes compute where published configs state it."""
    text = config.get_text_config()
    found = getattr(config, name, getattr(text, name, None))
    return text.hidden_size // text.num_attention_heads if name == "head_dim" and found is None else found
