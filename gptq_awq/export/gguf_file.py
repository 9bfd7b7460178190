"""A stand-alone GGUF file (llama.cpp) from a transformers model in memory, and back.

Every parameter of the model becomes exactly one tensor: packed blocks as they are given, their rows reordered
where llama.cpp wants them otherwise; the rest in one plain type. Vectors and position embeddings stay float32, as
llama.cpp's own converter leaves them. Tensors are converted one by one while the file is written.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptq_awq.errors import UserError
from gptq_awq.export.gguf_architecture import (
    ARCHITECTURES,
    Architecture,
    add_hyperparameters,
    architecture,
    check_architecture,
    rope_factors,
    rows,
)
from gptq_awq.export.gguf_tokenizer import Vocabulary, modelfile, vocabulary
from gptq_awq.models.offload import Residence, homes

__all__ = ["StoredTensor", "check_architecture", "modelfile", "read_gguf", "rows", "vocabulary", "write_gguf"]

Array = np.ndarray[Any, np.dtype[Any]]
Packed = Mapping[str, tuple[str, UInt8[np.ndarray, "out row_bytes"]]]
"""Module name → ggml type and bytes, rows in the module's own order."""

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    packed: Packed,
    plain_dtype: str,
    description: Mapping[str, str],
    pre: str | None = None,
) -> None:
    """Write a GGUF file that llama.cpp runs without any other.

    Args:
        path: of the file.
        model: its parameters are written, but for those in `packed`.
        tokenizer: a fast tokenizer; None writes a file without one, for engines fed with token ids.
        packed: linears and embeddings as blocks. A tied output layer may be packed apart from the embedding.
        plain_dtype: F32, F16 or BF16, of the matrices that are not packed.
        description: `name`, `description`, `license`, `url` … go to `general.KEY`, a key with a dot is written as
            it is.
        pre: llama.cpp's name of the pre-tokenizer, where it is not recognized.

    Raises:
        UserError: an architecture or a tokenizer that llama.cpp doesn't have, a weight beyond `plain_dtype`.
        ValueError: a name in `packed` that the model doesn't have, or a shape that isn't its module's.
    """
    if plain_dtype not in PLAIN:
        raise UserError(f"export.gguf.plain_dtype={plain_dtype}: choose one of {', '.join(PLAIN)}")
    config = model.config
    check_architecture(config)
    embedding = model.get_input_embeddings().get_parameter("weight")
    words = vocabulary(tokenizer, len(embedding), pre) if tokenizer is not None else None
    tensors = list(_tensors(model, packed, plain_dtype))
    writer = GGUFWriter(path, architecture(config).name)
    try:
        _add_general(writer, model, packed, plain_dtype, description)
        add_hyperparameters(writer, config)
        writer.add_vocab_size(len(embedding))
        _add_tokenizer(writer, words)
        _write(writer, tensors)
    finally:
        writer.close()


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file; `load` makes its bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    load: Callable[[], Array]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return gguf.quant_shape_to_byte_shape(self.shape, self.kind)


def _write(writer: GGUFWriter, tensors: list[_Tensor]) -> None:
    for tensor in tensors:
        size = int(np.prod(tensor.byte_shape))
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), size, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.load())


def _add_general(
    writer: GGUFWriter, model: PreTrainedModel, packed: Packed, plain_dtype: str, description: Mapping[str, str]
) -> None:
    writer.add_type("model")
    fields = {"name": Path(model.config._name_or_path).name or "model"} | dict(description)
    for key, value in fields.items():
        writer.add_string(key if "." in key else f"general.{key}", value)
    writer.add_file_type(_file_type(model, packed, plain_dtype))
    if packed:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _file_type(model: PreTrainedModel, packed: Packed, plain_dtype: str) -> LlamaFileType:
    """What most weights of the blocks are; a k-quant is "S" where they all are it, else "M" (a mix)."""
    blocks = f"{architecture(model.config).blocks}."
    inside = {name: value for name, value in packed.items() if name.startswith(blocks)} or packed
    count: Counter[str] = Counter()
    for kind, data in inside.values():
        block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        count[kind] += data.size // size * block
    if not count:
        return LlamaFileType.ALL_F32 if plain_dtype == "F32" else LlamaFileType[f"MOSTLY_{plain_dtype}"]
    kind = count.most_common(1)[0][0]
    if kind in ("Q3_K", "Q4_K", "Q5_K"):
        kind += "_S" if len(count) == 1 else "_M"
    return LlamaFileType[f"MOSTLY_{kind}"]


def _add_tokenizer(writer: GGUFWriter, words: Vocabulary | None) -> None:
    if words is None:
        writer.add_tokenizer_model("none")
    else:
        words.write(writer)


def _tensors(model: PreTrainedModel, packed: Packed, plain_dtype: str) -> Iterator[_Tensor]:
    arch, embedding = architecture(model.config), model.get_input_embeddings().get_parameter("weight")
    parameters, at = dict(model.named_parameters(remove_duplicate=False)), homes(model)
    for name, module in _modules(model, arch, packed).items():
        weight, order = parameters[f"{module}.weight"], arch.order(name, model.config)
        shared = arch.outer["token_embd"] if weight is embedding else module  # a tied head, where it must be stored
        blocks = packed.get(module) or packed.get(shared)
        flipped = isinstance(model.get_submodule(module), Conv1D)
        if blocks is not None:
            yield _blocks(f"{name}.weight", module, weight.T if flipped else weight, blocks, order)
        elif weight.dim() == 1:
            yield _plain(f"{name}.weight", weight, "F32", order, at, shift=arch.norm_shift)
        else:
            kind = "F32" if name == "position_embd" else plain_dtype
            yield _plain(f"{name}.weight", weight, kind, order, at, flipped=flipped)
        if (bias := parameters.get(f"{module}.bias")) is not None:
            yield _plain(f"{name}.bias", bias, "F32", order, at)
    if (factors := rope_factors(model.config)) is not None:
        yield _plain("rope_freqs.weight", torch.from_numpy(factors), "F32", None, at)


