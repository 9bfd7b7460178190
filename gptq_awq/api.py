"""The library, for notebooks: quantize one weight or one model in memory, and look at what was calibrated on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptq_awq.calibration.activations import open_activations
from gptq_awq.calibration.chain import check_chain, why_not_alone
from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.calibration.moments import Moments
from gptq_awq.calibration.observation import Observer, passing
from gptq_awq.data.tokens import TokenSet, make_token_set
from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, GridChoice, QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models.blocks import find_blocks, heads_of
from gptq_awq.models.experts import unfuse
from gptq_awq.models.left import mark_left
from gptq_awq.models.linear import Site, matrix
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import Settings, examine, quantize
from gptq_awq.runtime.configs import CONFIGS
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN


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
    experts: ExpertPolicy = ExpertPolicy(),  # noqa: B008 (frozen)
    head: str | None = None,
    untie_head: bool = False,
) -> QuantizedModel:
    """Quantize all linears in a causal LM's blocks, in place.

    Fused experts become linears, which `gptq_awq.models.experts.fuse` puts together again for saving.

    Args:
        model: a transformers causal LM in eval mode.
        calibration: token ids, one row per window; may be None for methods that need no data.
        method: a preset's name (configs/method), which may have a grid of its own, or a Method.
        bits: 2 to 8.
        group_size: columns that share a scale; -1 for per channel.
        sym: symmetric grid.
        grid: instead of the preset's, of bits, group_size and sym: any grid, or mix of them.
        settings: how calibration computes.
        track: reports progress, see `gptq_awq.runtime.progress`.
        experts: what calibrates experts that few tokens reach.
        head: what becomes of the output head, None, "rtn" or "solve", and
        untie_head: whether a tied one may get a matrix of its own for that: see `Method`.

    Raises:
        UserError: as `gptq_awq.quantization.quantize.quantize` and `load_method` do.
    """
    own: GridChoice | None = None
    if isinstance(method, str):
        method, own = load_method(method) if grid else load_method(method, bits, group_size, sym)
    if isinstance(calibration, Tensor):
        calibration = make_token_set("calibration", calibration.cpu(), None, "memory")
    if head is not None or untie_head:
        method = replace(method, head=head, untie_head=untie_head)
    if method.self_calibration is not None and calibration is not None:
        dtype = resolve_compute_dtype(settings.compute_dtype, next(model.parameters()).device)
        calibration = method.self_calibration.extend(model, calibration, dtype, track)
    grid = grid or own or IntGrid(bits, group_size, sym, scale_dtype="float16")
    done = QuantizedModel(model, {}, [])
    if (coverage := examine(model, calibration, method, grid)) is not None:
        coverage.tell()
    for block in quantize(model, calibration, method, grid, settings, track, experts=experts):
        done.weights.update(block.weights)
        done.ledger.extend(block.rows)
    return done


@dataclass(frozen=True)
class SiteInput:
    """Input of one site of a model, as calibration saw it.

    Attributes:
        block: index of the site's block.
        site: names within the block, and the absorber where one was looked for.
        linears: the names, in the model, of the linears that read this input.
        moments: of the input.
    """

    block: int
    site: Site
    linears: tuple[str, ...]
    moments: Moments = field(repr=False)


def observe_moments(
    model: nn.Module,
    calibration: Int[Tensor, "n seqlen"] | TokenSet,
    absorbers: bool = False,
    settings: Settings = Settings(compute_dtype="float32"),  # noqa: B008 (frozen)
) -> Iterator[SiteInput]:
    """Gather the moments of every site's input in the model as it is, block by block, in the order that sites run.

    Fused experts become linears; those that few tokens reach are shown as all tokens (`ExpertPolicy`) meet them.

    Each Hessian has (columns of the input)² floats: of a large model, keep only those that are wanted.

    Args:
        model: a transformers causal LM in eval mode; it is not changed.
        calibration: token ids, one row per window.
        absorbers: also find the op that can take over a scaling of each site's input, as AWQ needs.
        settings: how forwards compute.

    Raises:
        UserError: non-finite activations; no token at all.
    """
    if isinstance(calibration, Tensor):
        calibration = make_token_set("calibration", calibration.cpu(), None, "memory")
    unfuse(model)
    mark_left(model, calibrates=True)
    check_chain(model, calibration, calibrates=True)
    prefix, blocks = find_blocks(model)
    dtype = resolve_compute_dtype(settings.compute_dtype, next(model.parameters()).device)
    walked = why_not_alone(model, calibration) is not None
    activations = open_activations(model, blocks, calibration, settings.tokens_per_batch, dtype, walked=walked)
    heads = heads_of(model)
    for block, seen in enumerate(passing(Observer(activations, absorbers, heads), blocks, dtype)):
        for site, moments in zip(seen.sites, seen.moments, strict=True):
            yield SiteInput(block, site, tuple(f"{prefix}.{block}.{name}" for name in site.linears), moments)


@contextmanager
def with_weights(model: nn.Module, weights: Mapping[str, QuantizedWeight | Tensor]) -> Iterator[None]:
    """Give the named linears other weights, (out, in) each, for the body of a `with` statement.

    So a model can be scored with one layer quantized, or with each at the width of your choice.

    Raises:
        UserError: a name that the model has no linear of.
    """
    try:
        held = {name: matrix(model.get_submodule(name)) for name in weights}
    except AttributeError as error:
        raise UserError(f"weights: the model has no linear of that name ({error})") from error
    own = {name: weight.clone() for name, weight in held.items()}
    try:
        for name, weight in weights.items():
            held[name].copy_(weight if isinstance(weight, Tensor) else weight.dequantize())
        yield
    finally:
        for name, weight in own.items():
            held[name].copy_(weight)


_NOT_OF_A_METHOD = ("model", "data", "eval", "export", "tracking")
"""Groups that no method reads; composing them takes as long as all others."""


def load_method(name: str, bits: int = 4, group_size: int = 64, sym: bool = False) -> tuple[Method, Grid]:
    """Load a preset of configs/method, and the grid that it rounds weights onto.

    Raises:
        UserError: there is no such preset; the message names those there are. Bits, group_size or sym that its grid
            doesn't have.
    """
    known = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
    if name not in known:
        raise UserError(f"method={name}: choose one of {', '.join(known)}")
    wanted = {"bits": bits, "group_size": group_size, "sym": sym}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=[f"method={name}", *(f"~{group}" for group in _NOT_OF_A_METHOD)])
    composed.merge_with(wanted)
    method, grid = (instantiate(node, _convert_="all") for node in (composed.method, composed.grid))
    for key, value in wanted.items():
        if value and getattr(grid, key, None) != value:
            raise UserError(f"{key}={value}: method={name} rounds onto grid={grid.label}, which has none; pass a grid")
    return method, grid
