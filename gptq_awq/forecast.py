"""What a run will take, before it begins: seconds and memory by phase, from a trial of one batch on one block.

The trial runs the first batch through the first block, as calibration will, and solves the linears of one site. The
rest follows from counts: batches, blocks, and the operations of solving, n³ to factor the H of a site with n columns
and out x n² to sweep a linear. What transforms search for and tuning learns is not in it.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from gptq_awq import memory
from gptq_awq.costs import matmul_rate
from gptq_awq.data import TokenSet
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import Site, is_linear, matrix, widest
from gptq_awq.models.residence import resident, streamed
from gptq_awq.moments import Moments
from gptq_awq.pipeline.inputs import first_batch, resolve_compute_dtype
from gptq_awq.pipeline.observe import Observer, in_dtype
from gptq_awq.pipeline.places import landing
from gptq_awq.pipeline.streams import open_streams
from gptq_awq.plan import Plan
from gptq_awq.runlog import Clock
from gptq_awq.work import Work

log = logging.getLogger(__name__)
AFFORDABLE = 2e10
"""Operations of solving a site that a trial may spend: a second or less."""


@dataclass(frozen=True)
class PhaseForecast:
    """One phase: seconds that it takes, and the most memory that the process has in it."""

    name: str
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Forecast:
    """All phases, in their order."""

    phases: tuple[PhaseForecast, ...]

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def bytes(self) -> float:
        """At the most."""
        return max(phase.bytes for phase in self.phases)

    def table(self) -> Table:
        """For the console."""
        table = Table(title="forecast", box=box.SIMPLE, title_justify="left")
        for column in ("phase", "time", "memory"):
            table.add_column(column, justify="left" if column == "phase" else "right")
        for phase in (*self.phases, PhaseForecast("all", self.seconds, self.bytes)):
            table.add_row(phase.name, f"{phase.seconds:.0f} s", f"{phase.bytes / 1e9:.2f} GB")
        return table


@dataclass(frozen=True)
class Trial:
    """What was measured: seconds of a batch's forward and moments; seconds per operation of solving."""

    batch: float
    tokens: int
    solve: float
    sites: tuple[Site, ...]


def announce(plan: Plan, work: Work, clock: Clock) -> None:
    """Say what the phases to come will take, where it was asked for, or the model is large enough to be streamed."""
    if work.tokens is None or not (streamed(work.loaded.model) if plan.forecast is None else plan.forecast):
        return
    with clock.phase("forecast"):
        found = forecast(plan, work, work.tokens)
    Console(stderr=True).print(found.table())
    for phase in found.phases:
        log.info("forecast: %s: %.1f s, %.2f GB", phase.name, phase.seconds, phase.bytes / 1e9)


def forecast(plan: Plan, work: Work, tokens: TokenSet) -> Forecast:
    """Try, count, and say what the run will take."""
    model = work.loaded.model
    _, blocks = find_blocks(model)
    trial = _try(plan, work, tokens)
    per_block = tokens.ids.numel() / trial.tokens * trial.batch
    solving = sum(_operations(blocks[0], site, plan) for site in trial.sites) * trial.solve
    scored = sum(text.ids.numel() for text in work.windows)
    scoring = len(blocks) * trial.batch * scored / trial.tokens + _head_seconds(plan, model, scored)
    needs = _Needs(plan, work, tokens)
    phases = [PhaseForecast("baseline", scoring, needs.scoring)] if scored else []
    phases += [
        PhaseForecast("quantize: forwards, moments", len(blocks) * per_block, needs.forward),
        PhaseForecast("quantize: solving", len(blocks) * solving, needs.solving),
    ]
    phases += [PhaseForecast("evaluate", scoring, needs.scoring)] if scored else []
    return Forecast(tuple(phases))