def _modules(model: PreTrainedModel, arch: Architecture, packed: Packed) -> dict[str, str]:
    """GGUF tensor → module, of what is written: a tied head only where it is packed apart, or has to be there.

    Raises for a packed name that is none of them, a parameter that would be lost, and one that is missing.
    """
    modules = dict(arch.modules(model.config.num_hidden_layers))
    head = modules["output"]
    if arch.head == "embedding" and head in packed:
        raise UserError(f"export.formats: gguf's {arch.name} has no output layer but the embedding: quantize that")
    if unknown := sorted(set(packed) - set(modules.values())):
        raise ValueError(f"gguf's {arch.name} has no module {unknown[0]}")
    expected = {f"{module}.{suffix}" for module in modules.values() for suffix in ("weight", "bias")}
    given = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if lost := sorted(given - expected):
        raise UserError(
            f"export.formats: gguf's {arch.name} has no place for {lost[0]}; choose another format, such as hf"
        )
    if missing := [module for module in modules.values() if f"{module}.weight" not in given]:
        raise UserError(f"export.formats: gguf's {arch.name} needs {missing[0]}, which the model lacks")
    if _is_tied(model) and arch.head != "output" and head not in packed:
        del modules["output"]
    return modules


def _is_tied(model: PreTrainedModel) -> bool:
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [layer.get_parameter("weight") for layer in layers if layer is not None]
    return len(weights) == 2 and weights[0] is weights[1]


def _blocks(name: str, module: str, weight: Tensor, packed: tuple[str, Array], order: Array | None) -> _Tensor:
    kind, data = GGMLQuantizationType[packed[0]], packed[1]
    if gguf.quant_shape_to_byte_shape(tuple(weight.shape), kind) != data.shape:
        raise ValueError(f"{module}: {data.shape} bytes of {kind.name} don't hold {tuple(weight.shape)} weights")
    return _Tensor(
        name, kind, tuple(weight.shape), lambda: np.ascontiguousarray(data if order is None else data[order])
    )


def _plain(
    name: str,
    weight: Tensor,
    dtype: str,
    order: Array | None,
    at: Mapping[int, Residence],
    shift: int = 0,
    flipped: bool = False,
) -> _Tensor:
    def load() -> Array:
        home = at.get(id(weight))
        with home.held() if home else nullcontext():
            value = weight.detach().T if flipped else weight.detach()
            value = value.to("cpu", torch.float32) + shift if shift else value.cpu()
            stored = value.to(PLAIN[dtype])
        if not torch.isfinite(stored).all():
            raise UserError(f"export.gguf.plain_dtype={dtype} cannot hold {name}: choose BF16 or F32")
        stored = stored if order is None else stored[torch.from_numpy(order)]
        return stored.contiguous().view(torch.uint8).numpy()

    shape = weight.shape[::-1] if flipped else weight.shape
    return _Tensor(name, GGMLQuantizationType[dtype], tuple(shape), load)


class StoredTensor(NamedTuple):
    """One tensor of a GGUF file, in transformers' terms.

    Attributes:
        name: of the module, "model.layers.0.self_attn.q_proj"; of a bias, with ".bias" behind it.
        ggml_type: "Q4_K", "F16" …
        data: the stored bytes, rows in transformers' order; (out, row_bytes); of a vector, (n, 4).
        weight: the dequantized float32 weight in transformers' order and without Gemma's shift of norms.
    """

    name: str
    ggml_type: str
    data: UInt8[np.ndarray, "out row_bytes"]
    weight: Float[np.ndarray, "..."]


def read_gguf(path: Path) -> Iterator[StoredTensor]:
    """The tensors of a file of an architecture in ARCHITECTURES, decoded by the gguf library.

    What is no module's parameter (`rope_freqs`) is left out. Raises UserError for other architectures.
    """
    reader = GGUFReader(path)
    arch, config = _architecture(reader, path)
    modules = dict(arch.modules(config.num_hidden_layers))
    for tensor in reader.tensors:
        name, _, suffix = tensor.name.rpartition(".")
        if name not in modules:
            continue
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        data = tensor.data.reshape(len(tensor.data), -1).view(np.uint8)
        if (order := arch.order(name, config)) is not None:
            back = np.argsort(order)
            weight, data = weight[back], data[back]
        if weight.ndim == 1 and suffix == "weight":
            weight = weight - np.float32(arch.norm_shift)
        module = modules[name] if suffix == "weight" else f"{modules[name]}.{suffix}"
        yield StoredTensor(module, tensor.tensor_type.name, data, weight)


def _architecture(reader: GGUFReader, path: Path) -> tuple[Architecture, Any]:
    """A file's architecture, and as much of a config as the order of rows depends on."""
    name = reader.fields["general.architecture"].contents()
    known = {arch.name: arch for arch in ARCHITECTURES.values()}
    if name not in known:
        raise UserError(f"{path}: {name} is not among {', '.join(known)}")

    def field(key: str) -> Any:
        found = reader.fields.get(f"{name}.{key}")
        return found.contents() if found else None

    config = SimpleNamespace(
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        hidden_size=field("embedding_length"),
        head_dim=field("attention.key_length"),
    )
    return known[name], config
