"""The block loop: observe, transform, solve, advance.

    for transform in transforms of the whole model: transform.prepare(model)
    for block in model.blocks:
        moments ← one forward of all calibration batches          (only if a transform needs them)
        for transform in transforms: transform.apply(block, …)
        for site in block.sites:                                   qkv → o → gate/up → down
            moments ← staged forward up to the site                (only if the solver needs them;
                      of full precision beside it too, if the method compares the two)
            for linear in site: linear.weight ← solver.solve(linear.weight, moments, grid)
        for tuning in tuning of blocks: tuning.apply_block(block, …)
        advance the activations to the next block
    the output head, if it is asked for: solver.solve on what the activations are then
    for tuning in tuning of the whole model: tuning.apply(model, …)

Weights change in the model that was passed in; forwards run in `compute_dtype` on a copy of one block.
"""

import logging
from collections.abc import Generator, Iterator

import torch
from torch import nn

from gptq_awq.calibration.block_inputs import Inputs, Settings
from gptq_awq.calibration.expert_policy import ExpertPolicy, no_pairing
from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.grids.base import GridChoice
from gptq_awq.kernels.threads import match_torch
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.experts import experts_in, unfuse
from gptq_awq.models.offload import offloaded, read_ahead, resident
from gptq_awq.numerics.distributed import Ranks
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.block import BlockStep
from gptq_awq.quantization.embeddings import HeadStep, free_head, round_ends
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.resume import BlockResult, Progress
from gptq_awq.quantization.targets import assign_grids
from gptq_awq.quantization.tuning_step import tuned_model
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.journal import Journal
from gptq_awq.transforms.base import Scaling
from gptq_awq.tuning.teacher import Teacher

log = logging.getLogger(__name__)


def quantize(
    model: nn.Module,
    tokens: TokenSet | None,
    method: Method,
    grid: GridChoice,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    track: Track = no_track,
    record: ObservationCache | None = None,
    progress: Journal | None = None,
    experts: ExpertPolicy = ExpertPolicy(),  # noqa: B008 (frozen)
) -> Generator[BlockResult]:
    """Quantize every linear in the model's blocks, in place, one block per step of the iterator.

    A mix of grids may round the embedding and the output head too; they come first, as block -1. A head that is solved
    comes last, and is of block -1 as well.

    Nothing is kept in memory of a block that was handed out, so a caller that needs no codes pays no memory for them. A
    offloaded model's codes are there until the next block is asked for; the journal has them.

    Args:
        model: a causal LM in eval mode.
        tokens: calibration data; may be None where the method needs none (`needs_calibration`).
        method: transforms and solver.
        grid: where weights may land.
        settings: how to compute.
        track: wraps the loop over blocks, to report progress.
        record: keeps what methods without error propagation look at, for other runs on the same model and tokens.
        progress: keeps finished blocks; those it holds are restored, not computed.
        experts: what calibrates experts that few tokens reach. Fused experts become linears, see `models.experts`.

    Raises:
        UserError: no calibration data where the method needs some; non-finite values; H that won't factor; a width
            that a grid has no room for; experts whose products can't be told one from the other; tuning on several
            ranks.
    """
    match_torch()
    if offloaded(model):
        _check_blockwise(method, progress)
    check_ranks(method, settings.ranks)
    if method.solver is None:
        if method.cast is not None:
            _cast(model, getattr(torch, method.cast))
        return
    unfuse(model)
    if method.needs_cross and experts_in(model):
        raise no_pairing(f"method={method.name}")
    if not method.model_tunings:
        yield from _blocks(model, tokens, method, grid, settings, track, record, progress, experts)
        return
    if tokens is None:
        raise _wants_tokens(method)
    teacher = Teacher(model, tokens, resolve_compute_dtype(settings.compute_dtype, next(model.parameters()).device))
    results = list(_blocks(model, tokens, method, grid, settings, track, record, progress, experts))
    yield from tuned_model(model, method, results, teacher, tokens, track)


