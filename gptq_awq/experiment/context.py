"""Context of a run, loaded: model, windows, tasks, calibration tokens, and the hash that the run goes by.

Whatever can be known to be wrong is found here, or when options are instantiated: before anything slow starts.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptq_awq.allocation.sensitivity import check_offloaded
from gptq_awq.calibration.activations import batches_of
from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.data.tokens import TokenSet
from gptq_awq.evaluation.perplexity import checked_windows
from gptq_awq.experiment.fitting import fitted_corpus, readable
from gptq_awq.experiment.forecasting.memory_model import MemoryModel
from gptq_awq.experiment.plan import Plan
from gptq_awq.experiment.registry import Run
from gptq_awq.export.base import linear_specs
from gptq_awq.grids.allocated import AllocatedGrid
from gptq_awq.grids.base import Grid
from gptq_awq.models.activations import check_activations
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.embeddings import untie
from gptq_awq.models.experts import compute_eagerly, unfuse
from gptq_awq.models.left import mark_left
from gptq_awq.models.linear import widest
from gptq_awq.models.load import LoadedModel
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.embeddings import free_head
from gptq_awq.quantization.footprint import Footprint
from gptq_awq.quantization.quantize import needs_calibration
from gptq_awq.quantization.targets import assign_grids
from gptq_awq.runtime import memory
from gptq_awq.runtime.fingerprint import (
    curvature_sha256,
    encoding_sha256,
    export_sha256,
    generation_sha256,
    observations_sha256,
    run_sha256,
    written_sha256,
)
from gptq_awq.runtime.progress import Track
from gptq_awq.runtime.source import code_sha256, package_sha256
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.checksummed import ChecksummedFile, once
from gptq_awq.storage.journal import Journal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """Everything that a run needs, loaded: nothing has been computed yet, nothing is to be undone.

    Attributes:
        loaded: the model and its tokenizer.
        windows: to score.
        tasks: lm-eval's, None for none.
        tokens: calibration data, None where the method looks at none.
        grids: module name → where its weight will land.
        code: hash of this program's source, as it was when the run began.
        run: the run's content hash and folder.
        baseline_bytes: of the full-precision model, in 16 bits.
    """

    loaded: LoadedModel
    windows: tuple[TokenSet, ...]
    tasks: Any
    tokens: TokenSet | None
    grids: Mapping[str, Grid]
    code: str
    run: Run
    baseline_bytes: int


def load(plan: Plan) -> RunContext:
    """Load model and data, and look at all that can be known to be wrong before anything is computed.

    Raises:
        UserError: naming the option.
    """
    package, code = package_sha256(), code_sha256(plan.config)  # now: the files may change while the run goes on
    room = plan.settings.ranks.from_first(lambda: plan.room)  # all stream the model, or none
    loaded = plan.model.load(dtype=plan.dtype, device=str(plan.device), room=room)
    compute_eagerly(loaded.model)
    if plan.method.solver is not None or plan.act.label is not None:
        unfuse(loaded.model)
    if plan.method.solver is not None:
        mark_left(loaded.model, needs_calibration(plan.method, plan.grid))
    check_activations(loaded.model, plan.act, plan.kv)
    baseline_bytes = Footprint().model_bytes(loaded.model)
    if plan.method.model_transforms:  # which give a tied head weights of its own: formats and grids shall see it so
        untie(loaded.model)
    free_head(loaded.model, plan.method)
    if isinstance(plan.grid, AllocatedGrid) and plan.method.solver is not None:
        check_offloaded(loaded.model, plan.grid)
    windows = tuple(readable(w, loaded, "eval.perplexity") for w in plan.evaluation.token_sets(loaded.tokenizer))
    for window in windows:
        checked_windows(loaded.model, window)
    tasks = plan.evaluation.load_tasks(plan.seed)
    calibrates = needs_calibration(plan.method, plan.grid)
    tokens = None
    if calibrates:
        corpus, loaded = fitted_corpus(plan.data, loaded)
        tokens = readable(corpus.tokens(loaded.tokenizer, seed=plan.seed), loaded, "data")
    own = plan.method.self_calibration
    if own is not None and tokens is not None:
        own.check(loaded.model, tokens)
    if plan.method.output_curvature is not None:
        plan.method.output_curvature.check(loaded.model)
    grids = assign_grids(loaded.model, plan.grid, plan.method.head) if plan.method.solver is not None else {}
    natural = getattr(plan.method.solver, "natural_groups", True)
    if plan.exports.formats and (plan.act.label or plan.kv.label):
        log.warning(
            "checkpoints hold weights only: act=%s, kv=%s are for the engine to do", plan.act.label, plan.kv.label
        )
    plan.exports.check(linear_specs(loaded.model, grids, natural), loaded.model, loaded.tokenizer)
    _check_memory(loaded, tokens, plan)
    run_ = Run(run_sha256(plan.config, _content(plan, loaded, windows, tasks, tokens), code), plan.out)
    return RunContext(loaded, windows, tasks, tokens, grids, package, run_, baseline_bytes)


def _content(
    plan: Plan, loaded: LoadedModel, windows: tuple[TokenSet, ...], tasks: Any, tokens: TokenSet | None
) -> dict[str, Any]:
    """All data that the run's numbers and checkpoints come from, by content.

    The tokenizer has made the windows, which are hashed themselves; it counts where it does more than that.
    """
    answers, writes = tasks is not None, plan.method.self_calibration is not None
    return {
        "model": loaded.sha256,
        "calibration": tokens and tokens.sha256,
        "eval": [t.sha256 for t in windows],
        "tasks": tasks and tasks.sha256(),
        "encoding": encoding_sha256(loaded.tokenizer) if answers else None,
        "generation": generation_sha256(loaded.model) if answers or writes else None,
        "export": export_sha256(loaded.model, loaded.tokenizer) if plan.exports.formats else None,
        "device": plan.device.type,
        "compute_dtype": str(plan.compute_dtype),
        "eval_dtype": str(resolve_compute_dtype(plan.evaluation.compute_dtype, plan.device)),
    }


def self_calibrated(plan: Plan, context: RunContext, track: Track) -> RunContext:
    """Extend the calibration tokens by windows that the model writes, if the method asks for them; they are cached.

    Of several ranks the first one writes.
    """
    own, given = plan.method.self_calibration, context.tokens
    if own is None or given is None:
        return context
    key = written_sha256(context.loaded.model, context.loaded.sha256, given.sha256, own, plan.compute_dtype)

    def write() -> ChecksummedFile:
        return ChecksummedFile({"ids": own.write(context.loaded.model, given, plan.compute_dtype, track)})

    kept = plan.settings.ranks.from_first(
        lambda: once(cache_dir() / "tokens" / f"{key}.safetensors", "model's own calibration text", write)
    )
    return replace(context, tokens=own.added(given, kept.tensors["ids"]))


def curvature_file(plan: Plan, context: RunContext) -> Path | None:
    """File that output curvature is kept in, shared with other runs; None for methods without."""
    settings, tokens = plan.method.output_curvature, context.tokens
    if settings is None or tokens is None:
        return None
    loaded, transforms = context.loaded, plan.method.model_transforms
    key = curvature_sha256(loaded.model, loaded.sha256, tokens.sha256, settings, plan.compute_dtype, transforms)
    return cache_dir() / "curvatures" / f"{key}.safetensors"


def record_of(plan: Plan, context: RunContext) -> ObservationCache | None:
    """Cache of this run's full-precision calibration, shared with other runs; None for methods that have none."""
    if context.tokens is None or plan.method.error_propagation:
        return None
    key = observations_sha256(
        context.loaded.model,
        context.loaded.sha256,
        context.tokens.sha256,
        plan.compute_dtype,
        plan.settings.tokens_per_batch,
        plan.method.model_transforms,
        plan.experts,
    )
    return ObservationCache(Journal(cache_dir() / "moments" / key, key), plan.cache_bytes)


def _check_memory(loaded: LoadedModel, tokens: TokenSet | None, plan: Plan) -> None:
    """Refuse, before calibration starts, a run that will not fit into memory."""
    if tokens is None:
        return
    ranks, (_, blocks) = plan.settings.ranks, find_blocks(loaded.model)
    before, own = 0, plan.method.self_calibration
    if own is not None:
        before = own.needed_bytes(loaded.model, tokens.ids.shape[1], plan.compute_dtype)
        tokens = own.unwritten(tokens)
    if (curvature := plan.method.output_curvature) is not None:
        before = max(before, curvature.needed_bytes(loaded.model, tokens.ids.shape[1], plan.compute_dtype))
    batches_of(ranks, tokens, plan.settings.tokens_per_batch)
    needed = max(before, MemoryModel(plan, loaded.model, tokens).calibration)
    log.info("calibration needs about %.2f GB beyond the model", needed / 1e9)
    what = f"calibrating {loaded.name} (widest layer: {widest(blocks)} columns)"
    needed = needed if plan.settings.memory_budget is not None else needed * ranks.sharing(plan.device)
    memory.require(needed, plan.device, what, plan.settings.memory_budget)
