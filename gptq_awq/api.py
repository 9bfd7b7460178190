"""The library, for notebooks: quantize one weight, or one model in memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptq_awq.data import TokenSet, make_token_set
from gptq_awq.errors import UserError
from gptq_awq.grids.base import GridChoice, QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.moments import Moments
from gptq_awq.pipeline.method import Method
from gptq_awq.pipeline.quantize import Settings, quantize
from gptq_awq.progress import Track, no_track
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class QuantizedModel:
    """A model quantized in place, with what a checkpoint and a ledger need.

    Attributes:
        model: the model that was passed in; its linears hold dequantized weights.
        weights: module name → codes, scales, zeros.
        ledger: one row per linear.
    """

    model: nn.Module
    weights: dict[str, QuantizedWeight] = field(repr=False)
    ledger: list[dict[str, Any]] = field(repr=False)


def quantize_weight(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"] | None = None,
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 64,
    sym: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    mse: bool = False,
    block_size: int = 128,
) -> QuantizedWeight:
    """Quantize one weight matrix, given the second moments of its input.

    Args:
        weight: (out, in).
        hessian: (in, in), Σ x xᵀ at any scale, not damped. `rtn` needs none.
        method: "gptq" or "rtn". (AWQ changes the layers before this one: see `quantize_model`.)
        bits: 2 to 8.
        group_size: columns that share a scale; -1 for per channel.
        sym: symmetric grid.
        act_order: round columns in order of falling diag(H).
        static_groups: fit all groups before rounding.
        damping: fraction of the mean diagonal of H added to the diagonal.
        mse: search for the range of least weight error, as the GPTQ code does.
        block_size: columns per lazy update.

    Returns:
        codes, scales, zeros, `dequantize()` and `loss` (½ tr(ΔHΔᵀ), as the GPTQ code sums it).

    Raises:
        UserError: unknown method, bits or group size; shapes that don't fit; non-finite input.
        NotPositiveDefiniteError: no damping made H positive definite.
    """
    if method not in ("gptq", "rtn"):
        raise UserError(f"method={method}: quantize_weight knows gptq and rtn; quantize_model knows every preset")
    if weight.dim() != 2:
        raise UserError(f"weight has shape {tuple(weight.shape)}: give a matrix (out, in)")
    columns = weight.shape[1]
    if hessian is None and method == "gptq":
        raise UserError("hessian is missing: GPTQ needs Σ x xᵀ of the layer's inputs (method='rtn' does not)")
    if hessian is not None and hessian.shape != (columns, columns):
        raise UserError(f"hessian has shape {tuple(hessian.shape)}: the weight's {columns} columns want a square of it")
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise UserError(f"{name} has non-finite values")
    grid = IntGrid(bits, group_size, sym, "mse" if mse else "minmax")
    solver = GPTQ(act_order, static_groups, damping, block_size) if method == "gptq" else RTN()
    moments = None
    if hessian is not None:
        h = hessian.float()
        moments = Moments(h, h.diagonal().clamp(min=0).sqrt(), tokens=1)
    return solver.solve(weight.detach().float(), moments, grid).quantized


def quantize_model(
    model: nn.Module,
    calibration: Int[Tensor, "n seqlen"] | TokenSet | None = None,
    method: str | Method = "awq",
    bits: int = 4,
    group_size: int = 64,
    sym: bool = False,
    *,
    grid: GridChoice | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    track: Track = no_track,
) -> QuantizedModel:
    """Quantize all linears in a causal LM's blocks, in place.

    Args:
        model: a transformers causal LM in eval mode.
        calibration: token ids, one row per window; may be None for methods that need no data.
        method: a preset's name (configs/method), or a Method.
        bits: 2 to 8.
        group_size: columns that share a scale; -1 for per channel.
        sym: symmetric grid.
        grid: instead of bits, group_size and sym: any grid, or mix of them.
        settings: how calibration computes.
        track: reports progress, see `gptq_awq.progress`.

    Raises:
        UserError: as `gptq_awq.pipeline.quantize.quantize` does.
    """
    search: dict[str, Any] = {}
    if isinstance(method, str):
        method, search = load_method(method)
    if isinstance(calibration, Tensor):
        calibration = make_token_set("calibration", calibration.cpu(), None, "memory")
    options: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "scale_dtype": "float16",
    } | search
    done = QuantizedModel(model, {}, [])
    for block in quantize(model, calibration, method, grid or IntGrid(**options), settings, track):
        done.weights.update(block.weights)
        done.ledger.extend(block.rows)
    return done


def load_method(name: str) -> tuple[Method, dict[str, Any]]:
    """A preset of configs/method, and what it changes about the grid.

    Raises:
        UserError: there is no such preset; the message names those there are.
    """
    known = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
    if name not in known:
        raise UserError(f"method={name}: choose one of {', '.join(known)}")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=[f"method={name}"])
    return instantiate(composed.method, _convert_="all"), {"search": composed.grid.search}
