"""Summary of a finished run: its results row, and the manifest of all that its numbers depend on."""

from collections.abc import Mapping, Sequence
from typing import Any

from gptq_awq.evaluation.evaluate import Baseline
from gptq_awq.experiment.context import RunContext
from gptq_awq.experiment.folder import LEDGER
from gptq_awq.experiment.forecasting.forecast import Forecast
from gptq_awq.experiment.plan import Plan
from gptq_awq.export.write import Exported
from gptq_awq.quantization.footprint import PLAIN_BITS, Footprint
from gptq_awq.results import Result
from gptq_awq.runtime import memory
from gptq_awq.runtime.fingerprint import config_sha256
from gptq_awq.runtime.provenance import provenance
from gptq_awq.runtime.runlog import Clock
from gptq_awq.runtime.source import environment


def results_row(
    plan: Plan,
    context: RunContext,
    footprint: Footprint,
    metrics: Mapping[str, Any],
    clock: Clock,
    manifest: Mapping[str, Any],
    expected: Forecast | None,
) -> Result:
    """Build the results row of a run that is done."""
    full, loaded = plan.method.solver is None, context.loaded
    return Result(
        method=plan.method.name,
        bits=PLAIN_BITS if full else plan.grid.bits,
        bits_per_weight=footprint.bits_per_weight,
        group_size=None if full else plan.grid.group_size,
        sym=None if full else getattr(plan.grid, "sym", None),
        model=loaded.name,
        status="done",
        metrics=metrics,
        size_bytes=footprint.model_bytes(loaded.model),
        baseline_size_bytes=context.baseline_bytes,
        seconds=clock.total(),
        peak_memory_bytes=memory.peak_bytes(plan.device),
        ledger=LEDGER,
        manifest=manifest,
        config=plan.config,
        grid=None if full else plan.grid.label,
        act=plan.act.label,
        kv=plan.kv.label,
        forecast=expected and expected.row(),
    )


def run_manifest(
    plan: Plan, context: RunContext, baseline: Baseline, checkpoints: Sequence[Exported]
) -> dict[str, Any]:
    """Build the manifest: hashes and sources of all that went into a run, and what came out beside its row."""
    loaded, tokens = context.loaded, context.tokens
    return {
        "run": context.run.sha256,
        "model": {"source": loaded.source, "sha256": loaded.sha256, "dtype": plan.dtype},
        "tokens": {
            "calibration": None if tokens is None else tokens.sha256,
            "eval": baseline.sha256,
        },
        "sources": {
            "calibration": None if tokens is None else tokens.source,
            "eval": _evaluation_sources(baseline),
        },
        "loading": loaded.report.row(),
        "checkpoints": {
            c.format: {"path": str(c.path.relative_to(plan.out)), "size_bytes": c.size_bytes, "seconds": c.seconds}
            for c in checkpoints
        },
        "config": config_sha256(plan.config),
        "code": context.code,
        "compute_dtype": str(plan.compute_dtype),
        "eval_dtype": str(baseline.compute_dtype if plan.dtype == "float32" else loaded.model.dtype),
        "act": plan.act.label,
        "kv": plan.kv.label,
        "seed": plan.seed,
        "ranks": plan.settings.ranks.size,
        "provenance": provenance(),
    } | environment()


def _evaluation_sources(baseline: Baseline) -> dict[str, str]:
    tasks = baseline.tasks.sources if baseline.tasks else {}
    return {t.name: t.source for t in baseline.tokens} | {f"lm_eval/{name}": s for name, s in tasks.items()}
