"""What a run will take, before it begins: seconds and memory by phase, from a trial and from counts.

A trial (trial.py) does one block's turn with one batch, scores one window with a model of one block, and takes a few
steps of what tuning of the whole model does. The rest are counts: blocks, batches, windows, steps, bytes on disk. What
is in the cache already (full-precision scores, moments, finished blocks) is not counted again.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from gptq_awq.evaluation.baseline import knows_scores, read_answers
from gptq_awq.evaluation.floor import TRIAL_TOKENS
from gptq_awq.experiment.context import RunContext, record_of
from gptq_awq.experiment.forecasting.dry_run import DryRun, ScoreTimings, Turn, dry_run_of
from gptq_awq.experiment.forecasting.memory_model import MemoryModel
from gptq_awq.experiment.plan import Plan
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.models.offload import offloaded
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.results import Result
from gptq_awq.runtime import memory
from gptq_awq.runtime.runlog import Clock
from gptq_awq.storage.assets import cache_dir

log = logging.getLogger(__name__)
OF_TOKENS = ("forward", "moments", "tune")
"""Phases of a block's turn that take as long as there are tokens."""
OBSERVED = ("embed", "forward", "moments", "sites")
"""Phases that a record of full precision spares."""
PARTS = {"forward": "forwards, moments", "moments": "forwards, moments", "sites": "forwards, moments"}
PARTS |= {"search": "search", "tune": "tuning", "disk": "disk"}


@dataclass(frozen=True)
class PhaseForecast:
    """One phase, or a part of it ("quantize: solving"): seconds, and the most memory that the process has in it."""

    name: str
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Forecast:
    """All phases, in their order; `begun`: seconds that the run had taken when they were known."""

    phases: tuple[PhaseForecast, ...]
    begun: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def bytes(self) -> float:
        """At the most."""
        return max((phase.bytes for phase in self.phases), default=0.0)

    def row(self) -> dict[str, Any]:
        """For the results row: seconds by phase, the whole run's as "total", and its peak memory."""
        seconds: dict[str, float] = {}
        for phase in self.phases:
            name = phase.name.partition(":")[0]
            seconds[name] = round(seconds.get(name, 0.0) + phase.seconds, 3)
        return {
            "seconds": seconds | {"total": round(self.begun + self.seconds, 3)},
            "peak_memory_bytes": round(self.bytes),
            "parts": {phase.name: round(phase.seconds, 3) for phase in self.phases},
        }

    def table(self) -> Table:
        """For the console."""
        table = Table(title="forecast", box=box.SIMPLE, title_justify="left")
        for column in ("phase", "time", "memory"):
            table.add_column(column, justify="left" if column == "phase" else "right")
        for phase in (*self.phases, PhaseForecast("all", self.seconds, self.bytes)):
            table.add_row(phase.name, f"{phase.seconds:.0f} s", f"{phase.bytes / 1e9:.2f} GB")
        return table


def announce(plan: Plan, context: RunContext, clock: Clock) -> Forecast | None:
    """Say what the phases to come will take, where it was asked for, or the model is large enough to be offloaded."""
    if not (offloaded(context.loaded.model) if plan.forecast is None else plan.forecast):
        return None
    if plan.profile:
        log.info("no forecast with profile=true: a trial would be in the profile")
        return None
    try:
        with clock.phase("forecast"):
            phases = forecast(plan, context)
    except Exception as error:  # of one batch or one block alone; what is wrong with the run, the run will say
        log.warning("no forecast: %s: %s", type(error).__name__, error)
        return None
    found = Forecast(tuple(phases), clock.total()["total"])
    Console(stderr=True).print(found.table())
    for phase in found.phases:
        log.info("forecast: %s: %.1f s, %.2f GB", phase.name, phase.seconds, phase.bytes / 1e9)
    return found


