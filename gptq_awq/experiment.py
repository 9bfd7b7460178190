"""One run: preflight → load → baseline → quantize → export → evaluate → results row.

Whatever can be known to be wrong is found before anything slow starts: options when they are instantiated, data
and model when they are loaded, memory by a forecast. A mistake is a `UserError`, and leaves no results behind.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from gptq_awq import memory
from gptq_awq.assets import cache_dir
from gptq_awq.data import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.evaluation.evaluate import Baseline, full_precision, score
from gptq_awq.evaluation.protocol import Evaluation
from gptq_awq.export.base import Source, linear_specs
from gptq_awq.export.verify import Probe
from gptq_awq.export.write import Exported, Exports, write_card
from gptq_awq.grids.base import GridChoice, QuantizedWeight
from gptq_awq.manifest import code_sha256, config_sha256, environment
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.models.load import LoadedModel, checked_device
from gptq_awq.pipeline.method import Method
from gptq_awq.pipeline.places import changes_output, landing
from gptq_awq.pipeline.quantize import Settings, needs_calibration, quantize, resolve_compute_dtype
from gptq_awq.pipeline.size import PLAIN_BITS, Footprint
from gptq_awq.progress import Track, rich_track
from gptq_awq.report import final_table
from gptq_awq.results import Ledger, Result
from gptq_awq.tracking import Tracker, Tracking

log = logging.getLogger(__name__)
LEDGER = "ledger.jsonl"
UNFINISHED = "ledger.partial.jsonl"
PROBE_WINDOWS, PROBE_SEQLEN = 2, 256


@dataclass(frozen=True)
class Plan:
    """Everything that a run was asked for, checked as far as it can be without loading anything."""

    config: Mapping[str, Any]
    method: Method
    grid: GridChoice
    settings: Settings
    model: Any
    data: Any
    evaluation: Evaluation
    tracking: Tracking
    exports: Exports
    device: torch.device
    dtype: str
    seed: int
    out: Path


@dataclass
class Clock:
    """Wall seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def total(self) -> dict[str, float]:
        """All phases, and the whole run."""
        return self.seconds | {"total": round(time.perf_counter() - self._started, 3)}


def run(cfg: DictConfig) -> Result:
    """Run one experiment and store its row in `cfg.out`.

    Raises:
        UserError: something the user can fix; one line, naming the option.
    """
    console = Console(stderr=True)
    plan = preflight(cfg)
    _remove_unused_hydra_folder(plan.out)
    with _logging_to(plan.out, console), rich_track(console) as track:
        try:
            result = execute(plan, track)
        except UserError as error:
            # Nothing half-written, and what an earlier run left in this folder stays: only the log is new.
            (plan.out / UNFINISHED).unlink(missing_ok=True)
            log.debug("stopped: %s", error)
            raise
    Console().print(final_table(result))
    console.print(f"results: {plan.out / 'results.json'}", highlight=False, soft_wrap=True)
    return result


def preflight(cfg: DictConfig) -> Plan:
    """Turn the config into objects, which refuse what they cannot do."""
    torch.manual_seed(cfg.seed)
    device = resolve_device(cfg.device)
    try:
        plan = Plan(
            config=OmegaConf.to_container(cfg, resolve=True),  # pyright: ignore[reportArgumentType]
            method=_build(cfg.method),
            grid=_build(cfg.grid),
            settings=Settings(cfg.compute_dtype, _positive(cfg, "tokens_per_batch")),
            model=_build(cfg.model),
            data=_build(cfg.data),
            evaluation=_build(cfg.eval),
            tracking=_build(cfg.tracking),
            exports=_build(cfg.export),
            device=device,
            dtype=cfg.dtype,
            seed=cfg.seed,
            out=Path(cfg.out),
        )
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    _check_meant(plan)
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={plan.out}: cannot be written ({error.strerror})") from error
    return plan


