"""The table of formats that the verifier reads: a checkpoint's record names one of these, and nothing else is built."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gptq_awq.errors import UserError
from gptq_awq.export.awq import AWQFormat
from gptq_awq.export.base import Format
from gptq_awq.export.bnb import BnbFormat
from gptq_awq.export.compressed_tensors import CompressedTensorsFormat
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.gptq import GPTQFormat
from gptq_awq.export.hf import HFFormat
from gptq_awq.export.imatrix import ImatrixFormat
from gptq_awq.export.mlx import MLXFormat

_KINDS = (GPTQFormat, AWQFormat, CompressedTensorsFormat, GGUFFormat, MLXFormat, BnbFormat, HFFormat, ImatrixFormat)
FORMATS: Mapping[str, Any] = {kind.name: kind for kind in _KINDS}
"""Name of a format, as in export.formats → its class."""


def make_format(name: Any, options: Any) -> Format:
    """Build the format that a record names, with the options it names.

    Raises:
        UserError: a format that is not in the table, an option that it doesn't have, or a value that it doesn't take.
    """
    kind = FORMATS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UserError(f"format {name!r:.100} is not one that this version reads: {', '.join(FORMATS)}")
    known = {field.name for field in fields(kind)}
    if not isinstance(options, Mapping):
        raise UserError(f"options of {name} must be a map")
    if unknown := [key for key in options if key not in known]:
        raise UserError(f"{name} has no option {unknown[0]!r:.100}; it has {', '.join(sorted(known))}")
    return kind(**options)
