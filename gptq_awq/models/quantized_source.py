"""Sources that come quantized: tensors of a folder's files, decoded one by one as they are read.

A folder whose config.json has a `quantization_config` holds codes and scales. Here they become the tensors that the
full-precision model has, under its names, with the numbers that the format's own library decodes:

fp8                  q s for each tensor, row or block of (128, 128)           DeepSeek-V3, arXiv 2412.19437
mxfp4                transformers' own conversion (gpt-oss)                    OCP MX 1.0
compressed-tensors   its library, module by module: packed integers, FP8, NVFP4, MXFP4
gptq, awq            s (c - z), packed words of 32 bits                        arXiv 2210.17323, 2306.00978
bitsandbytes         its library: NF4 and FP4
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.models.tensor_files import StoredTensor

Raw = Mapping[str, StoredTensor]
Parts = Mapping[str, str]
"""A tensor's parts: what each is, and its name in the files."""
Decode = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Logical:
    """A tensor that is decoded when it is read: its shape, its parts in the files, and how they are decoded."""

    shape: tuple[int, ...]
    parts: dict[str, str]
    decode: Decode


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a folder's config.json, or of its language model there; None: it has none."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))] if isinstance(config, dict) else []
    found = [part[key] for part in parts for key in ("quantization_config", "compression_config") if part.get(key)]
    return found[0] if found else None


def decoded(raw: Raw, config: Mapping[str, Any] | None, option: str) -> dict[str, StoredTensor]:
    """The tensors that a folder holds once its codes are decoded; without a `config` they are those of its files.

    Args:
        raw: tensors of the files, by name.
        config: the folder's `quantization_config`.
        option: names the folder in errors.

    Raises:
        UserError: a format that isn't read; codes whose parts are missing.
    """
    if config is None:
        return dict(raw)
    method = str(config.get("quant_method", "")) or ("bitsandbytes" if "load_in_4bit" in config else "")
    if method not in READERS:
        raise UserError(
            f"{option}: is quantized already, by {method or 'an unnamed format'}, which isn't read; formats that are: "
            f"{', '.join(READERS)}; else name the full-precision model"
        )
    try:
        logical = dict(READERS[method](raw, config))
    except KeyError as error:
        raise UserError(f"{option}: is quantized by {method}, and lacks {error.args[0]}") from error
    if not logical:
        raise UserError(
            f"{option}: is quantized already, by {method} as config.json has it, and its files hold no codes"
        )
    used = {part for each in logical.values() for part in each.parts.values()}
    found = {name: tensor for name, tensor in raw.items() if name not in used and not name.endswith(ACTIVATIONS)}
    for name, each in logical.items():
        parts = {what: (raw[part].file, part) for what, part in each.parts.items()}
        file = next(iter(parts.values()))[0]
        found[name] = StoredTensor(file, "F32", each.shape, parts, each.decode)
    return found


ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "input_global_scale", "input_zero_point")
"""Scales of activations, which weights don't need."""


def told(found: Mapping[str, StoredTensor], config: Mapping[str, Any] | None) -> str | None:
    """A sentence on what the source was, for log, manifest and card; None for one that isn't quantized."""
    if config is None:
        return None
    count = sum(tensor.decode is not None for tensor in found.values())
    facts = ("format", "fmt", "bits", "group_size", "weight_block_size", "bnb_4bit_quant_type")
    details = [f"{key}={config[key]}" for key in facts if config.get(key) is not None]
    return f"{config.get('quant_method', 'bitsandbytes')} ({', '.join(details)}): {count} tensors were decoded"


# ------------------------------------------------------------------------------------------------------------- formats


def _fp8(raw: Raw, config: Mapping[str, Any]) -> Iterator[tuple[str, Logical]]:
    block = tuple(config.get("weight_block_size") or ())
    for name, tensor in raw.items():
        if not tensor.holds_small_floats:
            continue
        base = name.removesuffix(".weight")
        beside = (f"{name}_scale_inv", f"{name}_scale", f"{base}.scale", f"{base}.weight_scale")
        scale = next((each for each in beside if each in raw), None)
        if scale is not None:
            yield name, Logical(tensor.shape, {"codes": name, "scale": scale}, partial(_scaled, block=block))