@torch.no_grad()
def _try(plan: Plan, work: Work, tokens: TokenSet) -> Trial:
    model, settings = work.loaded.model, plan.settings
    _, blocks = find_blocks(model)
    dtype = resolve_compute_dtype(settings.compute_dtype, plan.device)
    streams = open_streams(
        model, blocks, first_batch(tokens, settings.tokens_per_batch), settings.tokens_per_batch, dtype
    )
    observer = Observer(streams, absorbers=False, heads=None)
    with resident(blocks[0]):
        sites = observer.sites(blocks[0], 0)
        runner = in_dtype(blocks[0], dtype)
        observer.observe(runner, 0, sites[:1], advance=False)  # compiles
        started = time.perf_counter()
        seen = observer.observe(runner, 0, sites, advance=False)
        taken = time.perf_counter() - started
        counts = [_operations(blocks[0], site, plan) for site in sites]
        cheapest = counts.index(min(counts))
        tried = max((i for i, n in enumerate(counts) if n <= AFFORDABLE), key=counts.__getitem__, default=cheapest)
        _solve_rate(blocks[0], sites[cheapest], seen.moments[cheapest], plan, work)  # compiles
        rate = _solve_rate(blocks[0], sites[tried], seen.moments[tried], plan, work)
    return Trial(taken, streams.batches[0].hidden.shape[:2].numel(), rate, tuple(sites))


def _solve_rate(block: nn.Module, site: Site, moments: Moments, plan: Plan, work: Work) -> float:
    """Seconds per operation, of all linears of one site."""
    assert plan.method.solver is not None
    prefix, _ = find_blocks(work.loaded.model)
    grids = landing(work.loaded.model, plan.grid)
    started = time.perf_counter()
    for name in site.linears:
        if (grid := grids.get(f"{prefix}.0.{name}")) is not None:
            weight = matrix(block.get_submodule(name)).float()
            plan.method.solver.solve(weight, moments, grid).quantized.dequantize()
    return (time.perf_counter() - started) / _operations(block, site, plan)


def _operations(block: nn.Module, site: Site, plan: Plan) -> float:
    """Of solving a site's linears; without H, each weight once."""
    rows = sum(len(matrix(block.get_submodule(name))) for name in site.linears)
    if plan.method.solver is None or not plan.method.solver.needs_hessian:
        return rows * site.width
    return site.width**3 + rows * site.width**2


def _head_seconds(plan: Plan, model: nn.Module, tokens: int) -> float:
    """Of logits of two models, to compare."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if head is None or not tokens:
        return 0.0
    words, width = head.weight.shape
    rate = matmul_rate(torch.float32, 512, width, 2048, plan.device)
    return 2 * 2 * tokens * words * width / rate


class _Needs:
    """Memory of the process, by what it does."""

    def __init__(self, plan: Plan, work: Work, tokens: TokenSet) -> None:
        model, settings = work.loaded.model, plan.settings
        _, blocks = find_blocks(model)
        self._base = memory.resident_bytes()
        dtype = resolve_compute_dtype(settings.compute_dtype, plan.device)
        own, full = next(model.parameters()).dtype, 1 + plan.method.needs_full
        numbers = max(sum(p.numel() for p in block.parameters()) for block in blocks)
        held = own.itemsize if streamed(model) else 0
        self._block = numbers * (held + (dtype.itemsize if own != dtype else 0) + dtype.itemsize * (full - 1))
        self._numbers, self._held = numbers, numbers * held
        width, columns = model.config.get_text_config().hidden_size, widest(blocks)
        count = tokens.ids.numel()
        flowing = full * count * width * dtype.itemsize
        free = memory.available_bytes(plan.device, settings.memory_budget)
        batch = full * memory.held_bytes(settings.tokens_per_batch, width, columns, dtype.itemsize)
        self._streams = batch + (0 if flowing > free / 8 else flowing)
        self._columns = columns
        self._largest = max(w.numel() for w in map(matrix, _linears(blocks)) if w.shape[1] == columns)
        head = model.get_output_embeddings()
        self._head = 0 if head is None or not streamed(model) else head.weight.numel() * own.itemsize
        self._scored = sum(text.ids.numel() for text in work.windows) * width * own.itemsize
        self._moments = 8 + 12 * (full - 1)

    @property
    def forward(self) -> float:
        """While sites are looked for, and batches pass through a block."""
        return self._base + self._block + max(4 * self._numbers, self._streams + 4 * self._columns**2)

    @property
    def solving(self) -> float:
        """While the widest linear is solved."""
        square = self._moments * self._columns**2
        return self._base + self._block + square + memory.SOLVED * self._largest + self._streams

    @property
    def scoring(self) -> float:
        """While a block or the head is in memory, and the last hidden states of two models."""
        return self._base + max(self._held, self._head) + 2 * self._scored


def _linears(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    return (module for module in blocks.modules() if is_linear(module))
