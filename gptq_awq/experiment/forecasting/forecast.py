"""Forecast of a run's seconds and memory by phase, before they begin: a dry run, multiplied by counts.

The dry run (dry_run.py) quantizes one block with one batch, scores one window, and takes a few steps of tuning of the
whole model. Counts are those of blocks, batches, windows, steps and bytes on disk. What is in the cache already
(full-precision scores, moments, finished blocks) is not counted again. The items of lm-eval tasks are not counted.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from gptq_awq.evaluation.baseline import knows_scores
from gptq_awq.evaluation.floor import TRIAL_TOKENS
from gptq_awq.experiment.context import RunContext, known_curvature, known_text, record_of
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
BY_TOKENS = ("forward", "moments", "tune")
"""Phases of a block whose seconds are proportional to the calibration tokens."""
OBSERVED = ("embed", "forward", "moments", "sites")
"""Phases that cached observations of full precision spare."""
PARTS = {"forward": "forwards, moments", "moments": "forwards, moments", "sites": "forwards, moments"}
PARTS |= {"search": "search", "tune": "tuning", "disk": "disk"}
MODEL_TUNING = "tuning of the model"
UNCOUNTED = "lm-eval tasks are not in it"
CHECKED = 3
"""Times that a checkpoint's weights are dequantized and hashed: packed, recorded, verified."""


@dataclass(frozen=True)
class PhaseForecast:
    """Forecast of one phase, or of a part of it ("quantize: solving"): seconds, and the process's peak memory."""

    name: str
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Forecast:
    """Forecast of all phases, in their order.

    `begun`: seconds that the run had taken before them; `tasks`: it will ask lm-eval tasks as well.
    """

    phases: tuple[PhaseForecast, ...]
    begun: float = 0.0
    tasks: bool = False

    @property
    def seconds(self) -> float:
        """Seconds of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def bytes(self) -> float:
        """Peak memory of all phases."""
        return max((phase.bytes for phase in self.phases), default=0.0)

    def row(self) -> dict[str, Any]:
        """Entry of the results row: seconds by phase, the whole run's as "total", and its peak memory."""
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
        """Table for the console."""
        table = Table(title="forecast", box=box.SIMPLE, title_justify="left", caption=UNCOUNTED if self.tasks else None)
        for column in ("phase", "time", "memory"):
            table.add_column(column, justify="left" if column == "phase" else "right")
        for phase in (*self.phases, PhaseForecast("all", self.seconds, self.bytes)):
            table.add_row(phase.name, f"{phase.seconds:.0f} s", f"{phase.bytes / 1e9:.2f} GB")
        return table


def announce(plan: Plan, context: RunContext, clock: Clock) -> Forecast | None:
    """Print the forecast of the phases to come, where it was asked for or the model is offloaded."""
    if not (offloaded(context.loaded.model) if plan.forecast is None else plan.forecast):
        return None
    if plan.profile:
        log.info("no forecast with profile=true: a dry run would be in the profile")
        return None
    try:
        with clock.phase("forecast"):
            phases = forecast(plan, context)
    except Exception as error:  # of one batch or one block alone; what is wrong with the run, the run will say
        log.warning("no forecast: %s: %s", type(error).__name__, error)
        return None
    found = Forecast(tuple(phases), begun=clock.total()["total"], tasks=context.tasks is not None)
    Console(stderr=True).print(found.table())
    for phase in found.phases:
        log.info("forecast: %s: %.1f s, %.2f GB", phase.name, phase.seconds, phase.bytes / 1e9)
    return found


def compare(result: Result) -> None:
    """Log the forecast, if there was one, beside what the run took: seconds of all phases, peak memory."""
    if result.forecast is None:
        return
    for name, expected in result.forecast["seconds"].items():
        log.info("%s: forecast %.1f s, took %.1f s", name, expected, result.seconds[name])
    expected, peak = result.forecast["peak_memory_bytes"], result.peak_memory_bytes or 0
    log.info("peak memory: forecast %.2f GB, took %.2f GB", expected / 1e9, peak / 1e9)


def forecast(plan: Plan, context: RunContext) -> list[PhaseForecast]:
    """Make the dry run, and forecast every phase from it.

    Raises:
        UserError: the dry run fails, as the run would.
    """
    with dry_run_of(plan, context) as dry_run:
        counts = Counts(plan, context, dry_run)
        baseline, quantized, evaluated = counts.baseline(), counts.quantized(), counts.evaluated()
    model = MemoryModel(plan, context.loaded.model, context.tokens, context.windows)
    used = memory.used_bytes(plan.device)
    least = max(used, memory.peak_bytes(plan.device))  # the run has had it already

    def of(name: str, seconds: float, needed: int) -> PhaseForecast:
        return PhaseForecast(name, seconds, max(least, used + needed))

    phases = [of("baseline", baseline, model.scoring)]
    for part, seconds in quantized.items():
        phases.append(of(f"quantize: {part}", seconds, model.tuning if part == MODEL_TUNING else model.blocks))
    if plan.exports.formats:
        phases.append(of("export", counts.exported(), model.scoring))
    return [*phases, of("evaluate", evaluated, model.scoring)]