def compare(result: Result) -> None:
    """Log what was forecast, if anything was, beside what the run took: phase by phase, in all, and its memory."""
    if result.forecast is None:
        return
    for name, expected in result.forecast["seconds"].items():
        log.info("%s: forecast %.1f s, took %.1f s", name, expected, result.seconds[name])
    expected, peak = result.forecast["peak_memory_bytes"], result.peak_memory_bytes or 0
    log.info("peak memory: forecast %.2f GB, took %.2f GB", expected / 1e9, peak / 1e9)


def forecast(plan: Plan, context: RunContext) -> list[PhaseForecast]:
    """Try, count, and say what the run will take, phase by phase.

    Raises:
        UserError: what the trial can't do with one batch.
    """
    with dry_run_of(plan, context) as trial:
        counted = Counts(plan, context, trial)
        baseline, quantized, evaluated = counted.baseline(), counted.quantized(), counted.evaluated()
    model = context.loaded.model
    needs = MemoryModel(plan, model, context.tokens, context.windows)
    used = memory.used_bytes(plan.device)
    least = max(used, memory.peak_bytes(plan.device))  # the run has had it already
    of_part = {"tuning of the model": needs.tuning}
    phases = [PhaseForecast("baseline", baseline, max(least, used + needs.scoring))]
    for part, seconds in quantized.items():
        bytes_ = used + of_part.get(part, needs.blocks)
        phases.append(PhaseForecast(f"quantize: {part}", seconds, max(least, bytes_)))
    if plan.exports.formats:
        phases.append(PhaseForecast("export", counted.exported(), max(least, used + needs.scoring)))
    return [*phases, PhaseForecast("evaluate", evaluated, max(least, used + needs.scoring))]


