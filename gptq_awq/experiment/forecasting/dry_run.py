"""Small parts of a run, timed before it begins: one block's turn with one batch, one window's scores, a few steps.

Everything is done by the code that the run itself will use, on a copy of one block, and on the model with one or a few
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
from gptq_awq.evaluation.divergence import compare
from gptq_awq.evaluation.head import Head
from gptq_awq.evaluation.perplexity import next_token_nll
from gptq_awq.experiment.context import RunContext, record_of
from gptq_awq.experiment.plan import Plan
from gptq_awq.export.base import Source
from gptq_awq.export.verify import Probe
from gptq_awq.models.blocks import find_blocks, text_config
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.models.offload import resident
from gptq_awq.numerics.distributed import ONE
from gptq_awq.quantization.block import BlockStep
from gptq_awq.quantization.resume import BlockResult, Progress, weights_in
from gptq_awq.runtime.profiling import OTHER, Recorder
from gptq_awq.runtime.progress import no_track
from gptq_awq.solvers.rtn import RTN
from gptq_awq.storage.journal import Journal
from gptq_awq.tuning.base import ModelTuning
from gptq_awq.tuning.teacher import Teacher

QUICK = 3.0
"""Seconds: a turn that took less is done again, since compiling and first calls are a large part of it."""
SCORED = 512
"""Positions whose logits are timed."""
MORE = 5
"""Blocks of the larger model: what one block takes is a small difference, which more blocks make larger."""
READ_AGAIN = 3
"""Times that a offloaded model's embedding or its head come from disk to score a text, once their halves are known."""
ITEMS = 4, 12
"""Of an lm-eval task, in two trials, whose difference is what items take."""
T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """One block, with one batch.

    Attributes:
        seconds: by phase (see `profiling.PHASES`), each without the phases inside of it.
        tokens: of the batch; 0 where nothing is calibrated.
        read: seconds that a block takes from disk, where the model is offloaded.
        decode: the same of a finished block.
        written: bytes on disk.
    """

    seconds: Mapping[str, float]
    tokens: int
    read: float
    decode: float
    written: int


@dataclass(frozen=True)
class ScoreTimings:
    """Seconds of scoring.

    Attributes:
        fixed: once per text.
        length: tokens of a window.
        window: of its forward, without blocks.
        block: of its forward through one block.
        nll: of a token's loss.
        compared: of a token's loss and distance from full precision.
    """

    fixed: float
    length: int
    window: float
    block: float
    nll: float
    compared: float


