"""The block loop: observe, transform, solve, tune, advance.

    for transform in model transforms: transform.prepare(model)
    for block in model.blocks:
        moments ← one forward of all calibration batches           (only if a transform needs them)
        for transform in block transforms: transform.apply(block, …)
        for site in block.sites:                                   qkv → o → gate/up → down
            moments ← staged forward up to the site                (only if the solver needs them; with a full-precision
                                                                    forward, if the method compares the two)
            for linear in site: linear.weight ← solver.solve(linear.weight, moments, grid)
        for tuning in block tunings: tuning.apply_block(block, …)
        activations ← block(activations)
    head.weight ← solver.solve(head.weight, moments, grid)         (only with head=solve)
    for tuning in model tunings: tuning.apply(model, …)

Weights change in the model that was passed in; forwards run in `compute_dtype`, on a copy of one block where the
model has another dtype.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gptq_awq.calibration.block_inputs import Inputs, Settings
from gptq_awq.calibration.chain import check_chain, why_not_alone
from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, GridChoice
from gptq_awq.kernels.threads import match_torch
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.carried import mark_changed
from gptq_awq.models.left import mark_left
from gptq_awq.models.linear import KEPT
from gptq_awq.models.offload import check_in_memory, offloaded, read_ahead, resident
from gptq_awq.models.shared_inputs import linears_by_input
from gptq_awq.models.steady import keep_weights
from gptq_awq.models.unfuse import unfuse
from gptq_awq.numerics.distributed import Ranks
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.block import BlockStep
from gptq_awq.quantization.coverage import Coverage, coverage_of
from gptq_awq.quantization.embeddings import HeadStep, free_head, round_embeddings
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.resume import BlockResult, Progress
from gptq_awq.quantization.targets import assign_grids, block_places
from gptq_awq.quantization.tuning_step import tuned_model
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.journal import Journal
from gptq_awq.storage.pins import pinned
from gptq_awq.transforms.base import Scaling
from gptq_awq.tuning.teacher import Teacher

log = logging.getLogger(__name__)


def examine(model: nn.Module, tokens: TokenSet | None, method: Method, grid: GridChoice) -> Coverage | None:
    """Check that a model's blocks can be calibrated one by one, and find the share of its weights that is rounded.

    It takes a few forwards of a few tokens; nothing is rounded. None for a method that puts no weights on a grid.

    Args:
        model: a causal LM in eval mode; fused experts become linears, and a head that is to have a matrix gets it.
        tokens: calibration data; may be None where the method needs none.
        method: transforms, solver and tuning.
        grid: one grid for all linears, or a mix.

    Raises:
        UserError: naming the first block whose input calibration would get wrong.
    """
    if method.solver is None:
        return None
    prepare(model, method, grid)
    check_chain(model, tokens, needs_calibration(method, grid))
    free_head(model, method)
    return coverage_of(model, assign_grids(model, grid, method.head))


def prepare(model: nn.Module, method: Method, grid: GridChoice) -> None:
    """Make a model's fused experts linears, and mark what a method leaves: routers, and what no token passes."""
    keep_weights(model)
    unfuse(model)
    mark_left(model, needs_calibration(method, grid))


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
    curvature_file: Path | None = None,
    squares: Mapping[str, Tensor] | None = None,
) -> Generator[BlockResult]:
    """Quantize every linear in the model's blocks, in place, one block per step of the iterator.

    The embedding and the output head, where the grid's mix rounds them too, come first, as block -1. Observations and
    activations of full precision start from the embedding before that. A head that is solved comes last, as block -1.

    Codes of a block whose result was yielded are not kept in memory, so a caller that needs none pays nothing for them.
    An offloaded model's result loses its codes when the next block is asked for; the journal has them.

    Args:
        model: a causal LM in eval mode; fused experts become linears (`models.experts`).
        tokens: calibration data; may be None where the method needs none (`needs_calibration`).
        method: transforms, solver and tuning.
        grid: one grid for all linears, or a mix.
        settings: how calibration computes.
        track: wraps the loop over blocks, to report progress.
        record: cache of full-precision observations, which methods without error propagation share across runs on the
            same model and tokens.
        progress: journal of finished blocks; those that it holds are restored, not computed.
        experts: policy for experts that few tokens reach.
        curvature_file: file that output curvature is kept in for later runs; None: none.
        squares: mean squares of the linears' inputs by full name, instead of tokens, for range searches; None: none.

    Raises:
        UserError: no calibration data where the method needs some; non-finite values; an H that does not factor; a
            width that a grid's format does not take; experts whose products can't be told apart; tuning on several
            ranks.
        ValueError: an offloaded model without a journal.
    """
    match_torch()
    _check_blockwise(model, method, progress)
    check_ranks(method, settings.ranks)
    if method.solver is None:
        if method.cast is not None:
            _cast(model, getattr(torch, method.cast))
        return
    prepare(model, method, grid)
    loop = _BlockLoop(model, tokens, method, grid, settings, track, record, progress, experts, curvature_file, squares)
    if not method.model_tunings:
        yield from loop.run()
        return
    if tokens is None:
        raise _missing_tokens(method)
    loop, teacher = _taught(loop, tokens)
    yield from tuned_model(model, method, list(loop.run()), teacher, tokens, track)