class Counts:
    """What a trial's seconds come to in the run.

    Args:
        plan: what is asked for.
        context: what it needs.
        trial: of it.
    """

    def __init__(self, plan: Plan, context: RunContext, trial: DryRun) -> None:
        self._plan, self._context, self._trial = plan, context, trial
        self._count = len(find_blocks(context.loaded.model)[1])
        name = plan.evaluation.compute_dtype
        lower = context.loaded.model.dtype == torch.float32
        self._dtype = resolve_compute_dtype(name, plan.device) if lower else torch.float32
        self._scores = trial.scores(self._dtype) if context.windows else None
        self._tasked = trial.tasks(self._dtype) if context.tasks is not None else None
        self._exported = trial.exports() if plan.exports.formats and plan.method.solver else (0.0, 0.0)
        self._turn = trial.turn() if plan.method.solver is not None else None

    def quantized(self) -> dict[str, float]:
        """Seconds by part."""
        if self._turn is None:
            return {}
        parts: dict[str, float] = {}
        for name, seconds in self._blocks(self._turn):
            part = PARTS.get(name, "solving")
            parts[part] = parts.get(part, 0.0) + seconds
        method = self._plan.method
        if method.model_transforms:
            ends, block = self._trial.rotation()
            parts["rotation"] = ends + block * self._count
        if method.model_tunings:
            each = [self._trial.steps(tuning) for tuning in method.model_tunings]
            parts["tuning of the model"] = sum(ends + block * self._count for ends, block in each)
        parts["solving"] = parts.get("solving", 0.0) + self._ends(self._turn)
        return parts

    @property
    def _times(self) -> float:
        """Batches of this rank, in units of the trial's."""
        if self._context.tokens is None or self._turn is None:
            return 0.0
        return self._context.tokens.ids.numel() / self._plan.settings.ranks.size / max(1, self._turn.tokens)

    def _blocks(self, turn: Turn) -> Iterator[tuple[str, float]]:
        """Phases and their seconds, of all blocks that are not finished yet."""
        record, done = record_of(self._plan, self._context), 0
        if self._plan.resume:
            done = min(self._count, self._context.run.journal.count())
        recorded = record is not None and record.journal.count() >= self._count
        left = self._trial.blocks * (1 - done / self._count)
        for name, seconds in turn.seconds.items():
            if recorded and name in OBSERVED:
                continue
            if name == "embed":
                yield name, seconds * self._times
            elif name == "disk":
                yield name, left * seconds * self._written(turn) / max(1, turn.written)
            else:
                shared = self._plan.settings.ranks.size if name in ("solve", "factor") else 1
                yield name, left * seconds * (self._times if name in OF_TOKENS else 1 / shared)
        yield "disk", left * turn.read

    def _written(self, turn: Turn) -> float:
        """Bytes that a block of the run writes: its own, and the hidden states of all tokens."""
        if self._context.tokens is None:
            return turn.written
        embedding: Any = self._context.loaded.model.get_input_embeddings()
        width: int = embedding.weight.shape[1]
        dtype = self._plan.compute_dtype
        state = (1 + self._plan.method.needs_full) * width * dtype.itemsize
        if record_of(self._plan, self._context) is not None:
            return turn.written + self._times * turn.tokens * state
        return turn.written + (self._times - 1) * turn.tokens * state

    def _ends(self, turn: Turn) -> float:
        """Seconds of assign_grids what is outside of the blocks, as a block's linears take them by operations."""
        model, (prefix, blocks) = self._context.loaded.model, find_blocks(self._context.loaded.model)
        names = [name for name in self._context.grids if not name.startswith(f"{prefix}.")]
        if not names:
            return 0.0
        solves = self._plan.method.head == "solve"
        block = [matrix(m).shape for m in list(blocks)[self._trial.index].modules() if is_linear(m)]
        ends = [model.get_submodule(name).get_parameter("weight").shape for name in names]
        taken = sum(turn.seconds.get(name, 0.0) for name in ("solve", "search", "factor", "ledger"))
        return taken * sum(_operations(s, solves) for s in ends) / sum(_operations(s, solves) for s in block)

    def baseline(self) -> float:
        """Seconds of scoring full precision, or of reading what the cache has of it."""
        loaded, found = self._context.loaded, self._scores
        seconds = 0.0
        for text in self._context.windows:
            assert found is not None
            windows, length = text.ids.shape
            if not knows_scores(loaded.model, loaded.sha256, text, cache_dir() / "baselines", self._dtype):
                seconds += (
                    found.fixed
                    + self._windows(found, windows * length / found.length, 0.0)
                    + windows * length * found.nll
                )
                if self._dtype != torch.float32:  # the noise floor of it
                    trial = min(windows * length, TRIAL_TOKENS)
                    seconds += 2 * self._windows(found, trial / found.length, 0.0) + trial * (
                        found.compared + found.nll
                    )
        return seconds + self._tasks(known=True)

    def evaluated(self) -> float:
        """Seconds of scoring the quantized model."""
        decode = 0.0 if self._turn is None else self._turn.decode
        seconds = 0.0
        for text in self._context.windows:
            assert self._scores is not None
            windows, length = text.ids.shape
            passed = self._windows(self._scores, windows * length / self._scores.length, decode)
            seconds += self._scores.fixed + passed + windows * length * self._scores.compared
        return seconds + self._tasks(known=False)

    def _windows(self, found: ScoreTimings, windows: float, decode: float) -> float:
        """Seconds of some windows' forwards; blocks of a offloaded model are read once, or decoded."""
        each = found.window + found.block * self._count
        return windows * each + self._count * (decode or self._trial.read)

    def _tasks(self, known: bool) -> float:
        loaded, tasks = self._context.loaded, self._context.tasks
        if tasks is None:
            return 0.0
        if known and read_answers(loaded.model, loaded.sha256, cache_dir() / "baselines", self._dtype):
            return 0.0
        assert self._tasked is not None
        once, outside, inside = self._tasked
        return once + self._trial.items(tasks.limit) * (outside + inside * self._count)

    def exported(self) -> float:
        """Seconds of writing and verifying checkpoints."""
        return self._exported[0] + self._exported[1] * self._count


def _operations(shape: torch.Size, solves: bool) -> int:
    """Of assign_grids a weight (out, in); without error feedback, each number once."""
    rows, width = shape
    return rows * width**2 + width**3 if solves else rows * width
