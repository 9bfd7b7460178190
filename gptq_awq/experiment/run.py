"""One run: preflight → load → baseline → quantize → export → evaluate → results row.

Whatever can be known to be wrong is found before anything slow starts: options when they are instantiated, data
and model when they are loaded, memory by a forecast. A mistake is a `UserError`, and leaves no results behind.
"""

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from gptq_awq.cache import leftovers
from gptq_awq.cache.cache import prune
from gptq_awq.evaluation.evaluate import full_precision, score
from gptq_awq.evaluation.samples.continuation import Continuation, continue_greedily
from gptq_awq.evaluation.samples.difference import compared
from gptq_awq.experiment import lookup
from gptq_awq.experiment.allocating import Say, allocated
from gptq_awq.experiment.context import RunContext, curvature_file, load, record_of, self_calibrated
from gptq_awq.experiment.folder import UNFINISHED, clear_leftovers
from gptq_awq.experiment.forecasting.forecast import announce, compare
from gptq_awq.experiment.input_squares import input_statistics_of, largest_inputs
from gptq_awq.experiment.output_folder import remove_unused_hydra_folder
from gptq_awq.experiment.plan import Plan, preflight
from gptq_awq.experiment.registry import Run, alone_in
from gptq_awq.experiment.store import store, told, writing
from gptq_awq.experiment.summary import results_row, run_manifest
from gptq_awq.experiment.sweeps.following import follow, follow_finished, log_block
from gptq_awq.experiment.sweeps.sweep import (
    check_objective,
    failed,
    job_number,
    objective,
    store_failure,
    sweep_folder,
)
from gptq_awq.experiment.sweeps.tracking import Tracker
from gptq_awq.experiment.telling import Teller, tell_end
from gptq_awq.experiment.time_budget import within_budget
from gptq_awq.export.base import Source
from gptq_awq.export.verify import Probe
from gptq_awq.export.write import Exported
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.models.activations import quantized_activations
from gptq_awq.models.offload import offloaded
from gptq_awq.numerics.distributed import Ranks, opened
from gptq_awq.quantization.codes import Codes
from gptq_awq.quantization.footprint import Footprint
from gptq_awq.quantization.quantize import examine, quantize
from gptq_awq.quantization.resume import BlockResult
from gptq_awq.quantization.targets import changes_output
from gptq_awq.results import FAILURE, FILE_NAME, Ledger, Result
from gptq_awq.runtime import memory
from gptq_awq.runtime.limits import keep_to_quota
from gptq_awq.runtime.profiling import Recorder, phase
from gptq_awq.runtime.progress import Track, no_track, rich_track
from gptq_awq.runtime.runlog import Clock, RunLog
from gptq_awq.storage.assets import cache_dir

log = logging.getLogger(__name__)
PROBE_WINDOWS, PROBE_SEQLEN = 2, 256


def run(cfg: DictConfig) -> Result:
    """Run one experiment and store its row in `cfg.out`; one that is finished already is not run again.

    In a sweep, a run that fails leaves a row that says so. Of several ranks the first one stores and speaks.

    Raises:
        UserError: something the user can fix; one line, naming the option.
    """
    minutes, device = cfg.get("ranks_timeout_minutes", 30), str(cfg.get("device", "auto"))
    keep_to_quota()
    with opened(minutes, job_number(), device=device) as ranks:
        return _run(cfg, ranks)


