"""The language model within a model that also sees, as the causal language model that its text config describes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.base import LinearSpec, Source
from gptq_awq.models.decoder_head import decoder_of


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """A causal language model that shares the modules of the model's decoder and head.

    Raises:
        UserError: transformers has no causal language model of this decoder.
    """
    config, decoder = model.config.get_text_config(), decoder_of(model)
    try:
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UserError(f"export.formats: transformers has no causal language model of {config.model_type}") from error
    own = getattr(shell, shell.base_model_prefix, None)
    if type(own) is not type(decoder):
        raise UserError(f"export.formats: {type(model).__name__}'s decoder is not that of {type(shell).__name__}")
    setattr(shell, shell.base_model_prefix, decoder)
    head: Any = model.get_output_embeddings()
    shell.set_output_embeddings(head)
    shell.generation_config = model.generation_config
    return shell.eval()


def text_tensors(model: PreTrainedModel) -> set[str]:
    """Names in a model's state dict of the tensors of its decoder and head; of all where no decoder can be told."""
    decoder, head = decoder_of(model), model.get_output_embeddings()
    if decoder is None:
        return set(model.state_dict())
    parts = [part for part in (decoder, head) if part is not None]
    own = {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in own}


def text_source(source: Source, shell: PreTrainedModel) -> Source:
    """The quantized weights of a model under their names in its text part."""
    names = names_in(source.model, shell)
    return replace(source, model=shell, weights={names[name]: weight for name, weight in source.weights.items()})


def text_linears(linears: Sequence[LinearSpec], model: PreTrainedModel, shell: PreTrainedModel) -> list[LinearSpec]:
    """Linears under their names in a model's text part."""
    names = names_in(model, shell)
    return [replace(linear, name=names[linear.name]) for linear in linears]


def names_in(model: PreTrainedModel, shell: PreTrainedModel) -> Mapping[str, str]:
    """Names of modules in a model → their names in its text part."""
    inside = {id(module): name for name, module in shell.named_modules()}
    return {name: inside[id(module)] for name, module in model.named_modules() if id(module) in inside}
