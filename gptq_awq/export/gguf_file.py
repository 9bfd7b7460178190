"""Write a stand-alone GGUF file (llama.cpp) with llama.cpp's own converter, and read it back.

The converter decides names, metadata, tokenizer and what becomes of tensors that aren't quantized. Packed blocks take
the place of what it would write for quantized weights, wherever their codes can follow (gguf_layout.py); where they
can't, the dequantized weight is stored in float32, which is exact.
"""

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from jaxtyping import UInt8
from torch import Tensor
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.gguf_blocks import BLOCK_TYPES, unpack_codes
from gptq_awq.export.gguf_converter import conversion, imported, refusing
from gptq_awq.export.layout import Flat, Layout, Part, WholeTensor, put_together, replacing_weights
from gptq_awq.export.placement import indices
from gptq_awq.export.saved import SavedTensors
from gptq_awq.models.gguf_claims import checked_gguf

log = logging.getLogger(__name__)

Packed = Mapping[str, tuple[str, UInt8[np.ndarray, "out row_bytes"]]]
"""Tensor of the model → block type and packed bytes, with rows in the module's order."""


def block_types(layout: Layout, kinds: Mapping[str, str]) -> dict[str, str]:
    """GGUF tensor → block type to store it in, or "F32"; `kinds`: quantized tensors of the model → their block type."""
    return layout.types(kinds, lambda _, kind: BLOCK_TYPES[kind].block, "llama.cpp")