class DryRun:
    """Of what a plan will do with a model.

    Args:
        plan: what is asked for.
        context: what it needs, loaded.
        folder: for what a run writes; it is the caller's to delete.
    """

    def __init__(self, plan: Plan, context: RunContext, folder: Path) -> None:
        self._plan, self._context, self._folder = plan, context, folder
        self._prefix, self._blocks = find_blocks(context.loaded.model)
        sizes = [sum(p.numel() for p in block.parameters()) for block in self._blocks]
        self.index = sizes.index(max(sizes))  # of a mixture with a plain block before it, one that has experts
        self.blocks = sum(sizes) / max(sizes)
        self.read = 0.0

    def turn(self) -> Turn:
        """One block through the loop, as `pipeline.quantize` does it."""
        seconds, wall = self._turn()
        if wall < QUICK:
            seconds, _ = self._turn()
        progress = Journal(self._folder / "progress", "forecast")
        names = f"{self._prefix}.{self.index}."
        grids = {n: g for n, g in self._context.grids.items() if n.startswith(names)}
        decode = 0.0
        if self.read and progress.count():
            decode, _ = timed(lambda: [w.dequantize() for _, w in weights_in(progress.block(0), grids)])
        written = sum(f.stat().st_size for f in self._folder.rglob("*") if f.is_file())
        tokens = self._tokens().ids.numel() if self._context.tokens is not None else 0
        return Turn(seconds, tokens, self.read, decode, written)

    def _tokens(self) -> Any:
        assert self._context.tokens is not None
        return first_batch(self._context.tokens, self._plan.settings.tokens_per_batch)

    @torch.no_grad()
    def _turn(self) -> tuple[dict[str, float], float]:
        plan, context = self._plan, self._context
        for name in ("progress", "moments"):
            Journal(self._folder / name, "forecast").clear()
        view = with_blocks(context.loaded.model, [self._copy()])
        _, blocks = find_blocks(view)
        step = BlockStep(blocks[0], 0, f"{self._prefix}.{self.index}", plan.method, context.grids, {})
        keeps = plan.resume or self.read > 0
        progress = Progress(Journal(self._folder / "progress", "forecast") if keeps else None)
        with measured() as seconds:
            inputs = None if context.tokens is None else self._inputs(view, blocks)
            step.run(inputs)
            done = BlockResult(0, step.weights, step.rows)
            progress.save(step.name, blocks[0], done, inputs and inputs.activations)
        return seconds, sum(seconds.values())

    def _copy(self) -> nn.Module:
        block = self._blocks[self.index]
        started = time.perf_counter()
        with resident(block):
            if block.__dict__.get("residence") is not None:
                self.read = time.perf_counter() - started
            return copy.deepcopy(block)

    def _inputs(self, view: nn.Module, blocks: nn.ModuleList) -> Inputs:
        plan, context = self._plan, self._context
        assert context.tokens is not None
        method, record = plan.method, record_of(plan, context)
        keep = keeps_activations(
            *(context.loaded.model, context.tokens, plan.settings, method.error_propagation, method.needs_full)
        )
        settings = replace(plan.settings, activations="keep" if keep else "recompute", ranks=ONE)
        return Inputs(
            *(view, blocks, self._tokens(), settings, method.error_propagation, bool(method.block_transforms)),
            record=record and ObservationCache(Journal(self._folder / "moments", "forecast"), record.room),
            full=method.needs_full,
            experts=plan.experts,
        )

    @torch.no_grad()
    def scores(self, dtype: torch.dtype) -> ScoreTimings:
        """The first window of the first text, in `dtype`, by a model of one block and by one of `MORE`."""
        model, texts = self._context.loaded.model, self._context.windows
        ids = texts[0].ids[0].long() if texts else torch.arange(SCORED)
        block = self._copy()
        views: list[Any] = [with_blocks(model, [block] * count) for count in (1, MORE)]
        fixed, heads = timed(lambda: [Head.of(view, dtype) for view in views])
        began = time.perf_counter()
        with resident(model.get_input_embeddings()):
            read = time.perf_counter() - began
            window = ids[None].to(model.device)
            states, targets = heads[0].hidden(window)[0, :-1][:SCORED], ids[1 : SCORED + 1]
            one = averaged(lambda: heads[0].hidden(window))
            more = averaged(lambda: heads[1].hidden(window))
        with resident(heads[0].output):
            hashed, _ = timed(heads[0].sha256)
            compare(heads[0], states[:8], states[:8], targets[:8])  # compiles
            nll = averaged(lambda: next_token_nll(heads[0], states, targets))
            compared = averaged(lambda: compare(heads[0], states, states, targets))
        each = max(0.0, more - one) / (MORE - 1)
        again = READ_AGAIN * read + self.read if self.read else 0.0
        per = len(states)
        return ScoreTimings(fixed / 2 + hashed + again, len(ids), max(0.0, one - each), each, nll / per, compared / per)

    def tasks(self, dtype: torch.dtype) -> tuple[float, float, float]:
        """Seconds of lm-eval's tasks: once, of an item without blocks, and of an item in each block."""
        from gptq_awq.evaluation.harness import run_tasks  # takes seconds to import

        loaded, tasks, block = self._context.loaded, self._context.tasks, self._copy()

        def ask(count: int, limit: int) -> float:
            view, few = with_blocks(loaded.model, [block] * count), replace(tasks, limit=limit)
            return timed(lambda: run_tasks(view, loaded.tokenizer, few, compute_dtype=dtype))[0]

        few, more = ITEMS
        ask(1, few)  # the first time is slow
        one, many, three = ask(1, few), ask(1, more), ask(3, more)
        asked = [self.items(limit) for limit in ITEMS]
        inside = max(0.0, three - many) / 2 / asked[1]
        outside = max(0.0, (many - one) / max(1, asked[1] - asked[0]) - inside)
        return max(0.0, one - asked[0] * (outside + inside)), outside, inside

    def items(self, limit: int | None) -> int:
        """Of all tasks, the first `limit` of each."""
        counts = [len(task.eval_docs) for task in self._context.tasks.loaded["tasks"].values()]
        return sum(count if limit is None else min(limit, count) for count in counts)

    def exports(self) -> tuple[float, float]:
        """Seconds of writing and verifying all checkpoints: what is outside of the blocks, and each block."""
        loaded, block = self._context.loaded, self._copy()
        nothing = Probe(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 1), "")
        facts = {"model": {"source": loaded.source, "sha256": loaded.sha256}, "method": self._plan.method.name}
        facts |= {"grid": str(self._plan.grid), "calibration": None, "code": self._context.code}

        def write(count: int) -> float:
            view = with_blocks(loaded.model, [copy.deepcopy(block) for _ in range(count)])
            view.config = copy.deepcopy(view.config)
            text_config(view).num_hidden_layers = count
            source = Source(view, loaded.tokenizer, loaded.name, self._rounded(view))
            out = self._folder / "export"
            return timed(lambda: self._plan.exports.write(source, out, nothing, facts, no_track))[0]

        if not self.read:
            return self._line(write, 2)
        numbers = sum(p.numel() for p in block.parameters())  # there may be no room for two blocks
        ends = sum(p.numel() for p in loaded.model.parameters()) - sum(p.numel() for p in self._blocks.parameters())
        one = write(1)
        return one * ends / (ends + numbers), one * numbers / (ends + numbers)

    def _line(self, measure: Callable[[int], float], more: int = MORE) -> tuple[float, float]:
        """Seconds of what is outside of blocks, and of each, by models of one block and of `more`."""
        more = min(more, len(self._blocks))
        one = measure(1)
        each = max(0.0, measure(more) - one) / (more - 1) if more > 1 else 0.0
        return max(0.0, one - each), each

    def rotation(self) -> tuple[float, float]:
        """Seconds that transforms of the whole model take: of its ends, and of each block."""

        def prepare(count: int) -> float:
            view = self._truncated_copy(count)
            return timed(lambda: [each.prepare(view) for each in self._plan.method.model_transforms])[0]

        prepare(1)  # the first time is slow
        return self._line(prepare, 3)

    def steps(self, tuning: ModelTuning) -> tuple[float, float]:
        """Seconds that tuning of the whole model takes, and what it learns from: of its ends, and of each block."""
        tokens, given = self._context.tokens, self._tokens()
        assert tokens is not None
        dtype = self._plan.compute_dtype

        def step(count: int) -> float:
            view = self._truncated_copy(count)
            weights = self._rounded(view)
            watched = _Watched()
            with measured() as seconds:
                teacher = Teacher(view, given, dtype)
            started = time.perf_counter()
            with suppress(_EnoughError), torch.enable_grad():
                tuning.apply(view, weights, teacher, given, watched.track)
            loop = min(watched.times) * watched.total if watched.times else time.perf_counter() - started
            return seconds["forward"] + loop

        times = len(tokens.ids) / len(given.ids)
        ends, each = self._line(step)
        return ends * times, each * times

    def _truncated_copy(self, count: int) -> Any:
        """A copy of the model with its first blocks only."""
        return copy.deepcopy(with_blocks(self._context.loaded.model, list(self._blocks[:count])))

    @torch.no_grad()
    def _rounded(self, view: Any) -> dict[str, Any]:
        """Round the blocks' linears to nearest, in place."""
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


