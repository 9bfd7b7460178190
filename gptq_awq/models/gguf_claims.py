"""Claims of a GGUF file on its model, checked against the tensors that it holds before anything is built by them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_awq.errors import UserError
from gptq_awq.storage.headers import GGUFHeader, check_gguf


def checked_gguf(path: Path, option: str) -> GGUFHeader:
    """Read the header of a GGUF file, which the gguf library and transformers may then read within bounds.

    Raises:
        UserError: naming `option`, where the file can't be read, or describes a model that its tensors are not of.
    """
    try:
        header = check_gguf(path)
        _check_claims(header)
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: cannot be loaded: {' '.join(str(error).split())}") from error
    return header


def _check_claims(header: GGUFHeader) -> None:
    """Raise ValueError for a number of layers or a width that no tensor has: modules would be made by it."""
    fields, shapes = header.fields, header.shapes
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("it names no general.architecture")
    widest = max((length for shape in shapes.values() for length in shape), default=0)
    for key, most in (
        ("block_count", len(shapes)),
        *((key, widest) for key in ("embedding_length", "feed_forward_length", "vocab_size", "expert_count")),
        *((key, widest) for key in ("attention.head_count", "attention.head_count_kv", "attention.key_length")),
        ("attention.value_length", widest),
    ):
        value = fields.get(f"{architecture}.{key}")
        if value is not None and (type(value) is not int or not 0 <= value <= most):
            raise ValueError(f"it claims {architecture}.{key}={str(value)[:50]}, which its tensors do not have")
    _check_embedding(shapes, _claimed(fields, architecture, "embedding_length"))
    layers = _claimed(fields, architecture, "block_count")
    if layers and not any(name.startswith(f"blk.{layers - 1}.") for name in shapes):
        raise ValueError(f"it claims {layers} layers, and has no tensor of the last")


def _check_embedding(shapes: Mapping[str, tuple[int, ...]], width: int | None) -> None:
    embedding = shapes.get("token_embd.weight")
    if embedding is not None and width is not None and embedding[0] != width:
        raise ValueError(f"it claims a width of {width}, and its embedding has {embedding[0]}")


def _claimed(fields: Mapping[str, Any], architecture: str, key: str) -> int | None:
    value = fields.get(f"{architecture}.{key}")
    return value if type(value) is int else None
