"""Context of a run, loaded: model, windows, tasks, calibration tokens, and the hash that the run goes by.

Whatever can be known to be wrong is found here, or when options are instantiated: before anything slow starts.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gptq_awq.allocation.allocate import sizes_and_budget
from gptq_awq.allocation.protect import check_protectable
from gptq_awq.allocation.sensitivity import allocated_places, check_offloaded
from gptq_awq.calibration.activations import batches_of
from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.data.tokens import TokenSet
from gptq_awq.evaluation.perplexity import checked_windows
from gptq_awq.evaluation.samples.prompts import Prompt
from gptq_awq.experiment.fitting import fitted_corpus, readable
from gptq_awq.experiment.forecasting.memory_model import MemoryModel
from gptq_awq.experiment.input_squares import check_static, given_squares, needs_inputs
from gptq_awq.experiment.plan import Plan
from gptq_awq.experiment.registry import Run
from gptq_awq.export.base import linear_specs
from gptq_awq.export.gguf_size import gguf_bytes_beside
from gptq_awq.grids.allocated import BudgetedGrid
from gptq_awq.grids.base import Grid
from gptq_awq.grids.protected import ProtectedGrid
from gptq_awq.models.activations import check_activations
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.embeddings import untie
from gptq_awq.models.left import mark_left
from gptq_awq.models.linear import widest
from gptq_awq.models.load import LoadedModel
from gptq_awq.models.offload import offloaded
from gptq_awq.models.steady import keep_weights
from gptq_awq.models.unfuse import compute_eagerly, unfuse
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
from gptq_awq.storage.assets import cache_dir, file_sha256
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
        prompts: to go on from, for text to read.
        tokens: calibration data, None where the method looks at none.
        grids: module name → where its weight will land.
        code: hash of this program's source, as it was when the run began.
        run: the run's content hash and folder.
        baseline_bytes: of the full-precision model, in 16 bits.
        squares: mean squares of the linears' inputs by full name, from an importance matrix; None: none was given.
        beside: bytes of a GGUF file besides the weights that a budget allocates.
    """

    loaded: LoadedModel
    windows: tuple[TokenSet, ...]
    tasks: Any
    prompts: tuple[Prompt, ...]
    tokens: TokenSet | None
    grids: Mapping[str, Grid]
    code: str
    run: Run
    baseline_bytes: int
    squares: Mapping[str, Tensor] | None = None
    beside: int = 0


def load(plan: Plan) -> RunContext:
    """Load model and data, and look at all that can be known to be wrong before anything is computed.

    Raises:
        UserError: naming the option.
    """
    check_static(plan)
    package, code = package_sha256(), code_sha256(plan.config)  # now: the files may change while the run goes on
    room = plan.settings.ranks.from_first(lambda: plan.room)  # all stream the model, or none
    loaded = plan.model.load(dtype=plan.dtype, device=str(plan.device), room=room)
    _prepare(loaded.model)
    if plan.method.solver is not None or plan.act.label is not None:
        unfuse(loaded.model)
    if plan.method.solver is not None:
        mark_left(loaded.model, needs_calibration(plan.method, plan.grid))
    check_activations(loaded.model, plan.act, plan.kv)
    baseline_bytes = Footprint().model_bytes(loaded.model)
    if plan.method.model_transforms:  # which give a tied head weights of its own: formats and grids shall see it so
        untie(loaded.model)
    free_head(loaded.model, plan.method)
    beside = 0
    if isinstance(plan.grid, ProtectedGrid) and plan.grid.undecided:
        check_protectable(loaded.model)
    if isinstance(plan.grid, BudgetedGrid) and plan.method.solver is not None:
        check_offloaded(loaded.model, plan.grid)
        beside = bytes_beside(loaded, plan.grid)
        sizes_and_budget(loaded.model, plan.method, plan.grid, beside)
    windows = tuple(readable(w, loaded, "eval.perplexity") for w in plan.evaluation.token_sets(loaded.tokenizer))
    for window in windows:
        checked_windows(loaded.model, window)
    tasks = plan.evaluation.load_tasks(plan.seed)
    prompts = plan.evaluation.prompts()
    squares = given_squares(plan, loaded)
    calibrates = (needs_calibration(plan.method, plan.grid) and squares is None) or needs_inputs(plan)
    tokens = None
    if calibrates:
        corpus, loaded = fitted_corpus(plan.data, loaded)
        tokens = readable(corpus.tokens(loaded.tokenizer, seed=plan.seed), loaded, "data")
    check_method(plan, loaded, tokens)
    grids = assign_grids(loaded.model, plan.grid, plan.method.head) if plan.method.solver is not None else {}
    natural = getattr(plan.method.solver, "natural_groups", True)
    if plan.exports.formats and (plan.act.label or plan.kv.label):
        log.warning(
            "checkpoints hold weights only: act=%s, kv=%s are for the engine to do, and compressed_tensors tells it so "
            "with export.compressed_tensors.activations, static and kv_cache",
            plan.act.label,
            plan.kv.label,
        )
    plan.exports.check(linear_specs(loaded.model, grids, natural), loaded.model, loaded.tokenizer)
    _check_memory(loaded, tokens, plan)
    content = _content(plan, loaded, windows, tasks, tokens)
    if prompts:
        content["prompts"] = [prompt.encode(loaded.tokenizer).tolist() for prompt in prompts]
    run_ = Run(run_sha256(plan.config, content, code), plan.out)
    return RunContext(loaded, windows, tasks, prompts, tokens, grids, package, run_, baseline_bytes, squares, beside)