def execute(plan: Plan, track: Track) -> Result:
    """Everything slow."""
    clock, code = Clock(), code_sha256()  # now: the files may change while the run goes on
    memory.reset_peak(plan.device)
    tracker = plan.tracking.start(plan.config, _run_name(plan))
    ledger = Ledger.create(plan.out / UNFINISHED)
    with clock.phase("load"):
        loaded = plan.model.load(dtype=plan.dtype, device=str(plan.device))
        windows = plan.evaluation.token_sets(loaded.tokenizer)
        tasks = plan.evaluation.load_tasks(plan.seed)
        calibrates = needs_calibration(plan.method, plan.grid)
        tokens = plan.data.tokens(loaded.tokenizer, seed=plan.seed) if calibrates else None
        grids = landing(loaded.model, plan.grid) if plan.method.solver is not None else {}
        natural = getattr(plan.method.solver, "natural_groups", True)
        plan.exports.check(linear_specs(loaded.model, grids, natural), loaded.model, loaded.tokenizer)
        _forecast(loaded, tokens, plan)
    with clock.phase("baseline"):
        baseline = full_precision(
            *(loaded.model, loaded.tokenizer, loaded.sha256, windows, tasks, cache_dir(), track),
            keep_output=plan.method.cast is not None or changes_output(loaded.model, grids),
        )
    with clock.phase("quantize"):
        footprint, weights = _quantize(plan, loaded, tokens, ledger, tracker, track)
    checkpoints: list[Exported] = []
    if plan.exports.formats:
        with clock.phase("export"):
            checkpoints = _export(plan, loaded, weights, windows, tokens, code, track)
            weights.clear()
    with clock.phase("evaluate"):
        metrics = score(loaded.model, loaded.tokenizer, baseline, plan.seed, track).metrics
    manifest = _manifest(plan, loaded, tokens, baseline, code, checkpoints)
    result = _result(plan, loaded, footprint, metrics, clock, manifest)
    ledger.path.replace(plan.out / LEDGER)
    (plan.out / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(dict(plan.config))))
    path = result.write(plan.out)
    for checkpoint in checkpoints:
        write_card(checkpoint.path, json.loads(path.read_text()), [checkpoint.verified])
    tracker.finish(result)
    return result


def _quantize(
    plan: Plan, loaded: LoadedModel, tokens: TokenSet | None, ledger: Ledger, tracker: Tracker, track: Track
) -> tuple[Footprint, dict[str, QuantizedWeight]]:
    """Quantize the model in place, block by block; each block's rows are on disk before the next begins.

    Codes are kept only where a checkpoint will want them.
    """
    footprint, weights = Footprint(), {}
    for block in quantize(loaded.model, tokens, plan.method, plan.grid, plan.settings, track):
        footprint.add(block.weights)
        if plan.exports.formats:
            weights.update(block.weights)
        ledger.append(block.rows)
        tracker.ledger(block.rows)
        errors = [row["error_after"] for row in block.rows if "error_after" in row]
        if errors:
            tracker.log({"quantize/relative_error": sum(errors) / len(errors)}, step=block.index)
    return footprint, weights


def _export(
    plan: Plan,
    loaded: LoadedModel,
    weights: Mapping[str, QuantizedWeight],
    windows: Sequence[TokenSet],
    tokens: TokenSet | None,
    code: str,
    track: Track,
) -> list[Exported]:
    """Write and verify the checkpoints that were asked for."""
    known = next((t for t in (*windows, tokens) if t is not None), None)
    ids = torch.arange(64)[None] if known is None else known.ids[:PROBE_WINDOWS, :PROBE_SEQLEN]
    probe = Probe.of(loaded.model, ids, "token ids 0 to 63" if known is None else known.source)
    facts = {
        "model": {"source": loaded.source, "sha256": loaded.sha256},
        "method": plan.method.name,
        "grid": str(plan.grid),
        "calibration": None if tokens is None else {"source": tokens.source, "sha256": tokens.sha256},
        "code": code,
    }
    source = Source(loaded.model, loaded.tokenizer, loaded.name, weights)
    return plan.exports.write(source, plan.out, probe, facts, track)


def _check_meant(plan: Plan) -> None:
    """Refuse bits=… and the like beside a grid that has its own: the user would get something else.

    Raises:
        UserError: naming both options.
    """
    if not HydraConfig.initialized() or plan.method.solver is None:
        return
    for override in HydraConfig.get().overrides.task:
        key, _, value = override.partition("=")
        if key not in ("bits", "group_size", "sym"):
            continue
        own = getattr(plan.grid, key, None)
        if own != plan.config[key]:
            raise UserError(f"{key}={value}: grid={plan.grid.label} has its own ({key}={own}); leave {key} out")