def _taught(loop: "_BlockLoop", tokens: TokenSet) -> "tuple[_BlockLoop, Teacher]":
    """The teacher of the loop's model, and the loop, which brings it the predictions where it carries them anyway."""
    model, wanted = loop.model, loop.settings.compute_dtype
    teacher = Teacher(model, tokens, resolve_compute_dtype(wanted, next(model.parameters()).device))
    if carries_full_precision(model, tokens, loop.method, loop.journal):
        return replace(loop, finish=teacher.waiting().finish), teacher
    return loop, teacher.predict()


def carries_full_precision(model: nn.Module, tokens: TokenSet, method: Method, progress: Journal | None) -> bool:
    """Whether calibration will bring the tokens through the full-precision model's last block.

    It does not where all blocks are finished already, or where the model calls them in ways of its own.
    """
    _, blocks = find_blocks(model)
    rest = progress is None or progress.count() < len(blocks)
    return method.needs_full and rest and not method.model_transforms and why_not_alone(model, tokens) is None


@dataclass(frozen=True)
class _BlockLoop:
    """The block loop over one model, with the arguments of `quantize` as attributes."""

    model: nn.Module
    tokens: TokenSet | None
    method: Method
    grid: GridChoice
    settings: Settings
    track: Track
    cache: ObservationCache | None
    journal: Journal | None
    experts: ExpertPolicy
    curvature_file: Path | None
    squares: Mapping[str, Tensor] | None
    finish: Callable[[Iterator[Tensor]], None] | None = None
    """Called with the hidden states that leave full precision's last block, by batches."""

    def run(self) -> Iterator[BlockResult]:
        """Quantize the embedding, the blocks and the output head; yields each result once it is finished."""
        journals = [self.journal, None if self.cache is None else self.cache.journal]
        with pinned(*(journal.folder for journal in journals if journal is not None)):
            yield from self._run()

    def _run(self) -> Iterator[BlockResult]:
        model, method, ranks = self.model, self.method, self.settings.ranks
        prefix, blocks = find_blocks(model)
        prepared = {each.name: Scaling(None, each.prepare(model)) for each in method.model_transforms}
        mark_changed(model, whole=bool(method.model_transforms), blocks=bool(method.block_transforms))
        free_head(model, method)
        grids = assign_grids(model, self.grid, method.head)
        _check_tunings(method, {grid for name, grid in grids.items() if name.startswith(f"{prefix}.")})
        kept = [place for place in block_places(model) if place.name not in grids]
        head = HeadStep.of(model, method, grids, prepared, ranks)
        curvatures, fused = self._curvatures(), self._fused(grids)
        inputs = self._inputs(blocks, with_head=head is not None)  # full precision's begin before anything is rounded
        outside = round_embeddings(model, grids, prefix, method)
        if inputs is not None and _rounds_embedding(model, outside):
            inputs.embedding_rounded()
        if outside.weights:
            yield outside
        progress, count = Progress(self.journal, ranks), len(blocks)
        activations = inputs.activations if inputs else None
        finished = progress.finished(count + (head is not None), activations)
        yield from progress.restore(min(finished, count), prefix, blocks, grids)
        rest = range(finished, count)
        for index in self.track(rest, f"quantize ({method.name})", len(rest)):
            name, block = f"{prefix}.{index}", blocks[index]
            step = BlockStep(block, index, name, method, grids, prepared, ranks, curvatures, fused, self.squares)
            if index + 1 < count:
                read_ahead(blocks[index + 1])
            with torch.no_grad(), resident(block):
                for place in (place for place in kept if place.block == index):
                    step.leave(place.name.removeprefix(f"{name}."), KEPT)
                step.run(inputs)
                done = BlockResult(index, step.weights, step.rows)
                progress.save(name, block, done, activations)
            progress.settle(name, block, index, grids)
            yield done
            done.release(block)
        if self.finish is not None:
            assert activations is not None
            self.finish(batch.full for batch in activations.batches if batch.full is not None)
        if head is not None and finished > count:
            yield head.restore(progress.head(count, grids))
        elif head is not None:
            done = head.run(activations)
            progress.save_head(count, done)
            yield done

    @property
    def _calibrates(self) -> bool:
        """Whether blocks are calibrated on tokens."""
        return needs_calibration(self.method, self.grid) and self.squares is None

    def _fused(self, grids: Mapping[str, Grid]) -> list[tuple[str, ...]]:
        """Linears that read one input, where a grid has to know and no calibration will tell."""
        if self._calibrates or not any(grid.shared_by_tensor for grid in grids.values()):
            return []
        return linears_by_input(self.model)

    def _curvatures(self) -> dict[str, Tensor]:
        """H_O of the linears, where the method rounds by it; of none else."""
        settings = self.method.output_curvature
        if settings is None or self.tokens is None:
            return {}
        dtype = resolve_compute_dtype(self.settings.compute_dtype, next(self.model.parameters()).device)
        return settings.kept(self.curvature_file, self.model, self.tokens, dtype, self.track)

    def _inputs(self, blocks: nn.ModuleList, with_head: bool) -> Inputs | None:
        """The blocks' inputs; None where the method needs no calibration.

        Raises:
            UserError: the method calibrates, and there are no tokens.
        """
        if not self._calibrates:
            return None
        if self.tokens is None:
            raise _missing_tokens(self.method)
        cache = self.cache
        if with_head and cache is not None:  # it holds moments of blocks only
            log.info("head=solve: cached full-precision moments have none of the head's, so this run calibrates anew")
            cache = None
        return Inputs(
            model=self.model,
            blocks=blocks,
            tokens=self.tokens,
            settings=self.settings,
            error_propagation=self.method.error_propagation,
            absorbers=bool(self.method.block_transforms),
            record=cache,
            track=self.track,
            full=self.method.needs_full,
            experts=self.experts,
        )