class Counts:
    """Seconds of the run's phases: those of a dry run times how often the run does the same.

    Args:
        plan: what is asked for.
        context: the model and data it needs, loaded.
        dry_run: its timings.
    """

    def __init__(self, plan: Plan, context: RunContext, dry_run: DryRun) -> None:
        self._plan, self._context, self._dry_run = plan, context, dry_run
        self._model: Any = context.loaded.model
        self._prefix, self._blocks = find_blocks(self._model)
        lower = self._model.dtype == torch.float32
        self._dtype = resolve_compute_dtype(plan.evaluation.compute_dtype, plan.device) if lower else torch.float32

    @cached_property
    def _turn(self) -> Turn | None:
        return None if self._plan.method.solver is None else self._dry_run.turn()

    @cached_property
    def _scores(self) -> ScoreTimings:
        return self._dry_run.scores(self._dtype)

    def quantized(self) -> Mapping[str, float]:
        """Seconds of quantizing, by part."""
        if self._turn is None:
            return {}
        parts: dict[str, float] = defaultdict(float)
        for name, seconds in self._block_loop(self._turn).items():
            parts[PARTS.get(name, "solving")] += seconds
        method = self._plan.method
        if method.model_transforms:
            parts["rotation"] = self._dry_run.rotation().at(len(self._blocks))
        for tuning in method.model_tunings:
            parts[MODEL_TUNING] += self._dry_run.tuning(tuning).at(len(self._blocks))
        if method.output_curvature is not None and not known_curvature(self._plan, self._context):
            parts["gradients"] = self._dry_run.gradients()
        parts["solving"] += self._outside(self._turn)
        return parts

    def written(self) -> float:
        """Seconds of writing the model's own calibration text, where there is to be some that is not in the cache."""
        if self._plan.method.self_calibration is None or known_text(self._plan, self._context):
            return 0.0
        return self._dry_run.written()

    def _block_loop(self, turn: Turn) -> Mapping[str, float]:
        """Seconds by phase of all blocks that are not finished yet."""
        count, cache, done = len(self._blocks), record_of(self._plan, self._context), 0
        if self._plan.resume:
            done = min(count, self._context.run.journal.count())
        known = cache is not None and cache.journal.count() >= count
        left, ranks = self._dry_run.blocks * (1 - done / count), self._plan.settings.ranks.size
        times: dict[str, float] = dict.fromkeys(turn.seconds, left)
        times |= dict.fromkeys(BY_TOKENS, left * self._batches) | {"embed": self._batches}
        times |= dict.fromkeys(("solve", "factor"), left / ranks)
        times |= dict.fromkeys(OBSERVED, 0.0) if known else {}
        times["disk"] = left * self._written(turn) / turn.written if turn.written else 0.0  # resume=false keeps nothing
        seconds = {name: taken * times[name] for name, taken in turn.seconds.items()}
        return seconds | {"disk": seconds.get("disk", 0.0) + left * turn.read}

    @cached_property
    def _batches(self) -> float:
        """Batches of this rank, in units of the dry run's."""
        if self._context.tokens is None or self._turn is None:
            return 0.0
        return self._context.tokens.ids.numel() / self._plan.settings.ranks.size / max(1, self._turn.tokens)

    def _written(self, turn: Turn) -> float:
        """Bytes that a block of the run writes: those of the dry run's, and the hidden states of all tokens."""
        if self._context.tokens is None:
            return turn.written
        width: int = self._model.get_input_embeddings().weight.shape[1]
        state = (1 + self._plan.method.needs_full) * width * self._plan.compute_dtype.itemsize
        more = self._batches if record_of(self._plan, self._context) is not None else self._batches - 1
        return turn.written + more * turn.tokens * state

    def _outside(self, turn: Turn) -> float:
        """Seconds of quantizing embedding and head, in proportion to the weights of a block's linears."""
        names = [name for name in self._context.grids if not name.startswith(f"{self._prefix}.")]
        outside = sum(self._model.get_submodule(name).get_parameter("weight").numel() for name in names)
        block = sum(matrix(m).numel() for m in self._blocks[self._dry_run.index].modules() if is_linear(m))
        return outside / block * sum(turn.seconds.get(name, 0.0) for name in ("solve", "search", "factor", "ledger"))

    def baseline(self) -> float:
        """Seconds of scoring full precision on the texts whose scores are not in the cache."""
        loaded, seconds = self._context.loaded, 0.0
        for text in self._context.windows:
            if knows_scores(loaded.model, loaded.sha256, text, cache_dir() / "baselines", self._dtype):
                continue
            scores, tokens = self._scores, text.ids.numel()
            seconds += scores.fixed + self._forwards(tokens) + tokens * scores.nll
            if self._dtype != torch.float32:  # the noise floor of it, in both precisions
                tokens = min(tokens, TRIAL_TOKENS)
                seconds += 2 * self._forwards(tokens) + tokens * (scores.compared + scores.nll)
        return seconds

    def evaluated(self) -> float:
        """Seconds of scoring the quantized model; each of its blocks is decoded, where it is on disk."""
        decode, seconds = 0.0 if self._turn is None else self._turn.decode, 0.0
        for text in self._context.windows:
            scores, tokens = self._scores, text.ids.numel()
            seconds += scores.fixed + self._forwards(tokens, decode) + tokens * scores.compared
        return seconds

    def _forwards(self, tokens: int, decode: float = 0.0) -> float:
        """Seconds of forwards; each block of an offloaded model is read once, or decoded."""
        windows, count = tokens / self._scores.length, len(self._blocks)
        return windows * self._scores.window.at(count) + count * (decode or self._dry_run.read)

    def exported(self) -> float:
        """Seconds of writing and verifying checkpoints, in proportion to dequantizing and hashing a block's weights."""
        if self._turn is None:
            return 0.0
        block = sum(p.numel() for p in self._blocks[self._dry_run.index].parameters())
        blocks = sum(p.numel() for p in self._model.parameters()) / block
        return len(self._plan.exports.formats) * CHECKED * blocks * self._turn.export