def write_gguf(
    path: Path,
    root: Path,
    skeleton: Path,
    model: PreTrainedModel,
    layout: Layout,
    packed: Packed,
    exact: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> Layout:
    """Write a GGUF file that llama.cpp runs without any other file.

    Args:
        path: path of the file to write.
        root: the converter (converter_root).
        skeleton: folder with config.json and the tokenizer's files.
        model: model whose other tensors are written.
        layout: where they go, as observed.
        packed: blocks of quantized weights.
        exact: dequantized values (out, in) of those that can't be stored as blocks.
        options: `dtype` of unquantized matrices, `model_name` and `vocabulary`, as `conversion` takes them.

    Returns:
        The layout, with the values of the tensors that the converter computes.

    Raises:
        UserError: the converter refuses the model or its tokenizer; a value overflows the dtype.
    """
    types = block_types(layout, {name: kind for name, (kind, _) in packed.items()})
    held = {tensor for tensor, kind in types.items() if kind == "F32"}
    tensors = SavedTensors(model, replacing_weights(model, exact))
    with imported(root) as package:
        given = {**options, "config": model.config, "out": path, "exact": held}
        instance = conversion(package, skeleton, tensors, tensors.meta, **given)
        writer = instance.gguf_writer
        add = writer.add_tensor

        def add_tensor(name: str, tensor: Any, raw_shape: Any = None, raw_dtype: Any = None) -> None:
            if types.get(name, "F32") == "F32":
                return add(name, _checked(name, tensor), raw_shape=raw_shape, raw_dtype=raw_dtype)
            kind = types[name]
            return add(name, _blocks(layout.parts(name), packed, kind, tensor.shape), raw_dtype=_their_type(kind))

        writer.add_tensor = add_tensor
        with refusing():
            instance.prepare_tensors()
            wanted = _file_type(layout, types, options["dtype"])
            known = type(instance.ftype).__members__
            instance.ftype = known.get(wanted) or known.get(f"{wanted}_MOE") or instance.ftype
            instance.prepare_metadata(vocab_only=False)
            _complete(writer, model)
            writer.write_header_to_file(path=path)
            writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()
    return layout.with_values(model, exact)


def _complete(writer: Any, model: PreTrainedModel) -> None:
    """Add what the converter leaves to the tokenizer, drop what it guesses, and keep llama.cpp within one window."""
    fields, config = writer.kv_data[0], model.config.get_text_config()
    for guessed in ("basename", "finetune", "version"):  # from the name of the scratch folder
        fields.pop(f"general.{guessed}", None)
    size, length, window = (
        f"{writer.arch}.{key}" for key in ("vocab_size", "context_length", "attention.sliding_window")
    )
    if size not in fields:
        writer.add_vocab_size(model.get_input_embeddings().get_parameter("weight").shape[0])
    narrow = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    used = any("sliding" in str(kind) for kind in layers) if layers else getattr(config, "use_sliding_window", True)
    if narrow and used and window not in fields and length in fields and fields[length].value > narrow:
        log.warning(
            "gguf: llama.cpp's %s has no sliding windows: context_length is one window, %d", writer.arch, narrow
        )
        del fields[length]
        writer.add_context_length(narrow)


def _their_type(kind: str) -> Any:
    return sys.modules["gguf"].GGMLQuantizationType[kind]


def _blocks(parts: Iterable[Part], packed: Packed, kind: str, shape: tuple[int, ...]) -> Any:
    """Lazy array of the packed blocks of a GGUF tensor, gathered when it is written."""
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    stored = (*shape[:-1], shape[-1] // block * size)

    def gather() -> np.ndarray:
        out = np.empty((math.prod(shape) // block, size), np.uint8)
        for part in parts:
            blocks = np.asarray(packed[part.name][1]).reshape(-1, size)
            starts, positions, lengths = (a // block for a in (part.starts, part.positions, part.lengths))
            out[indices(positions, lengths)] = blocks[indices(starts, lengths)]
        return out.reshape(stored)

    lazy = sys.modules["gguf"].LazyNumpyTensor
    return lazy(meta=lazy.meta_with_dtype_and_shape(np.uint8, stored), args=(), func=gather)


def _checked(name: str, tensor: Any) -> Any:
    """The lazy array, raising UserError when it is computed where a value overflows its dtype."""
    if not hasattr(tensor, "_meta") or tensor.dtype not in (np.float16, np.float32):
        return tensor

    def check(array: np.ndarray) -> np.ndarray:
        if not np.isfinite(array).all():
            raise UserError(f"export.gguf.plain_dtype=F16 cannot hold {name}: choose BF16 or F32")
        return array

    return type(tensor)(meta=tensor._meta, args=(tensor,), func=check)


def _file_type(layout: Layout, types: Mapping[str, str], plain: str) -> str:
    """llama.cpp's file type: the block type of most weights in the blocks; k-quants S if uniform, M if mixed."""
    stored = {tensor: kind for tensor, kind in types.items() if kind != "F32"}
    inside = {tensor: kind for tensor, kind in stored.items() if tensor.startswith("blk.")} or stored
    count: Counter[str] = Counter()
    for tensor, kind in inside.items():
        count[kind] += int(layout.runs[tensor].lengths.sum())
    if not count:
        return "ALL_F32" if plain == "F32" else f"MOSTLY_{plain}"
    kind = count.most_common(1)[0][0]
    if kind in ("Q3_K", "Q4_K", "Q5_K"):
        kind += "_S" if len(count) == 1 else "_M"
    return f"MOSTLY_{kind}"


def read_gguf(path: Path, layout: Layout) -> Iterator[WholeTensor]:
    """Read a model's tensors from a GGUF file, decoded by the gguf library and put together by the file's layout.

    Raises UserError for a file that claims what it doesn't hold.
    """
    checked_gguf(path, str(path))
    try:
        yield from _read_tensors(GGUFReader(path), layout)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:  # of what keys or rows lack
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})") from error


def _read_tensors(reader: GGUFReader, layout: Layout) -> Iterator[WholeTensor]:
    most = sum(int(tensor.n_elements) for tensor in reader.tensors)
    yield from put_together(map(_decoded, reader.tensors), layout, most)


def _decoded(tensor: ReaderTensor) -> Flat:
    """A GGUF tensor's name, values and codes."""
    kind, codes = tensor.tensor_type.name, None
    if kind in BLOCK_TYPES:
        rows = tensor.data.reshape(math.prod(tensor.data.shape[:-1]), -1).view(np.uint8)
        codes = unpack_codes(kind, rows).reshape(-1)
    return Flat(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1), codes)
