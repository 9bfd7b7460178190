"""Small parts of a run, timed before it begins: one block with one batch, the scores of one window, a few tuning steps.

All of it is done by the code that the run itself will use, on a copy of one block, and on the model with one or a few
blocks in place of all. Nothing that the run will use is changed, nor are the random numbers that it will draw.
"""

import copy
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gptq_awq.calibration.block_inputs import Inputs, first_batch, keeps_activations
from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.data.tokens import TokenSet
from gptq_awq.evaluation.divergence import compare
from gptq_awq.evaluation.head import Head
from gptq_awq.evaluation.perplexity import next_token_nll
from gptq_awq.experiment.context import RunContext, record_of
from gptq_awq.experiment.plan import Plan
from gptq_awq.export.verify import tensor_sha256
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.models.offload import resident
from gptq_awq.numerics.distributed import ONE
from gptq_awq.quantization.block import BlockStep
from gptq_awq.quantization.quantize import carries_full_precision
from gptq_awq.quantization.resume import BlockResult, Progress, weights_in
from gptq_awq.runtime.profiling import Recorder
from gptq_awq.solvers.rtn import RTN
from gptq_awq.storage.journal import Journal
from gptq_awq.tuning.base import ModelTuning
from gptq_awq.tuning.teacher import Teacher

QUICK = 3.0
"""Seconds below which a block's turn is timed again: compiling and first calls are a large part of it."""
SCORED = 512
"""Positions whose logits are timed."""
MORE = 5
"""Blocks of the deeper model: one block's seconds are a small difference, which more blocks make larger."""
READ_AGAIN = 3
"""Times that an offloaded model's embedding or head comes from disk to score a text."""
WRITTEN = 5
"""Tokens that the model writes to be timed, the first of them without the prompt."""
STEPS = 3
"""Tuning steps that are timed; the fastest counts."""
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """Seconds that grow with the depth of a model: those of its parts outside of the blocks, and of each block."""

    outside: float
    block: float

    @classmethod
    def through(cls, measure: Callable[[int], float], more: int) -> "Line":
        """Seconds measured on a model of one block and on one of `more` blocks."""
        one = measure(1)
        block = max(0.0, measure(more) - one) / (more - 1) if more > 1 else 0.0
        return cls(max(0.0, one - block), block)

    def at(self, blocks: int) -> float:
        """Seconds for a model of so many blocks."""
        return self.outside + blocks * self.block


@dataclass(frozen=True)
class Turn:
    """Measurements of one block that is quantized with one batch.

    Attributes:
        seconds: by phase (see `profiling.PHASES`), each without the phases inside of it.
        tokens: tokens of the batch; 0 where nothing is calibrated.
        read: seconds that an offloaded block takes from disk.
        decode: seconds that a finished block of an offloaded model takes from disk.
        export: seconds of dequantizing and hashing its weights, which checkpoints are verified by.
        written: bytes on disk.
    """

    seconds: Mapping[str, float]
    tokens: int
    read: float
    decode: float
    export: float
    written: int


@dataclass(frozen=True)
class ScoreTimings:
    """Seconds of scoring a text.

    Attributes:
        fixed: once per text.
        length: tokens of the window that was timed.
        window: its forward.
        nll: loss of one token.
        compared: loss of one token and its distance from full precision.
    """

    fixed: float
    length: int
    window: Line
    nll: float
    compared: float


