"""Squares of the linears' inputs from an importance matrix; statistics of inputs for exports and static scales."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_awq.calibration.input_statistics import InputStatistics, as_file, from_file, input_statistics
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.experiment.plan import Plan
from gptq_awq.export.imatrix import read_imatrix, squares_by_module
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.models.load import LoadedModel
from gptq_awq.runtime.fingerprint import observations_sha256
from gptq_awq.runtime.progress import Track
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.checksummed import once


def given_squares(plan: Plan, loaded: LoadedModel) -> dict[str, Tensor] | None:
    """Mean squares of the linears' inputs by full name, (in,) each, from data.imatrix; None where none is given.

    Raises:
        UserError: a method that needs more than squares; a file that is no importance matrix of this model.
    """
    path = plan.data.imatrix
    if path is None:
        return None
    method = plan.method
    needs = [method.solver.name] if method.solver is not None and method.solver.needs_hessian else []
    needs += [each.name for each in method.block_transforms] + list(method.tuning)
    if needs:
        raise UserError(
            f"data.imatrix: holds squares of single inputs, and {needs[0]} needs their products; choose method=rtn "
            "grid.search=hessian, or data.imatrix=null"
        )
    squares = squares_by_module(read_imatrix(Path(path).expanduser()), loaded.model)
    prefix, blocks = find_blocks(loaded.model)
    linears = [f"{prefix}.{name}" for name, module in blocks.named_modules() if is_linear(module)]
    if missing := [name for name in linears if name not in squares]:
        raise UserError(
            f"data.imatrix={path}: has no entry for {missing[0]} ({len(missing)} of {len(linears)} missing)"
        )
    for name in linears:
        if squares[name].shape[1] != matrix(loaded.model.get_submodule(name)).shape[1]:
            raise UserError(f"data.imatrix={path}: is of another model: {name} has other columns there")
    return {name: torch.from_numpy(own[0]) for name, own in squares.items()}


def check_static(plan: Plan) -> None:
    """Refuse static scales of inputs where calibration can't see the inputs that will be rounded.

    Raises:
        UserError: naming the option: transforms change the inputs afterwards, an importance matrix stands for the text,
            or scales are of the cache.
    """
    if plan.kv.static:
        raise UserError("kv.static=true: a cache's scales are each token's own; leave kv.static out")
    static = [f"export.{each.name}.activations" for each in plan.exports.formats if _stores_inputs(each)]
    static += ["act.static=true"] if plan.act.static else []
    if static and plan.method.transforms:
        raise UserError(
            f"{static[0]}: static scales are of full precision's inputs, which {next(iter(plan.method.transforms))} "
            "changes; choose a method without transforms, or dynamic scales"
        )
    if plan.act.static and plan.data.imatrix is not None:
        raise UserError(
            "act.static=true: an importance matrix holds no largest inputs; give a text instead of data.imatrix"
        )


def _stores_inputs(format_: Any) -> bool:
    return getattr(format_, "calibrates", False) and format_.name != "imatrix"


def needs_inputs(plan: Plan) -> bool:
    """Whether statistics of the full-precision model's inputs are wanted, by a format or by static scales."""
    return plan.exports.calibrate or plan.act.static


def input_statistics_of(
    plan: Plan, loaded: LoadedModel, tokens: TokenSet | None, track: Track
) -> Mapping[str, InputStatistics] | None:
    """Statistics of the full-precision model's inputs, where `needs_inputs`; cached."""
    if tokens is None or not needs_inputs(plan):
        return None
    key = observations_sha256(loaded.model, loaded.sha256, tokens.sha256, torch.float32, plan.settings.tokens_per_batch)
    content = once(
        cache_dir() / "curvatures" / f"inputs-{key}.safetensors",
        "statistics of the linears' inputs",
        lambda: as_file(input_statistics(loaded.model, tokens, track)),
    )
    return dict(from_file(content))


def largest_inputs(plan: Plan, inputs: Mapping[str, InputStatistics] | None) -> dict[str, float] | None:
    """Largest input of every linear, where activations have static scales.

    Raises:
        UserError: no token of the calibration text reached a linear.
    """
    if not plan.act.static or inputs is None:
        return None
    unseen = [name for name, own in inputs.items() if not own.tokens]
    if unseen:
        raise UserError(
            f"act.static=true: no token of the calibration text reached {unseen[0]} ({len(unseen)} of {len(inputs)} "
            "linears); give more text (data.samples), or act.static=false"
        )
    return {name: own.largest for name, own in inputs.items()}