class _Watched:
    """Times the steps of a loop that reports its progress, and ends it after three."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.total = 0

    def track(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:  # noqa: ARG002
        """As `progress.Track`."""
        self.total = total
        for count, item in enumerate(items):
            if count == 3:
                raise _EnoughError
            started = time.perf_counter()
            yield item
            self.times.append(time.perf_counter() - started)


@contextmanager
def dry_run_of(plan: Plan, context: RunContext) -> Iterator[DryRun]:
    """A trial beside the run's own files, whose folder is deleted at the end."""
    parent = context.run.journal.folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix=".forecast-") as folder,
        torch.random.fork_rng(devices=[] if plan.device.type == "cpu" else None),
    ):
        yield DryRun(plan, context, Path(folder))


def with_blocks(model: Any, blocks: Sequence[nn.Module]) -> Any:
    """The model with other blocks; it shares all else."""
    *path, last = find_blocks(model)[0].split(".")
    view = here = _twin(model)
    for name in path:
        here._modules[name] = here = _twin(here._modules[name])
    here._modules[last] = nn.ModuleList(blocks)
    return view


def _twin(module: Any) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Within: seconds by phase are measured; they are known afterwards."""
    found: dict[str, float] = defaultdict(float)
    with Recorder(on=True) as recorder:
        yield found
    for span in recorder.spans:
        found[span.phase] += span.own
    found[OTHER] = max(0.0, recorder.seconds - sum(found.values()))


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that it takes, and what it answers."""
    started = time.perf_counter()
    answer = work()
    return time.perf_counter() - started, answer


def averaged(work: Callable[[], object], seconds: float = 0.2) -> float:
    """Seconds that it takes, the mean of as many times as there is room for; at least once."""
    started, times = time.perf_counter(), 0
    while not times or time.perf_counter() - started < seconds:
        work()
        times += 1
    return (time.perf_counter() - started) / times