def _run(cfg: DictConfig, ranks: Ranks) -> Result:
    cfg.out = str(cfg.out)  # out=2 is a number to the command line
    if ranks.size > 1:  # the folder is named by the time, which each looked up for itself
        cfg.out = ranks.from_first(lambda: cfg.out)
    console, folder = Console(stderr=True, quiet=not ranks.first), sweep_folder()
    teller = Teller(console, folder is not None)
    began = time.perf_counter()
    try:
        cfg = within_budget(cfg, ranks, teller.say)
        plan = preflight(cfg, ranks)
        check_objective(cfg.get("objective"), plan.evaluation)
        remove_unused_hydra_folder(plan.out)
        recorder = Recorder(plan.profile and ranks.first)
        with RunLog(console) as run_log, rich_track(console, brief=folder is not None) as track, recorder:
            try:
                result, taken = execute(plan, run_log, track, teller, recorder)
            except Exception:
                _keep_traceback(plan, run_log)
                raise
    except Exception as error:
        known = told(error)
        if ranks.first and folder is not None:
            store_failure(cfg, known)
        if known is error:
            raise
        raise known from error
    if not ranks.first:
        return result
    tell_end(plan, result, console, taken, time.perf_counter() - began, bool(cfg.get("tables", False)))
    return result


def _keep_traceback(plan: Plan, run_log: RunLog) -> None:
    """Write the traceback of an error to run.log, of a run that has a folder: one computed, or one of a sweep."""
    with suppress(OSError):
        if sweep_folder() is not None:
            run_log.open(plan.out, plan.settings.ranks.rank)
        log.debug("stopped by an error", exc_info=True)


def execute(plan: Plan, run_log: RunLog, track: Track, teller: Teller, recorder: Recorder) -> tuple[Result, bool]:
    """Load and compute a planned run, or take over the finished one: the row, and whether it was taken over."""
    clock, ranks = Clock(), plan.settings.ranks
    memory.reset_peak(plan.device)
    key = lookup.key_of(plan) if ranks.first else None
    if (result := ranks.from_first(lambda: _known(plan, lookup.known(key, plan.out), run_log, teller))) is not None:
        return result, True
    with clock.phase("load"), phase("load"):
        context = load(plan)
    check_objective(plan.config.get("objective"), plan.evaluation, context.windows, context.tasks)
    lookup.remember(key, context.run)
    with _alone(plan, context.run, teller) if ranks.first else nullcontext():
        if (result := ranks.from_first(lambda: _earlier(plan, context.run, run_log, teller))) is not None:
            return result, True
        with _logged(plan, run_log):
            if not ranks.first:
                _assist(plan, context)
            result = ranks.from_first(lambda: _computed(plan, context, clock, track, teller))
        if ranks.first:
            prune(plan.cache_bytes)
            if plan.profile:
                with writing(plan.out):
                    recorder.write(plan.out, context.run.sha256, plan.device)
    return result, False


@contextmanager
def _alone(plan: Plan, run: Run, teller: Teller) -> Iterator[None]:
    """Hold the locks of this run: no other process is in its folder or computes it; leftovers of kills are cleared."""

    def wait(what: str) -> None:
        teller.say(f"{what}: waiting for it")

    with ExitStack() as held:
        with writing(plan.out):
            held.enter_context(alone_in(plan.out, wait))
            clear_leftovers(plan.out)
            leftovers.clear_leftovers()
        held.enter_context(run.alone(wait))
        yield


@contextmanager
def _logged(plan: Plan, run_log: RunLog) -> Iterator[None]:
    """Within: a run is computed. A kill leaves the ledger of what was done; an error leaves the reason in the log."""
    rank = plan.settings.ranks.rank
    with writing(plan.out):
        run_log.open(plan.out, rank)
    try:
        yield
    except KeyboardInterrupt as stop:
        log.info("%s", str(stop) or "stopped")
        raise
    except Exception as error:
        log.info("stopped: %s", error)
        if rank == 0:
            with suppress(OSError):
                (plan.out / UNFINISHED).unlink()
        raise


def _reuses(plan: Plan) -> bool:
    """Whether a finished run may be taken over: `resume`, and no profile is asked for."""
    return plan.resume and not plan.profile


def _known(plan: Plan, run: Run | None, run_log: RunLog, teller: Teller) -> Result | None:
    """Row of the finished run that was found without loading anything; None where the run must be loaded."""
    if run is None or not _reuses(plan) or run.finished() is None:
        return None
    with _alone(plan, run, teller):
        return _earlier(plan, run, run_log, teller)