def _prepare(model: Any) -> None:
    """Make a loaded model compute what it is to compute, and its process keep memory, where that is not scarce."""
    compute_eagerly(model)
    keep_weights(model)
    if not offloaded(model):
        memory.keep_freed()


def check_method(plan: Plan, loaded: LoadedModel, tokens: TokenSet | None) -> None:
    """Raise UserError where the method can't do with this model or these tokens what it does before quantizing."""
    if plan.method.self_calibration is not None and tokens is not None:
        plan.method.self_calibration.check(loaded.model, tokens)
    if plan.method.output_curvature is not None:
        plan.method.output_curvature.check(loaded.model)


def bytes_beside(loaded: LoadedModel, grid: BudgetedGrid) -> int:
    """Bytes of a GGUF file besides the allocated weights, where the grid's budget counts the whole file; else 0."""
    if not grid.counts_file:
        return 0
    names = [place.name for place in allocated_places(loaded.model, grid)]
    return gguf_bytes_beside(loaded.model, loaded.tokenizer, names)


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
        "imatrix": plan.data.imatrix and file_sha256(Path(plan.data.imatrix).expanduser()),
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

    def write() -> ChecksummedFile:
        return ChecksummedFile({"ids": own.write(context.loaded.model, given, plan.compute_dtype, track)})

    kept = plan.settings.ranks.from_first(
        lambda: once(_text_file(plan, context, given), "model's own calibration text", write)
    )
    return replace(context, tokens=own.added(given, kept.tensors["ids"]))


def known_text(plan: Plan, context: RunContext) -> bool:
    """Whether the text that the model is to write for these calibration windows is in the cache."""
    return context.tokens is not None and _text_file(plan, context, context.tokens).exists()


def _text_file(plan: Plan, context: RunContext, given: TokenSet) -> Path:
    loaded, own = context.loaded, plan.method.self_calibration
    key = written_sha256(loaded.model, loaded.sha256, given.sha256, own, plan.compute_dtype)
    return cache_dir() / "tokens" / f"{key}.safetensors"


def curvature_file(plan: Plan, context: RunContext) -> Path | None:
    """File that output curvature is kept in, shared with other runs; None for methods without."""
    settings, tokens = plan.method.output_curvature, context.tokens
    if settings is None or tokens is None:
        return None
    loaded, transforms = context.loaded, plan.method.model_transforms
    seen = tokens.first(settings.windows)
    key = curvature_sha256(loaded.model, loaded.sha256, seen.sha256, settings, plan.compute_dtype, transforms)
    return cache_dir() / "curvatures" / f"{key}.safetensors"


def known_curvature(plan: Plan, context: RunContext) -> bool:
    """Whether the output curvature for these calibration windows is in the cache."""
    path = curvature_file(plan, context)
    return path is not None and path.exists()


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
