"""Whether float16 holds a model's unquantized values, found out before calibration.

A weight beyond 65,504 would be infinite in the checkpoint; models that were trained in bfloat16 have some.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.base import LinearSpec
from gptq_awq.models.offload import each_tensor

LARGEST = torch.finfo(torch.float16).max


def check_overflow(format_: Any, linears: Sequence[LinearSpec], model: PreTrainedModel) -> None:
    """Raise UserError where a format stores a value that overflows its float16, naming the dtypes that hold it."""
    option = "plain_dtype" if hasattr(format_, "plain_dtype") else "dtype"
    chosen = getattr(format_, option, None)
    if chosen == "auto":  # the shortest that is exact for the grids' scales
        chosen = format_.stored_dtype(linears)
    if chosen not in ("float16", "F16"):
        return
    packed = set() if format_.name == "hf" else {f"{linear.name}.weight" for linear in linears}
    for name, tensor in each_tensor(model, lambda name: name not in packed):
        if tensor.dtype == torch.float16 or not tensor.is_floating_point() or (chosen == "F16" and tensor.dim() < 2):
            continue
        if (value := float(tensor.detach().abs().amax())) > LARGEST:
            raise UserError(
                f"export.{format_.name}.{option}={chosen}: {name} holds {value:.4g}, and float16 ends at "
                f"{LARGEST:.0f}; choose {_choices(format_, option, linears, model.config)}"
            )


def _choices(format_: Any, option: str, linears: Sequence[LinearSpec], config: Any) -> str:
    """The options under which the format takes the same grids and no value overflows."""
    wider = ("BF16", "F32") if option == "plain_dtype" else ("bfloat16", "float32")
    taken = []
    for dtype in wider:
        try:
            replace(format_, **{option: dtype}).check(linears, config)
        except UserError:
            continue
        taken.append(f"export.{format_.name}.{option}={dtype}")
    return " or ".join(taken) or f"export.{format_.name}.{option}=bfloat16 with grid.scale_dtype=bfloat16"