class DryRun:
    """Timings of what a plan will do with a model.

    Args:
        plan: what is asked for.
        context: the model and data it needs, loaded.
        folder: where files are written to; the caller deletes it.
    """

    def __init__(self, plan: Plan, context: RunContext, folder: Path) -> None:
        self._plan, self._context, self._folder = plan, context, folder
        self._model: Any = context.loaded.model
        self._prefix, self._blocks = find_blocks(self._model)
        sizes = [sum(p.numel() for p in block.parameters()) for block in self._blocks]
        self.index = sizes.index(max(sizes))  # of a mixture with a plain block before it, one that has experts
        self.blocks = sum(sizes) / max(sizes)
        self.read = 0.0

    def turn(self) -> Turn:
        """Quantize one block with one batch, as the block loop does it."""
        seconds, weights = self._turn()
        if sum(seconds.values()) < QUICK:
            seconds, weights = self._turn()
        journal, decode = self._journal("progress"), 0.0
        if self.read and journal.count():
            names = f"{self._prefix}.{self.index}."
            grids = {name: grid for name, grid in self._context.grids.items() if name.startswith(names)}
            decode, _ = timed(lambda: [weight.dequantize() for _, weight in weights_in(journal.block(0), grids)])
        packed = weights.values() if self._plan.exports.formats else ()
        export, _ = timed(lambda: [(tensor_sha256(weight.dequantize()), weight.sha256()) for weight in packed])
        written = sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())
        tokens = self._batch.ids.numel() if self._context.tokens is not None else 0
        return Turn(seconds=seconds, tokens=tokens, read=self.read, decode=decode, export=export, written=written)

    @property
    def _batch(self) -> TokenSet:
        assert self._context.tokens is not None
        return first_batch(self._context.tokens, self._plan.settings.tokens_per_batch)

    def _journal(self, name: str) -> Journal:
        return Journal(self._folder / name, "forecast")

    @torch.no_grad()
    def _turn(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Seconds by phase, and the block's quantized weights."""
        plan, context = self._plan, self._context
        for name in ("progress", "moments"):
            self._journal(name).clear()
        view = with_blocks(self._model, [self._copy()])
        _, blocks = find_blocks(view)
        name = f"{self._prefix}.{self.index}"
        step = BlockStep(
            blocks[0], 0, name, plan.method, context.grids, {}, curvatures=self._curvatures(name, blocks[0])
        )
        progress = Progress(self._journal("progress") if plan.resume or self.read else None)
        with measured() as seconds:
            inputs = None if context.tokens is None else self._inputs(view, blocks)
            step.run(inputs)
            done = BlockResult(0, step.weights, step.rows)
            progress.save(step.name, blocks[0], done, inputs and inputs.activations)
        return seconds, step.weights

    def _curvatures(self, name: str, block: nn.Module) -> dict[str, torch.Tensor] | None:
        """Unit matrices in place of the linears' output-side curvature: rounding with any takes as long."""
        if (settings := self._plan.method.output_curvature) is None:
            return None
        linears = {f"{name}.{linear}": m for linear, m in block.named_modules() if is_linear(m)}
        return {full: settings.unit(len(matrix(module))) for full, module in linears.items()}

    def gradients(self) -> float:
        """Gather the output-side curvature from the first calibration window; scaled to all of them."""
        settings, tokens = self._plan.method.output_curvature, self._context.tokens
        assert settings is not None
        assert tokens is not None
        first = first_batch(tokens, 1)
        seconds, _ = timed(lambda: settings.gather(self._model, first, self._plan.compute_dtype))
        return seconds * len(tokens.first(settings.windows).ids) / len(first.ids)

    def written(self) -> float:
        """Let the model write a few tokens behind half a window; scaled to all that it is to write."""
        own, tokens = self._plan.method.self_calibration, self._context.tokens
        assert own is not None
        assert tokens is not None
        half = max(own.prompt, tokens.ids.shape[1] // 2)
        few = replace(own, windows=min(own.windows, own.batch_size), prompt=half)
        part = replace(tokens, ids=tokens.ids[:, : half + WRITTEN])
        rest = replace(tokens, ids=tokens.ids[:, : half + 1])
        more, less = (timed(lambda t=t: few.write(self._model, t, self._plan.compute_dtype))[0] for t in (part, rest))
        token = max(0.0, more - less) / (part.ids.shape[1] - half - 1) if part.ids.shape[1] > half + 1 else more
        return token * (tokens.ids.shape[1] - own.prompt) * -(-own.windows // own.batch_size)

    def _copy(self) -> nn.Module:
        block = self._blocks[self.index]
        started = time.perf_counter()
        with resident(block):
            if block.__dict__.get("residence") is not None:
                self.read = time.perf_counter() - started
            return copy.deepcopy(block)

    def _inputs(self, view: nn.Module, blocks: nn.ModuleList) -> Inputs:
        plan, method, tokens = self._plan, self._plan.method, self._context.tokens
        assert tokens is not None
        keep = keeps_activations(self._model, tokens, plan.settings, method.error_propagation, method.needs_full)
        cache = record_of(plan, self._context)
        return Inputs(
            model=view,
            blocks=blocks,
            tokens=self._batch,
            settings=replace(plan.settings, activations="keep" if keep else "recompute", ranks=ONE),
            error_propagation=method.error_propagation,
            absorbers=bool(method.block_transforms),
            record=cache and ObservationCache(self._journal("moments"), cache.room),
            full=method.needs_full,
            experts=plan.experts,
        )

    @torch.no_grad()
    def scores(self, dtype: torch.dtype) -> ScoreTimings:
        """Score the first window of the first text, in `dtype`."""
        ids, block = self._context.windows[0].ids[0].long(), self._copy()
        window, targets = ids[None].to(self._model.device), ids[1 : SCORED + 1]
        depths = (1, MORE)
        fixed, heads = timed(lambda: {n: Head.of(with_blocks(self._model, [block] * n), dtype) for n in depths})
        began = time.perf_counter()
        with resident(self._model.get_input_embeddings()):
            read = time.perf_counter() - began
            states = heads[1].hidden(window)[0, :-1][:SCORED]
            forward = Line.through(lambda n: averaged(lambda: heads[n].hidden(window)), MORE)
        with resident(heads[1].output):
            hashed, _ = timed(heads[1].sha256)
            compare(heads[1], states[:8], states[:8], targets[:8])  # compiles
            nll = averaged(lambda: next_token_nll(heads[1], states, targets)) / len(states)
            compared = averaged(lambda: compare(heads[1], states, states, targets)) / len(states)
        fixed = fixed / len(depths) + hashed + (READ_AGAIN * read + self.read if self.read else 0.0)
        return ScoreTimings(fixed, len(ids), forward, nll, compared)

    def rotation(self) -> Line:
        """Transform the whole model, as rotations do."""

        def prepare(count: int) -> float:
            view = self._truncated_copy(count)
            return timed(lambda: [each.prepare(view) for each in self._plan.method.model_transforms])[0]

        prepare(1)  # compiles
        return Line.through(prepare, min(3, len(self._blocks)))

    def tuning(self, tuning: ModelTuning) -> Line:
        """Take a few steps of a tuning of the whole model, after its teacher's forwards where calibration has none."""
        tokens, batch = self._context.tokens, self._batch
        assert tokens is not None
        brought = carries_full_precision(self._model, tokens, self._plan.method, None)

        def step(count: int) -> float:
            view, timer = self._truncated_copy(count), _StepTimer()
            weights = self._rounded(view)
            with measured() as seconds:
                teacher = Teacher(view, batch, self._plan.compute_dtype).predict()
            began = time.perf_counter()
            with suppress(_EnoughError), torch.enable_grad():
                tuning.apply(view, weights, teacher, batch, timer.track)
            return (0.0 if brought else seconds["forward"]) + (timer.seconds or time.perf_counter() - began)

        line, times = Line.through(step, min(MORE, len(self._blocks))), len(tokens.ids) / len(batch.ids)
        return Line(line.outside * times, line.block * times)

    def _truncated_copy(self, count: int) -> Any:
        """Copy the model with its first blocks only."""
        return copy.deepcopy(with_blocks(self._model, list(self._blocks[:count])))

    @torch.no_grad()
    def _rounded(self, view: Any) -> dict[str, Any]:
        """Round the linears in the blocks of `view` to nearest, in place; quantized weights by full name."""
        found = {}
        for name, module in find_blocks(view)[1].named_modules():
            grid = self._context.grids.get(full := f"{self._prefix}.{name}")
            if is_linear(module) and grid is not None:
                grid = grid.without_search() if grid.needs_hessian else grid
                found[full] = RTN().solve(matrix(module).float(), None, grid).quantized
                matrix(module).copy_(found[full].dequantize())
        return found


class _EnoughError(Exception):
    """Ends a tuning that was timed for long enough."""


class _StepTimer:
    """Times the first steps of a loop that reports its progress, ends it after `STEPS`, and extrapolates to all."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def track(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:  # noqa: ARG002
        """Wrap the loop, as a `progress.Track`."""
        times: list[float] = []
        for item in items:
            if len(times) == STEPS:
                raise _EnoughError
            started = time.perf_counter()
            yield item
            times.append(time.perf_counter() - started)
            self.seconds = min(times) * total


@contextmanager
def dry_run_of(plan: Plan, context: RunContext) -> Iterator[DryRun]:
    """Make a dry run beside the run's own files; its folder is deleted at the end."""
    parent = context.run.journal.folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix=".forecast-") as folder,
        torch.random.fork_rng(devices=[] if plan.device.type == "cpu" else None),
    ):
        yield DryRun(plan, context, Path(folder))


def with_blocks(model: Any, blocks: Sequence[nn.Module]) -> Any:
    """View of the model with other blocks; it shares all else."""
    *path, last = find_blocks(model)[0].split(".")
    view = here = _twin(model)
    for name in path:
        here._modules[name] = here = _twin(here._modules[name])
    here._modules[last] = nn.ModuleList(blocks)
    return view


def _twin(module: Any) -> Any:
    """Shallow copy of a module, whose submodules can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measure seconds by phase within; they are known afterwards."""
    found: dict[str, float] = defaultdict(float)
    with Recorder(on=True) as recorder:
        yield found
    for row in recorder.phases:
        found[row.name] = max(0.0, row.seconds)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that `work` takes, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def averaged(work: Callable[[], object], seconds: float = 0.2) -> float:
    """Mean seconds of `work`, done as often as `seconds` have room for; at least once."""
    started, times = time.perf_counter(), 0
    while not times or time.perf_counter() - started < seconds:
        work()
        times += 1
    return (time.perf_counter() - started) / times
