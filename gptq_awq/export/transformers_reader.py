"""Check of transformers' reader for packed formats, before calibration: it builds a model whose linears are packed.

Some classes initialize the weights of certain linears, or tie them between layers, whatever is loaded; a packed linear
has no such weight, unless the config says that all weights are to be expanded while they are loaded. Others rename,
split or join tensors as they load them, by rules made for plain weights. The checkpoint is whole, and other engines may
read it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from gptq_awq.errors import UserError
from gptq_awq.export.base import Format, LinearSpec, Source
from gptq_awq.export.engine_check import check_engine
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.models.offload import offloaded
from gptq_awq.solvers.rtn import RTN

READERS = {"compressed_tensors": "transformers", "gptq": "gptqmodel", "awq": "gptqmodel"}
"""Format → the engine that reads it for transformers."""
LARGEST = 500_000_000
"""Parameters of the largest model that is written and loaded for the check."""


def unread(model: PreTrainedModel, linears: Sequence[LinearSpec], format_: Format, tokenizer: Any = None) -> str | None:
    """Say why transformers can't read a packed checkpoint of a model; None if it can, or if it can't be tried."""
    without_weights = unbuilt(model, [linear.name for linear in linears])
    if without_weights and not getattr(format_, "expands", lambda _grids: False)([linear.grid for linear in linears]):
        return without_weights
    converted = without_weights or get_model_conversion_mapping(model, add_legacy=False)
    return misread(model, linears, format_, tokenizer) if converted else None


def unbuilt(model: PreTrainedModel, packed: Sequence[str]) -> str | None:
    """Say why transformers can't build a model in which these linears are packed; None if it can.

    No weights are made: the model is built anew without data, its packed linears lose their weight, and transformers
    initializes and ties the rest.
    """
    with torch.device("meta"):
        empty = type(model)(model.config)
    own = dict(empty.named_modules())
    for name in packed:
        if name in own and is_linear(own[name]):  # not an expert, which is fused there
            del own[name].weight
    try:
        empty.initialize_weights()
        empty.tie_weights(recompute_mapping=False)
    except AttributeError as error:
        return f"transformers can't load packed linears of {type(model).__name__} ({error}); other engines may"
    return None


def misread(model: PreTrainedModel, linears: Sequence[LinearSpec], format_: Format, tokenizer: Any) -> str | None:
    """Say what goes wrong where transformers converts or expands a model's tensors as it loads them; None if nothing.

    Only a trial tells: the model is rounded to nearest, written, and run by its reader in a process of its own.
    """
    if offloaded(model) or sum(p.numel() for p in model.parameters()) > LARGEST:
        return None
    reader = READERS[format_.name]
    with TemporaryDirectory(prefix="reader-") as path:

        def write() -> Mapping[str, QuantizedWeight]:
            weights = {linear.name: _nearest(model, linear) for linear in linears}
            format_.write(Source(model, tokenizer, "", weights), Path(path))
            return weights

        try:
            return next(iter(check_engine(reader, format_.name, model, Path(path), write, limit=1e-2)), None)
        except UserError as error:
            why = str(error).partition(": ")[2].removesuffix("; choose another format, such as hf")
            return f"{reader} can't load packed linears of {type(model).__name__} ({why}); other engines may"


def _nearest(model: PreTrainedModel, linear: LinearSpec) -> QuantizedWeight:
    """A linear's weight rounded to nearest on its grid, without a search for ranges."""
    weight = matrix(model.get_submodule(linear.name)).float().cpu()
    return RTN().solve(weight, None, linear.grid.without_search()).quantized