def _forecast(loaded: LoadedModel, tokens: TokenSet | None, plan: Plan) -> None:
    """Refuse, before calibration starts, what will not fit."""
    if tokens is None:
        return
    _, blocks = find_blocks(loaded.model)
    widest = max(matrix(m).shape[1] for m in blocks.modules() if is_linear(m))
    hidden = loaded.model.config.get_text_config().hidden_size
    needed = memory.forecast_bytes(blocks, widest, hidden, tokens.ids.numel(), plan.settings.tokens_per_batch)
    log.info("calibration needs about %.2f GB beyond the model", needed / 1e9)
    memory.require(needed, plan.device, f"calibrating {loaded.name} (widest layer: {widest} columns)")


def _result(
    plan: Plan,
    loaded: LoadedModel,
    footprint: Footprint,
    metrics: Mapping[str, Any],
    clock: Clock,
    manifest: Mapping[str, Any],
) -> Result:
    full = plan.method.solver is None
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
        baseline_size_bytes=Footprint().model_bytes(loaded.model),
        seconds=clock.total(),
        peak_memory_bytes=memory.peak_bytes(plan.device),
        ledger=LEDGER,
        manifest=manifest,
        config=plan.config,
        grid=None if full else plan.grid.label,
    )


def _manifest(
    plan: Plan,
    loaded: LoadedModel,
    tokens: TokenSet | None,
    baseline: Baseline,
    code: str,
    checkpoints: Sequence[Exported],
) -> dict[str, Any]:
    return {
        "model": {"source": loaded.source, "sha256": loaded.sha256, "dtype": plan.dtype},
        "tokens": {
            "calibration": None if tokens is None else tokens.sha256,
            "eval": baseline.sha256,
        },
        "sources": {
            "calibration": None if tokens is None else tokens.source,
            "eval": _evaluation_sources(baseline),
        },
        "checkpoints": {
            c.format: {"path": str(c.path.relative_to(plan.out)), "size_bytes": c.size_bytes, "seconds": c.seconds}
            for c in checkpoints
        },
        "config": config_sha256(plan.config),
        "code": code,
        "compute_dtype": str(resolve_compute_dtype(plan.settings.compute_dtype, plan.device)),
        "seed": plan.seed,
    } | environment()


def _evaluation_sources(baseline: Baseline) -> dict[str, str]:
    tasks = baseline.tasks.sources if baseline.tasks else {}
    return {t.name: t.source for t in baseline.tokens} | {f"lm_eval/{name}": s for name, s in tasks.items()}


def resolve_device(name: str) -> torch.device:
    """The device, "auto" being a GPU where there is one. Raises UserError for one that isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return checked_device(name)


def _build(node: Any) -> Any:
    """Instantiate a config node; a UserError raised inside comes out as itself."""
    try:
        return instantiate(node, _convert_="all")
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise UserError(str(error).splitlines()[0]) from error


def _positive(cfg: DictConfig, key: str) -> int:
    value = cfg[key]
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{key}={value}: give a whole number, at least 1")
    return value


def _run_name(plan: Plan) -> str:
    model = getattr(plan.model, "name", None) or "model"
    if plan.method.solver is None:
        return f"{model} {plan.method.name}"
    label = "" if plan.grid.label == "int" else f"{plan.grid.label} "
    return f"{model} {plan.method.name} {label}{plan.grid.bits:g}bit g{plan.grid.group_size}"


@contextmanager
def _logging_to(out: Path, console: Console) -> Iterator[None]:
    """This package's log: warnings to the terminal, everything to OUT/run.log."""
    from rich.logging import RichHandler

    root = logging.getLogger("gptq_awq")
    to_file = logging.FileHandler(out / "run.log", mode="w")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_terminal = RichHandler(logging.WARNING, console=console, show_path=False, show_time=False)
    root.setLevel(logging.DEBUG)
    for handler in (to_file, to_terminal):
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (to_file, to_terminal):
            root.removeHandler(handler)
            handler.close()


def _remove_unused_hydra_folder(out: Path) -> None:
    """With out=… elsewhere, the folder that Hydra made for this run would stay behind empty."""
    if not HydraConfig.initialized():
        return
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder.resolve() != out.resolve():
        with suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()
            folder.parent.parent.rmdir()
