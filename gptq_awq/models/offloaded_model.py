"""Opening a model that needn't fit into memory: its blocks, embedding and head stay on disk until they are used."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.models.auto_class import auto_class
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.checkpoint import Checkpoint
from gptq_awq.models.offload import Residence
from gptq_awq.runtime.memory import return_large

SMALL = 2**20
"""Parameters below which a module outside of the blocks, such as the final norm, is kept in memory."""


def skeleton(folder: Path, config: Any, dtype: torch.dtype, **code: Any) -> PreTrainedModel:
    """The causal language model of a transformers folder with its parameters on the meta device."""
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=dtype, **code)
    model.tie_weights()
    if model.can_generate():
        there = (folder / "generation_config.json").is_file()
        source = {} if there else {"config_file_name": "config.json", "_from_model_config": True}
        model.generation_config = GenerationConfig.from_pretrained(folder, **source)
    return model


def open_offloaded(
    folder: Path, config: Any, dtype: torch.dtype, device: torch.device, option: str, **code: Any
) -> PreTrainedModel:
    """Open the causal language model of a transformers folder with its weights offloaded, but for small modules.

    Raises:
        UserError: naming `option`, where the folder lacks a tensor, or has none in safetensors files.
    """
    return_large()
    return offload(skeleton(folder, config, dtype, **code), folder, dtype, device, option)


def offload(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, device: torch.device, option: str
) -> PreTrainedModel:
    """Connect a `skeleton` with the folder's files, and read its small modules.

    Raises:
        UserError: naming `option`, where the folder lacks a tensor, or has none in safetensors files.
    """
    checkpoint = Checkpoint(folder, model, option)
    _untie_by_files(model, checkpoint, dtype)
    _make_parameters_nan(model, dtype, device)
    model.eval()
    names = _names_in(checkpoint, model, option)
    kept = dict(model.named_parameters())
    for modules in _units(model):
        own = {id(p): p for module in modules for p in module.parameters()}
        parameters = {names[key]: p for key, p in own.items()}
        wanted = list(parameters)
        Residence(modules, parameters, partial(checkpoint.read, wanted), partial(checkpoint.read_ahead, wanted))
        kept = {name: p for name, p in kept.items() if id(p) not in own}
    _read(model, checkpoint, kept, names, device)
    return model


def read_whole(model: PreTrainedModel, folder: Path, dtype: torch.dtype, option: str) -> PreTrainedModel:
    """Read all tensors of a `skeleton`, one by one, from a folder that comes quantized; transformers' loader can't.

    Raises:
        UserError: naming `option`, where the folder lacks a tensor, or has none in safetensors files.
    """
    checkpoint, cpu = Checkpoint(folder, model, option), torch.device("cpu")
    _untie_by_files(model, checkpoint, dtype)
    _make_parameters_nan(model, dtype, cpu)
    _read(model, checkpoint, dict(model.named_parameters()), _names_in(checkpoint, model, option), cpu)
    return model


def _read(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    kept: Mapping[str, nn.Parameter],
    names: Mapping[int, str],
    device: torch.device,
) -> None:
    """Read the parameters that are kept in memory, and the buffers."""
    for name, tensor in checkpoint.read([names[id(p)] for p in kept.values()]):
        parameter = model.get_parameter(name)
        parameter.data = tensor.to(device, parameter.dtype)
    for name in {*model.state_dict()} - {name for name, _ in model.named_parameters(remove_duplicate=False)}:
        if name in checkpoint:
            model.get_buffer(name).copy_(dict(checkpoint.read([name]))[name])


def _make_parameters_nan(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Replace meta parameters by ones of their dtype on `device`, over a single NaN each; move buffers there."""
    exact, new = _kept_in_float32(model, dtype), {}
    for name, old in model.named_parameters():
        number = torch.full((), torch.nan, dtype=torch.float32 if exact(name) else dtype, device=device)
        new[id(old)] = nn.Parameter(number.expand(old.shape), requires_grad=False)
    for module in model.modules():
        for name, old in module._parameters.items():
            module._parameters[name] = None if old is None else new[id(old)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Predicate of the parameters that transformers loads in float32, whatever the dtype, such as a router's bias."""
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _untie_by_files(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Give parameters that the config ties weights of their own where the files hold different ones, as in memory."""
    first: dict[int, str] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in checkpoint:
            continue
        other = first.setdefault(id(parameter), name)
        if other == name:
            continue
        one, two = (tensor.to(dtype) for tensor in dict(checkpoint.read([other, name])).values())
        if not torch.equal(one, two):
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            model.all_tied_weights_keys.pop(name, None)


def _names_in(checkpoint: Checkpoint, model: PreTrainedModel, option: str) -> dict[int, str]:
    """Map the id of every parameter to its name in the checkpoint, which holds a tied one under one of its names.

    Raises:
        UserError: the checkpoint lacks a parameter.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in checkpoint:
            names.setdefault(id(parameter), name)
    missing = [name for name, p in model.named_parameters() if id(p) not in names]
    if missing:
        raise UserError(f"{option}: holds no weights for {missing[0]} ({len(missing)} missing)")
    return names


def _units(model: PreTrainedModel) -> Iterator[list[nn.Module]]:
    """Modules that are offloaded together: each block; each large module outside, with those that share its weight."""
    prefix, blocks = find_blocks(model)
    yield from ([block] for block in blocks)
    outside: dict[int, list[nn.Module]] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not name.startswith(f"{prefix}.") and sum(p.numel() for p in own) >= SMALL:
            outside.setdefault(id(own[0]), []).append(module)
    yield from outside.values()