def _earlier(plan: Plan, run: Run, run_log: RunLog, teller: Teller) -> Result | None:
    """Row of this very run where it is finished already: its files and its log are taken over."""
    folder = run.finished(teller.say) if _reuses(plan) else None
    if folder is None:
        return None
    objective(Result.read(folder / FILE_NAME), plan.config.get("objective"))  # refused before
    teller.note(f"done already, taken from {folder} (resume=false computes it anew)")
    with writing(plan.out):
        result = run.adopt(folder)
        run_log.open(plan.out)
        (plan.out / FAILURE).unlink(missing_ok=True)
    run.settle()
    follow_finished(plan, run, result)
    return result


def _computed(plan: Plan, context: RunContext, clock: Clock, track: Track, teller: Teller) -> Result:
    """Compute the run; only when later runs can find it is its progress deleted."""
    coverage = examine(context.loaded.model, context.tokens, plan.method, plan.grid)
    if coverage is not None:
        coverage.tell(teller.note)
    examined = {} if coverage is None else {"coverage": coverage.row()}
    result = compute(plan, context, clock, track, teller.note, examined)
    (plan.out / FAILURE).unlink(missing_ok=True)
    context.run.remember()
    context.run.forget_progress()
    return result


def compute(
    plan: Plan, context: RunContext, clock: Clock, track: Track, say: Say, examined: Mapping[str, Any]
) -> Result:
    """Baseline, quantize, export, evaluate, store; followed by a tracker, also into a failure.

    Args:
        plan: the run's configuration.
        context: what it needs, loaded.
        clock: times its phases.
        track: reports progress.
        say: tells the user what was chosen.
        examined: facts for the manifest, found before anything was computed.
    """
    tracker = follow(plan, context.loaded.name, context.run)
    try:
        result = _compute(plan, context, tracker, clock, track, say, examined)
    except Exception as error:
        tracker.finish(failed(plan.config, error))
        raise
    tracker.finish(result)
    return result


def _compute(
    plan: Plan,
    context: RunContext,
    tracker: Tracker,
    clock: Clock,
    track: Track,
    say: Say,
    examined: Mapping[str, Any],
) -> Result:
    loaded = context.loaded
    if plan.method.self_calibration is not None:
        with clock.phase("write"):
            context = self_calibrated(plan, context, track)
    expected = announce(plan, context, clock)
    with clock.phase("baseline"):
        inputs = input_statistics_of(plan, loaded, context.tokens, track)
        largest = largest_inputs(plan, inputs)
        baseline = full_precision(
            loaded.model,
            loaded.tokenizer,
            loaded.sha256,
            context.windows,
            tasks=context.tasks,
            cache_dir=cache_dir(),
            track=track,
            keep_output=_changes_output(plan, context),
            compute_dtype=plan.evaluation.compute_dtype,
        )
        written = _written(plan, context, track)
    plan, allocation, facts = allocated(plan, context, clock, track, say)
    if not plan.resume:
        context.run.journal.clear()
    _agreed(plan)
    with clock.phase("quantize"):
        quantized = _quantize(plan, context, tracker, track)
    checkpoints: list[Exported] = []
    if plan.exports.formats:
        with clock.phase("export"):
            source = Source(loaded.model, loaded.tokenizer, loaded.name, quantized.weights, inputs)
            checkpoints = _export(plan, context, source, track)
            quantized = replace(quantized, weights={})
    with clock.phase("evaluate"), quantized_activations(loaded.model, plan.act, plan.kv, largest):
        scored = score(loaded.model, loaded.tokenizer, baseline, plan.seed, track)
        samples = compared(written, _written(plan, context, track))
    manifest = run_manifest(plan, context, baseline, checkpoints) | {"resumed": quantized.resumed, **examined, **facts}
    result = results_row(plan, context, quantized.footprint, scored.metrics, clock, manifest, expected)
    compare(result)
    return store(plan, result, scored.scores, allocation, checkpoints, samples)


