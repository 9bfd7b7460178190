"""Write a stand-alone GGUF file (llama.cpp) from a transformers model in memory, and read it back.

Every parameter of the model becomes exactly one tensor: packed blocks are stored as given, with rows in llama.cpp's
order; all others in one plain dtype. Vectors and position embeddings stay float32, as in llama.cpp's own converter.
Tensors are converted one by one while the file is written.
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
from gptq_awq.models.gguf_claims import checked_gguf
from gptq_awq.models.offload import Residence, homes

__all__ = ["StoredTensor", "check_architecture", "modelfile", "read_gguf", "rows", "vocabulary", "write_gguf"]

Array = np.ndarray[Any, np.dtype[Any]]
Packed = Mapping[str, tuple[str, UInt8[np.ndarray, "out row_bytes"]]]
"""Module name → block type and packed bytes, with rows in the module's order."""

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
    """Write a GGUF file that llama.cpp runs without any other file.

    Args:
        path: path of the file to write.
        model: model whose parameters are written, except for the weights in `packed`.
        tokenizer: transformers fast tokenizer; None writes a file without one, for engines fed with token ids.
        packed: packed linears and embeddings. A tied output layer may be packed separately from the embedding.
        plain_dtype: dtype of the matrices that are not packed: F32, F16 or BF16.
        description: metadata; `name`, `description`, `license`, `url` … go to `general.KEY`, keys with a dot are
            written unchanged.
        pre: llama.cpp's name of the pre-tokenizer; None recognizes it by its content.

    Raises:
        UserError: an architecture or a tokenizer that llama.cpp doesn't support, a weight that overflows `plain_dtype`.
        ValueError: a name in `packed` that the model doesn't have, or a shape that differs from its module's.
    """
    if plain_dtype not in PLAIN:
        raise UserError(f"export.gguf.plain_dtype={plain_dtype}: choose one of {', '.join(PLAIN)}")
    config = model.config
    check_architecture(config)
    embedding = model.get_input_embeddings().get_parameter("weight")
    vocab = vocabulary(tokenizer, len(embedding), pre) if tokenizer is not None else None
    tensors = list(_tensors(model, packed, plain_dtype))
    writer = GGUFWriter(path, architecture(config).name)
    try:
        _add_general(writer, model, packed, plain_dtype, description)
        add_hyperparameters(writer, config)
        writer.add_vocab_size(len(embedding))
        _add_tokenizer(writer, vocab)
        _write(writer, tensors)
    finally:
        writer.close()


@dataclass(frozen=True)
class _Tensor:
    """One tensor to be written; `load` converts its data to bytes when its turn comes."""

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
    """File type: the block type of most weights in the blocks; for k-quants with suffix S if uniform, M if mixed."""
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


def _add_tokenizer(writer: GGUFWriter, vocab: Vocabulary | None) -> None:
    if vocab is None:
        writer.add_tokenizer_model("none")
    else:
        vocab.write(writer)


def _tensors(model: PreTrainedModel, packed: Packed, plain_dtype: str) -> Iterator[_Tensor]:
    """Tensors of the file in its order: weights and biases of all modules, then Llama 3.1's rope factors."""
    arch, embedding = architecture(model.config), model.get_input_embeddings().get_parameter("weight")
    parameters, residences = dict(model.named_parameters(remove_duplicate=False)), homes(model)
    for name, module in _modules(model, arch, packed).items():
        weight, order = parameters[f"{module}.weight"], arch.order(name, model.config)
        shared = arch.outer["token_embd"] if weight is embedding else module  # a tied head that must be stored
        blocks = packed.get(module) or packed.get(shared)
        flipped = isinstance(model.get_submodule(module), Conv1D)
        if blocks is not None:
            yield _packed_tensor(f"{name}.weight", module, weight.T if flipped else weight, blocks, order)
        elif weight.dim() == 1:
            yield _plain_tensor(f"{name}.weight", weight, "F32", order, residences, shift=arch.norm_shift)
        else:
            kind = "F32" if name == "position_embd" else plain_dtype
            yield _plain_tensor(f"{name}.weight", weight, kind, order, residences, flipped=flipped)
        if (bias := parameters.get(f"{module}.bias")) is not None:
            yield _plain_tensor(f"{name}.bias", bias, "F32", order, residences)
    if (factors := rope_factors(model.config)) is not None:
        yield _plain_tensor("rope_freqs.weight", torch.from_numpy(factors), "F32", None, residences)


def _modules(model: PreTrainedModel, arch: Architecture, packed: Packed) -> dict[str, str]:
    """GGUF tensor → module to be written; a tied head only if packed separately or required by the architecture.

    Raises:
        UserError: a packed head that the architecture can't store, a parameter without a tensor, or a missing one.
        ValueError: a packed name that is not among the modules.
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


def _packed_tensor(name: str, module: str, weight: Tensor, packed: tuple[str, Array], order: Array | None) -> _Tensor:
    """Tensor of packed blocks, rows in llama.cpp's order. Raises ValueError if the bytes don't fit the shape."""
    kind, data = GGMLQuantizationType[packed[0]], packed[1]
    if gguf.quant_shape_to_byte_shape(tuple(weight.shape), kind) != data.shape:
        raise ValueError(f"{module}: {data.shape} bytes of {kind.name} don't hold {tuple(weight.shape)} weights")
    return _Tensor(
        name, kind, tuple(weight.shape), lambda: np.ascontiguousarray(data if order is None else data[order])
    )


def _plain_tensor(
    name: str,
    weight: Tensor,
    dtype: str,
    order: Array | None,
    residences: Mapping[int, Residence],
    shift: int = 0,
    flipped: bool = False,
) -> _Tensor:
    """Tensor of an unquantized parameter, rows in llama.cpp's order; loading raises UserError on overflow.

    Args:
        name: name of the GGUF tensor.
        weight: parameter of the model, possibly offloaded.
        dtype: F32, F16 or BF16.
        order: row order in llama.cpp; None for the module's.
        residences: id of a parameter → what loads it, for offloaded parameters.
        shift: constant that is added to the values.
        flipped: whether the weight is stored transposed in the module (Conv1D).
    """

    def load() -> Array:
        home = residences.get(id(weight))
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
    """One tensor read from a GGUF file, in transformers' naming and row order.

    Attributes:
        name: module name such as "model.layers.0.self_attn.q_proj"; for a bias, with ".bias" appended.
        ggml_type: type name such as "Q4_K" or "F16".
        data: stored bytes, (out, row_bytes) with rows in transformers' order; (n, 4) for a vector.
        weight: dequantized float32 weight in transformers' row order, without Gemma's shift of norms.
    """

    name: str
    ggml_type: str
    data: UInt8[np.ndarray, "out row_bytes"]
    weight: Float[np.ndarray, "..."]


def read_gguf(path: Path) -> Iterator[StoredTensor]:
    """Read the tensors of a GGUF file, decoded by the gguf library.

    Tensors that are no module's parameter (`rope_freqs`) are skipped. Raises UserError for an architecture that is
    not in ARCHITECTURES, and for a file that claims what it doesn't hold.
    """
    checked_gguf(path, str(path))
    try:
        yield from _read_tensors(GGUFReader(path), path)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:  # of what keys or rows lack
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})") from error


def _read_tensors(reader: GGUFReader, path: Path) -> Iterator[StoredTensor]:
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
    """Architecture of a GGUF file, and a minimal config with the fields that row orders depend on."""
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
