"""Repeat a stored run and report whether it gives the same codes and metrics.

    python -m gptq_awq.replay RUN_DIR [--scores] [--device cpu] [--trust]

Quantizes with the stored config and compares the hash of every layer's codes with the stored ledger, block by block. It
stops at the first layer that differs and names it, and lists changes of code, packages, machine and data. With
`--scores` the quantized model is evaluated too, and every metric compared. Nothing in RUN_DIR is changed. The exit
code is 0 for identical, 1 for different, 2 for a run that can't be replayed.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from gptq_awq.errors import UserError
from gptq_awq.evaluation.evaluate import full_precision, score
from gptq_awq.experiment.context import RunContext, load, self_calibrated
from gptq_awq.experiment.input_squares import input_statistics_of, largest_inputs
from gptq_awq.experiment.plan import Plan, preflight
from gptq_awq.experiment.renamed import current_targets
from gptq_awq.experiment.summary import LEDGER
from gptq_awq.models.activations import quantized_activations
from gptq_awq.quantization.quantize import quantize
from gptq_awq.quantization.targets import changes_output
from gptq_awq.results import FILE_NAME, Result
from gptq_awq.runtime.commands import described_parser, exit_code
from gptq_awq.runtime.configs import CONFIGS
from gptq_awq.runtime.declarations import targets_in
from gptq_awq.runtime.progress import Track, rich_track
from gptq_awq.runtime.source import environment
from gptq_awq.storage.bounded import CONFIG_BYTES, LEDGER_BYTES, read_bytes, read_yaml

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Difference:
    """The first layer or metric whose replayed value differs from the stored one.

    Attributes:
        what: name of the layer ("model.layers.3.self_attn.q_proj") or of the metric.
        stored: stored value; of a layer, the start of the hash of its codes.
        now: replayed value.
    """

    what: str
    stored: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what}: stored {self.stored}, now {self.now}"


@dataclass(frozen=True)
class Replay:
    """The outcome of a replay.

    Attributes:
        layers: number of layers in the stored ledger.
        difference: the first layer or metric that differs; None where all are identical.
        circumstances: changes of code, packages, machine and data since the run was stored, one sentence each.
    """

    layers: int
    difference: Difference | None
    circumstances: tuple[str, ...]


def replay(run_dir: Path, track: Track, scores: bool = False, device: str | None = None, trust: bool = False) -> Replay:
    """Quantize again with the config stored in `run_dir`, and compare codes (and metrics) with the stored ones.

    Args:
        run_dir: folder of a finished run.
        track: progress reporter.
        scores: whether to evaluate the quantized model and compare its metrics.
        device: device to run on; None: the stored run's.
        trust: whether the folder may name code of others: classes outside of this package's configs, remote code of
            a model's folder.

    Raises:
        UserError: no finished run in the folder; a config that names code of others without `trust`; a model or data
            that can no longer be loaded.
    """
    stored, config = stored_run(run_dir, trust)
    ledger = _ledger(run_dir)
    with tempfile.TemporaryDirectory() as scratch, _naming(run_dir):
        config.out, config.resume = scratch, False
        config.device = device or config.device
        plan = replace(preflight(config), config=stored.config)
    context = self_calibrated(plan, load(plan), track)
    circumstances = tuple(_circumstances(stored.manifest, context))
    baseline = None
    if scores:
        keep = plan.method.cast is not None or changes_output(context.loaded.model, context.grids)
        baseline = full_precision(
            context.loaded.model,
            context.loaded.tokenizer,
            context.loaded.sha256,
            context.windows,
            tasks=context.tasks,
            cache_dir=None,
            track=track,
            keep_output=keep,
            compute_dtype=plan.evaluation.compute_dtype,
        )
    inputs = input_statistics_of(plan, context.loaded, context.tokens, track)
    largest = largest_inputs(plan, inputs)
    difference = _first_other_layer(plan, context, ledger, track)
    if difference is None and baseline is not None:
        with quantized_activations(context.loaded.model, plan.act, plan.kv, largest):
            metrics = score(context.loaded.model, context.loaded.tokenizer, baseline, plan.seed, track).metrics
        difference = _first_other_metric(stored.metrics, metrics)
    return Replay(len(ledger), difference, circumstances)


def stored_run(run_dir: Path, trust: bool) -> tuple[Result, DictConfig]:
    """Read row and config of a finished run, with today's names of classes. Raises UserError where there is none."""
    try:
        stored = Result.read(run_dir / FILE_NAME)
        content = current_targets(read_yaml(run_dir / CONFIG, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{run_dir}: holds no finished run ({' '.join(str(error).split())})") from error
    if stored.status != "done":
        raise UserError(f"{run_dir}: holds no finished run, its status is {stored.status}")
    if not isinstance(content, dict):
        raise UserError(f"{run_dir}/{CONFIG}: is no config of a run, it is no map")
    if missing := [name for name in ("model", "method", "grid", "data", "eval", "seed") if name not in content]:
        raise UserError(f"{run_dir}/{CONFIG}: is no config of a run, it has no {missing[0]}")
    if not trust and (strange := named_code(content)) is not None:
        raise UserError(f"{run_dir}: its config {strange}; if you trust the folder, add --trust")
    with _naming(run_dir):
        return stored, OmegaConf.create(content)


@contextmanager
def _naming(run_dir: Path) -> Iterator[None]:
    """Context manager that turns any exception on a config that is no run's into a UserError naming its file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{run_dir}/{CONFIG}: is no config of a run ({type(error).__name__}: {what})") from error


def named_code(config: Mapping[str, Any]) -> str | None:
    """Say what a config names that would run code of others, or read this process's environment; None for nothing.

    Only classes that this package's own configs name are its own. Tasks of lm-eval are code where they aren't in its
    list of names: their yaml has Python functions and templates.
    """
    files = CONFIGS.rglob("*.yaml")
    own = {t for path in files for t in targets_in(yaml.safe_load(path.read_text())) if t.startswith("gptq_awq.")}
    for key, value in _items(config):
        if key == "_target_" and (not isinstance(value, str) or value not in own):
            return f"names {value!r:.100}, which is not a class of gptq_awq's configs"
        if key == "trust_remote_code" and value not in (None, False):
            return "says trust_remote_code=true, which runs code of the model's folder"
        if key == "include_path" and value is not None:
            return "names eval.include_path, a folder of tasks, which may run code"
        if key == "tasks" and not _are_names(value):
            return "has an lm-eval task of its own, which may run code"
        if isinstance(value, str) and "${" in value:
            return f"has the unresolved value {value!r:.100}"
    return None


def _are_names(tasks: Any) -> bool:
    """Whether tasks are names of lm-eval's list: neither files nor configs."""
    names = tasks if isinstance(tasks, list) else [] if tasks is None else [tasks]
    return all(isinstance(name, str) and re.fullmatch(r"[\w.+-]+", name) and not Path(name).exists() for name in names)


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every key and value of nested maps and lists; the key of a list's item is None."""
    pairs = node.items() if isinstance(node, Mapping) else ((None, item) for item in node)
    for key, value in pairs:
        yield key, value
        if isinstance(value, (Mapping, list)):
            yield from _items(value)


def _ledger(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of a stored ledger. Raises UserError where a row has no name or no hash of its codes."""
    try:
        rows = [json.loads(line) for line in read_bytes(run_dir / LEDGER, LEDGER_BYTES).splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{run_dir}/{LEDGER}: cannot be read ({' '.join(str(error).split())})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise UserError(f"{run_dir}/{LEDGER}: line {number} names no layer")
        if not isinstance(row.get("codes_sha256"), str):
            raise UserError(
                f"{run_dir}: its ledger holds no hashes of codes (line {number}), it was written by an older version"
            )
    return rows


def _first_other_layer(
    plan: Plan, context: RunContext, ledger: Sequence[Mapping[str, Any]], track: Track
) -> Difference | None:
    """Quantize the model in place, block by block, up to the first layer whose codes differ from the ledger."""
    steps = quantize(context.loaded.model, context.tokens, plan.method, plan.grid, plan.settings, track)
    expected = iter(ledger)
    with closing(steps):
        for block in steps:
            for row in block.rows:
                stored = next(expected, None)
                if stored is None or stored["name"] != row["name"]:
                    return Difference(row["name"], stored and stored["name"], "a layer of another name")
                if stored["codes_sha256"] != row["codes_sha256"]:
                    return Difference(row["name"], stored["codes_sha256"][:12], row["codes_sha256"][:12])
    rest = next(expected, None)
    return None if rest is None else Difference(rest["name"], rest["codes_sha256"][:12], "not quantized")


def _first_other_metric(stored: Mapping[str, Any], now: Mapping[str, Any]) -> Difference | None:
    for name in [*stored, *(name for name in now if name not in stored)]:
        if stored.get(name) != now.get(name):
            return Difference(name, stored.get(name), now.get(name))
    return None


def _circumstances(manifest: Mapping[str, Any], context: RunContext) -> Iterator[str]:
    """Yield what differs from the stored manifest: code, model, calibration tokens, packages, machine."""
    now = {
        "code": context.code,
        "model": context.loaded.sha256,
        "calibration tokens": context.tokens and context.tokens.sha256,
    }
    then = {
        "code": manifest.get("code"),
        "model": (manifest.get("model") or {}).get("sha256"),
        "calibration tokens": (manifest.get("tokens") or {}).get("calibration"),
    }
    for kind, values in environment().items():
        now |= {f"{kind} {name}": value for name, value in values.items()}
        then |= {f"{kind} {name}": value for name, value in _map(manifest.get(kind)).items()}
    for name in then:
        if then[name] != now.get(name):
            yield f"{name}: then {_short(then[name])}, now {_short(now.get(name))}"


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 for identical, 1 for different, 2 for a run that can't be replayed."""
    parser = described_parser("python -m gptq_awq.replay", __doc__)
    parser.add_argument("run_dir", type=Path, help="the folder of a finished run")
    parser.add_argument("--scores", action="store_true", help="score the model too, and compare every metric")
    parser.add_argument("--device", help="another device than the stored run's")
    parser.add_argument("--trust", action="store_true", help="allow code of others that its config names")
    options = parser.parse_args(argv)
    return exit_code(lambda: _replayed(options))


def _replayed(options: argparse.Namespace) -> int:
    with rich_track(Console(stderr=True)) as track:
        done = replay(options.run_dir, track, options.scores, options.device, options.trust)
    for line in done.circumstances:
        sys.stdout.write(f"not as it was: {line}\n")
    if done.difference is None:
        sys.stdout.write(f"identical: {done.layers} layers{' and all metrics' if options.scores else ''}\n")
        return 0
    sys.stdout.write(f"different: {done.difference}\n")
    return 1