def _written(plan: Plan, context: RunContext, track: Track) -> list[Continuation]:
    """Text that the model as it is writes after the prompts of eval.samples."""
    if not context.prompts:
        return []
    model, tokenizer = context.loaded.model, context.loaded.tokenizer
    return continue_greedily(model, tokenizer, context.prompts, plan.evaluation.sample_tokens, track)


def _changes_output(plan: Plan, context: RunContext) -> bool:
    """Whether the quantized model's output layer differs from full precision's, from which KL is measured."""
    method = plan.method
    return (
        method.cast is not None or bool(method.model_transforms) or changes_output(context.loaded.model, context.grids)
    )


@dataclass(frozen=True)
class Quantized:
    """Result of quantizing: sizes, codes where a checkpoint wants them, and the block it went on at after a kill."""

    footprint: Footprint
    weights: Mapping[str, QuantizedWeight]
    resumed: list[int]


def _quantize(plan: Plan, context: RunContext, tracker: Tracker, track: Track) -> Quantized:
    """Quantize the model in place, block by block; each block's rows are on disk before the next begins."""
    with writing(plan.out):
        ledger = Ledger.create(plan.out / UNFINISHED)
    footprint, restored, from_disk = Footprint(), 0, offloaded(context.loaded.model)
    codes = Codes(context.run.journal, context.grids, from_disk, wanted=bool(plan.exports.formats))
    with closing(_steps(plan, context, track)) as steps:  # ends its progress bar before an error is told
        for block in steps:
            footprint.add(block.weights)
            codes.add(block)
            with writing(plan.out):
                ledger.append(block.rows)
            tracker.ledger(block.rows)
            restored += block.restored
            log_block(tracker, block.index, block.rows)
    if restored:
        log.info("resumed after %d finished blocks", restored)
    return Quantized(footprint, codes.weights(), [restored] if restored else [])


def _steps(plan: Plan, context: RunContext, track: Track) -> Generator[BlockResult]:
    settings = replace(plan.settings, scratch=context.run.scratch)
    return quantize(
        context.loaded.model,
        context.tokens,
        plan.method,
        plan.grid,
        settings=settings,
        track=track,
        record=record_of(plan, context),
        progress=context.run.journal if plan.resume or offloaded(context.loaded.model) else None,
        experts=plan.experts,
        curvature_file=curvature_file(plan, context),
        squares=context.squares,
    )


def _assist(plan: Plan, context: RunContext) -> None:
    """Take a further rank's part in quantizing, while the first rank computes the run."""
    context = self_calibrated(plan, context, no_track)
    for _ in _steps(_agreed(plan), context, no_track):
        pass


def _agreed(plan: Plan) -> Plan:
    """Give all ranks rank 0's grid, once all have come so far; only from here on are they timed."""
    plan = replace(plan, grid=plan.settings.ranks.from_first(lambda: plan.grid))
    plan.settings.ranks.gather(None)
    return plan


def _export(plan: Plan, context: RunContext, source: Source, track: Track) -> list[Exported]:
    """Write and verify the checkpoints that were asked for."""
    loaded, tokens = context.loaded, context.tokens
    known = next((t for t in (*context.windows, tokens) if t is not None), None)
    ids = torch.arange(64)[None] if known is None else known.ids[:PROBE_WINDOWS, :PROBE_SEQLEN]
    probe = Probe.of(loaded.model, ids, "token ids 0 to 63" if known is None else known.source)
    facts = {
        "model": {
            "source": loaded.source,
            "sha256": loaded.sha256,
            "quantized_source": loaded.report.quantized_source,
            "on_grid": loaded.report.on_grid,
        },
        "method": plan.method.name,
        "grid": str(plan.grid),
        "calibration": None if tokens is None else {"source": tokens.source, "sha256": tokens.sha256},
        "code": context.code,
    }
    return plan.exports.write(source, plan.out, probe, facts, track)