def _scaled(parts: Mapping[str, Tensor], block: tuple[int, ...]) -> Tensor:
    """Decode FP8: each number times the scale of its tensor, its row or its block."""
    codes, scale = parts["codes"].float(), parts["scale"].float()
    if scale.numel() == 1:
        return codes * scale.reshape(())
    if scale.dim() == 1:
        return codes * scale[:, None]
    rows, columns = codes.shape[-2:]
    high, wide = block or (-(-rows // scale.shape[-2]), -(-columns // scale.shape[-1]))
    scale = scale.repeat_interleave(high, -2).repeat_interleave(wide, -1)
    return codes * scale[..., :rows, :columns]


def _mxfp4(raw: Raw, _config: Mapping[str, Any]) -> Iterator[tuple[str, Logical]]:
    for name, tensor in raw.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            experts, rows, groups, half = tensor.shape
            shape = (experts, 2 * groups * half, rows)
            yield base, Logical(shape, {"blocks": name, "scales": _known(raw, f"{base}_scales")}, _mx_decode)


def _mx_decode(parts: Mapping[str, Tensor]) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(parts["blocks"], parts["scales"])


def _compressed(raw: Raw, config: Mapping[str, Any]) -> Iterator[tuple[str, Logical]]:
    names = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    names += ("weight_global_scale",)
    for scale in [name for name in raw if name.endswith(".weight_scale")]:
        module = scale.removesuffix(".weight_scale")
        parts = {what: f"{module}.{what}" for what in names if f"{module}.{what}" in raw}
        codes = raw[parts.get("weight_packed") or _known(raw, f"{module}.weight")]
        decode = partial(_decompress, module=module, config=config)
        yield f"{module}.weight", Logical(_compressed_shape(raw, parts, codes), parts, decode)


def _compressed_shape(raw: Raw, parts: Parts, codes: StoredTensor) -> tuple[int, ...]:
    """The shape of a packed weight, as its own record has it, or by its packing (two numbers of 4 bits in a byte)."""
    if "weight_packed" not in parts:
        return codes.shape
    if "weight_shape" in parts:
        from safetensors import safe_open

        with safe_open(raw[parts["weight_shape"]].file, framework="pt", backend="pread") as file:
            return tuple(file.get_tensor(parts["weight_shape"]).tolist())
    return (*codes.shape[:-1], 2 * codes.shape[-1])


def _decompress(parts: Mapping[str, Tensor], module: str, config: Mapping[str, Any]) -> Tensor:
    """Decode one module by the library of compressed-tensors."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.utils.match import match_name
    except ImportError as error:
        raise UserError(
            "model: compressed-tensors aren't read without their library: pip install gptq_awq[engines]"
        ) from error
    known = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "sparsity_config"})
    schemes: Any = list(known.config_groups.values())
    named = [s for s in schemes if any(match_name(module, target) for target in s.targets)]
    scheme = (named or schemes)[0]
    format_ = scheme.format or config.get("format")
    state: dict[str, Any] = dict(parts)
    if "weight_shape" in state:
        state["weight_shape"] = torch.Size(state["weight_shape"].tolist())
    compressor: Any = BaseCompressor.get_value_from_registry(str(getattr(format_, "value", format_)))
    return compressor.decompress(state, scheme)["weight"]


def _gptq(raw: Raw, config: Mapping[str, Any]) -> Iterator[tuple[str, Logical]]:
    bits, plus_one = int(config["bits"]), config.get("checkpoint_format", "gptq") != "gptq_v2"
    for name in [name for name in raw if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        parts = {what: _known(raw, f"{module}.{what}") for what in ("qweight", "qzeros", "scales")}
        parts |= {"g_idx": f"{module}.g_idx"} if f"{module}.g_idx" in raw else {}
        words, out = raw[name].shape
        decode = partial(_decode_gptq, bits=bits, plus_one=plus_one)
        yield f"{module}.weight", Logical((out, words * 32 // bits), parts, decode)


def _decode_gptq(parts: Mapping[str, Tensor], bits: int, plus_one: bool) -> Tensor:
    """Decode AutoGPTQ's layout: codes packed down the columns, zeros along the rows and one too low."""
    codes = _unpacked(parts["qweight"].T, bits)  # (out, in)
    columns, scales = codes.shape[1], parts["scales"].T.float()
    zeros = _unpacked(parts["qzeros"], bits)[:, : len(scales)].T + int(plus_one)
    group = parts.get("g_idx")
    size = columns // scales.shape[1]
    group = torch.arange(columns) // size if group is None else group.long()
    return (codes - zeros[:, group]).float() * scales[:, group]


def _awq(raw: Raw, config: Mapping[str, Any]) -> Iterator[tuple[str, Logical]]:
    bits = int(config["bits"])
    for name in [name for name in raw if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        parts = {what: _known(raw, f"{module}.{what}") for what in ("qweight", "qzeros", "scales")}
        columns, words = raw[name].shape
        yield f"{module}.weight", Logical((words * 32 // bits, columns), parts, partial(_decode_awq, bits=bits))


def _decode_awq(parts: Mapping[str, Tensor], bits: int) -> Tensor:
    """Decode AutoAWQ's layout: eight output channels in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def channels(words: Tensor) -> Tensor:
        codes = _unpacked(words, bits)
        return codes.view(len(codes), -1, len(order))[:, :, order].flatten(1)

    codes, zeros, scales = channels(parts["qweight"]), channels(parts["qzeros"]), parts["scales"].float()
    size = len(codes) // len(scales)
    return ((codes - zeros.repeat_interleave(size, 0)).float() * scales.repeat_interleave(size, 0)).T


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes in rows of words of 32 bits, the lowest bits first; of 3 bits they cross from word to word."""
    words = words.contiguous().to(torch.int64) & 0xFFFFFFFF
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits)
        return ((words[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)
    places = torch.arange(words.shape[1] * 32 // bits) * bits
    first, shift = places // 32, places % 32
    following = torch.nn.functional.pad(words, (0, 1))[:, first + 1]
    return ((words[:, first] >> shift) | (following << (32 - shift))) & (2**bits - 1)


def _bitsandbytes(raw: Raw, _config: Mapping[str, Any]) -> Iterator[tuple[str, Logical]]:
    for name in [name for name in raw if name.endswith(".SCB")]:
        weight = f"{name.removesuffix('.SCB')}.weight"
        yield weight, Logical(raw[weight].shape, {"codes": weight, "scales": name}, _decode_int8)
    for name in [name for name in raw if name.endswith(".weight.absmax")]:
        weight = name.removesuffix(".absmax")
        parts = {part.removeprefix(f"{weight}."): part for part in raw if part.startswith(f"{weight}.")}
        yield weight, Logical(_bnb_shape(raw, parts), {"codes": _known(raw, weight), **parts}, _decode_bnb)


def _decode_int8(parts: Mapping[str, Tensor]) -> Tensor:
    """Decode LLM.int8: each row's codes times its largest magnitude over 127."""
    return parts["codes"].float() * (parts["scales"].float() / 127)[:, None]


def _bnb_shape(raw: Raw, parts: Parts) -> tuple[int, ...]:
    from safetensors import safe_open

    name = next(part for what, part in parts.items() if what.startswith("quant_state."))
    with safe_open(raw[name].file, framework="pt", backend="pread") as file:
        return tuple(json.loads(bytes(file.get_tensor(name).tolist()))["shape"])


def _decode_bnb(parts: Mapping[str, Tensor]) -> Tensor:
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit
    except ImportError as error:
        raise UserError("model: bitsandbytes folders aren't read without it: pip install gptq_awq[engines]") from error
    state = QuantState.from_dict({what: part for what, part in parts.items() if what != "codes"}, torch.device("cpu"))
    return dequantize_4bit(parts["codes"], state)


def _known(raw: Raw, name: str) -> str:
    """`name`, which the files hold. Raises KeyError where they don't."""
    if name not in raw:
        raise KeyError(name)
    return name


READERS: dict[str, Callable[[Raw, Mapping[str, Any]], Iterator[tuple[str, Logical]]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}