def _rounds_embedding(model: nn.Module, outside: BlockResult) -> bool:
    """Whether a weight that was rounded outside of the blocks is the embedding's, or a head's that is tied to it."""
    embedding = model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    return any(model.get_submodule(name).weight is embedding for name in outside.weights)


def _check_tunings(method: Method, grids: set[Grid]) -> None:
    """Raise UserError if one of the method's tunings does not take one of the blocks' grids."""
    for tuning in method.tuning.values():
        for grid in grids:
            tuning.check(grid)


def _check_blockwise(model: nn.Module, method: Method, progress: Journal | None) -> None:
    """Refuse a method that needs a whole model in memory, for a model that is offloaded block by block.

    Raises:
        UserError: naming the part of the method.
        ValueError: there is no journal for finished blocks.
    """
    whole = [*(each.name for each in method.model_transforms), *(each.name for each in method.model_tunings)]
    whole += [f"method.cast={method.cast}"] if method.cast else []
    if whole:
        check_in_memory(model, f"method={method.name}: {whole[0]} works on", "choose a method without it")
    if progress is None and offloaded(model):
        raise ValueError("an offloaded model needs a journal: its finished blocks go there")


def _missing_tokens(method: Method) -> UserError:
    return UserError(f"method={method.name} calibrates: give it tokens (data=…)")


def check_ranks(method: Method, ranks: Ranks) -> None:
    """Refuse a method that several ranks cannot run together.

    Raises:
        UserError: the method has a tuning, which learns from all batches at once.
    """
    if ranks.size > 1 and method.tuning:
        raise UserError(
            f"method={method.name}: {', '.join(method.tuning)} learns from all calibration batches, which are spread "
            f"over {ranks.size} ranks; start one rank, or a method without tuning"
        )


def needs_calibration(method: Method, grid: GridChoice) -> bool:
    """Whether any part of the method, or the grid's search, uses calibration data."""
    solver = method.solver
    return solver is not None and (
        bool(method.block_transforms or method.tuning) or solver.needs_hessian or grid.needs_hessian
    )


@torch.no_grad()
def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to a 16-bit dtype, in place; the parameters' own dtype stays.

    Raises:
        UserError: a parameter overflows.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not torch.isfinite(parameter).all():
            raise UserError(f"method.cast: {name} overflows {dtype}; bfloat16 has float32's range")