def _blocks(
    model: nn.Module,
    tokens: TokenSet | None,
    method: Method,
    grid: GridChoice,
    settings: Settings,
    track: Track,
    record: ObservationCache | None,
    progress: Journal | None,
    experts: ExpertPolicy,
) -> Iterator[BlockResult]:
    """The block loop."""
    prefix, blocks = find_blocks(model)
    prepared = {each.name: Scaling(None, each.prepare(model)) for each in method.model_transforms}
    free_head(model, method)
    grids = assign_grids(model, grid, method.head)
    for tuning in method.tuning.values():
        for each in {each for name, each in grids.items() if name.startswith(f"{prefix}.")}:
            tuning.check(each)
    ends = round_ends(model, grids, prefix, method)
    head = HeadStep.of(model, method, grids, prepared, settings.ranks)
    if ends.weights:
        yield ends
    kept, count = Progress(progress, settings.ranks), len(blocks)
    inputs = None
    if needs_calibration(method, grid):
        if tokens is None:
            raise _wants_tokens(method)
        inputs = Inputs(
            *(model, blocks, tokens, settings, method.error_propagation, bool(method.block_transforms)),
            record=_without(record) if head else record,
            track=track,
            full=method.needs_full,
            experts=experts,
        )
    activations = inputs.activations if inputs else None
    finished = kept.finished(count + (head is not None), activations)
    yield from kept.restore(min(finished, count), prefix, blocks, grids)
    rest = range(finished, count)
    for index in track(rest, f"quantize ({method.name})", len(rest)):
        step = BlockStep(blocks[index], index, f"{prefix}.{index}", method, grids, prepared, settings.ranks)
        if index + 1 < count:
            read_ahead(blocks[index + 1])
        with torch.no_grad(), resident(blocks[index]):
            step.run(inputs)
            done = BlockResult(index, step.weights, step.rows)
            kept.save(f"{prefix}.{index}", blocks[index], done, activations)
        kept.settle(f"{prefix}.{index}", blocks[index], index, grids)
        yield done
        done.release(blocks[index])
    if head is not None and finished > count:
        yield head.restore(kept.head(count, grids))
    elif head is not None:
        done = head.run(activations)
        kept.save_head(count, done)
        yield done


def _without(record: ObservationCache | None) -> None:
    """Say that a record is not used: it knows of blocks only, and the head's input comes after them."""
    if record is not None:
        log.info("head=solve: full precision's recorded moments have none of the head's, so this run calibrates anew")


def _check_blockwise(method: Method, progress: Journal | None) -> None:
    """Refuse, for a model whose blocks come one at a time, what needs more.

    Raises:
        UserError: naming the part of the method; no place for finished blocks.
    """
    whole = [*(each.name for each in method.model_transforms), *(each.name for each in method.model_tunings)]
    whole += [f"method.cast={method.cast}"] if method.cast else []
    if whole:
        raise UserError(
            f"method={method.name}: {whole[0]} works on the whole model, which is offloaded from disk block by block; "
            "choose a method without it, or a memory_budget that the model fits into"
        )
    if progress is None:
        raise ValueError("a offloaded model needs a journal: its finished blocks go there")


def _wants_tokens(method: Method) -> UserError:
    return UserError(f"method={method.name} calibrates: give it tokens (data=…)")


def check_ranks(method: Method, ranks: Ranks) -> None:
    """Refuse what several ranks can't do together.

    Raises:
        UserError: tuning, which learns from all batches at once.
    """
    if ranks.size > 1 and method.tuning:
        raise UserError(
            f"method={method.name}: {', '.join(method.tuning)} learns from all calibration batches, which are spread "
            f"over {ranks.size} ranks; start one rank, or a method without tuning"
        )


def needs_calibration(method: Method, grid: GridChoice) -> bool:
    """Whether any part of the method looks at calibration data."""
    solver = method.solver
    return solver is not None and (
        bool(method.block_transforms or method.tuning) or solver.needs_hessian or grid.needs_hessian
    )


@torch.no_grad()
def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to what a 16-bit checkpoint holds, in place; computation stays as it was."""
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not torch.isfinite(parameter).all():
            raise UserError(f"method.cast: {name} overflows {dtype}; bfloat16 has float32's range")
