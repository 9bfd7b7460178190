"""A model too large to be tried in an engine is tried with its first blocks alone: one of each kind at least."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export import engine_check
from gptq_awq.export.alike import kinds_of_blocks
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.offload import offloaded

COUNTS = re.compile(r"layers?$|^n_layer$|^depth$")
"""Names of options that say how many blocks there are."""


def tried_in_part(model: PreTrainedModel, told: str, tried: Callable[[], list[str]]) -> list[str]:
    """Try a model in an engine, or its first blocks where it is too large as a whole; return what is to be said.

    Args:
        model: full-precision model; for a while it has fewer blocks.
        told: format and engine, for sentences.
        tried: tries the model as it is then (`check_engine`).

    Raises:
        UserError: the engine refuses the whole model, or computes something else. Of its first blocks this is only
            said, as a config may count on the others.
    """
    if not engine_check.too_large(model) or offloaded(model):
        return tried()
    with shortened(model) as count:
        if engine_check.too_large(model):
            return tried()
        try:
            found = tried()
        except UserError as error:
            return [f"{told}: of its first {count} blocks alone: {error}"]
    return found or [f"{told}: tried before calibration with its first {count} blocks alone, as the model is large"]


@contextmanager
def shortened(model: PreTrainedModel) -> Iterator[int]:
    """Context manager inside of which a model has its first blocks alone, one of each kind; yields how many."""
    prefix, blocks = find_blocks(model)
    whole, config = len(blocks), model.config.get_text_config()
    count = max(int(each[0]) for each in kinds_of_blocks(model).values()) + 1
    owner, _, name = prefix.rpartition(".")
    own = dict(vars(config))
    for option, value in own.items():
        if isinstance(value, list | tuple) and len(value) == whole:
            setattr(config, option, value[:count])
        elif value == whole and isinstance(value, int) and COUNTS.search(option):
            setattr(config, option, count)
    model.get_submodule(owner)._modules[name] = nn.ModuleList(blocks[:count])
    try:
        yield count
    finally:
        model.get_submodule(owner)._modules[name] = blocks
        for option, value in own.items():
            if getattr(config, option) is not value:
                setattr(config, option, value)
