"""Repeat a stored run and report whether it gives the same codes and metrics.

    python -m gptq_awq.replay RUN_DIR [--scores] [--device cpu] [--trust]

Quantizes with the stored config and compares the hash of every layer's codes with the stored ledger, block by block. It
stops at the first layer that differs and names it, and lists changes of code, packages, machine and data. With
`--scores` the quantized model is evaluated too, and every metric compared. Nothing in RUN_DIR is changed. The exit
code is 0 for identical, 1 for different, 2 for a run that can't be replayed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from gptq_awq.errors import UserError
from gptq_awq.evaluation.evaluate import full_precision, score
from gptq_awq.experiment.context import RunContext, load, self_calibrated
from gptq_awq.experiment.fingerprint import environment
from gptq_awq.experiment.plan import Plan, preflight
from gptq_awq.experiment.renamed import current_targets
from gptq_awq.experiment.summary import LEDGER
from gptq_awq.models.activations import quantized_activations
from gptq_awq.quantization.quantize import quantize
from gptq_awq.quantization.targets import changes_output
from gptq_awq.results import FILE_NAME, Result
from gptq_awq.runtime.configs import CONFIGS
from gptq_awq.runtime.declarations import targets_in
from gptq_awq.runtime.progress import Track, rich_track


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
    stored, config = _stored(run_dir)
    if not trust:
        _check_own(run_dir, config)
    ledger = [json.loads(line) for line in (run_dir / LEDGER).read_text().splitlines()]
    if any("codes_sha256" not in row for row in ledger):
        raise UserError(f"{run_dir}: its ledger holds no hashes of codes, it was written by an older version")
    with tempfile.TemporaryDirectory() as scratch:
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
    difference = _first_other_layer(plan, context, ledger, track)
    if difference is None and baseline is not None:
        with quantized_activations(context.loaded.model, plan.act, plan.kv):
            metrics = score(context.loaded.model, context.loaded.tokenizer, baseline, plan.seed, track).metrics
        difference = _first_other_metric(stored.metrics, metrics)
    return Replay(len(ledger), difference, circumstances)


def _stored(run_dir: Path) -> tuple[Result, DictConfig]:
    """The row and config of a finished run, with today's names of classes. Raises UserError where there is none."""
    try:
        stored = Result.read(run_dir / FILE_NAME)
        config = OmegaConf.create(current_targets(yaml.safe_load((run_dir / "config.yaml").read_text())))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{run_dir}: holds no finished run ({' '.join(str(error).split())})") from error
    if stored.status != "done" or not isinstance(config, DictConfig):
        raise UserError(f"{run_dir}: holds no finished run, its status is {stored.status}")
    if missing := [name for name in ("model", "method", "grid", "data", "eval", "seed") if name not in config]:
        raise UserError(f"{run_dir}/config.yaml: is no config of a run, it has no {missing[0]}")
    return stored, config


def _check_own(run_dir: Path, config: DictConfig) -> None:
    """Refuse a config that would run code which this package's own configs don't name.

    Raises:
        UserError: naming the class, or the option.
    """
    container = OmegaConf.to_container(config)
    own = {target for path in CONFIGS.rglob("*.yaml") for target in targets_in(yaml.safe_load(path.read_text()))}
    for target in targets_in(container):
        if target not in own:
            raise UserError(
                f"{run_dir}: its config names {target}, which is not a class of gptq_awq's configs; if you "
                "trust the folder, add --trust"
            )
    if OmegaConf.select(config, "model.trust_remote_code"):
        raise UserError(f"{run_dir}: its config says model.trust_remote_code=true; if you trust the model, add --trust")


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
        "model": manifest.get("model", {}).get("sha256"),
        "calibration tokens": manifest.get("tokens", {}).get("calibration"),
    }
    for kind, values in environment().items():
        now |= {f"{kind} {name}": value for name, value in values.items()}
        then |= {f"{kind} {name}": value for name, value in manifest.get(kind, {}).items()}
    for name in then:
        if then[name] != now.get(name):
            yield f"{name}: then {_short(then[name])}, now {_short(now.get(name))}"


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 for identical, 1 for different, 2 for a run that can't be replayed."""
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m gptq_awq.replay", description=description, epilog=rest)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run_dir", type=Path, help="the folder of a finished run")
    parser.add_argument("--scores", action="store_true", help="score the model too, and compare every metric")
    parser.add_argument("--device", help="another device than the stored run's")
    parser.add_argument("--trust", action="store_true", help="allow code of others that its config names")
    options = parser.parse_args(argv)
    try:
        with rich_track(Console(stderr=True)) as track:
            done = replay(options.run_dir, track, options.scores, options.device, options.trust)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for line in done.circumstances:
        sys.stdout.write(f"not as it was: {line}\n")
    if done.difference is None:
        sys.stdout.write(f"identical: {done.layers} layers{' and all metrics' if options.scores else ''}\n")
        return 0
    sys.stdout.write(f"different: {done.difference}\n")
    return 1
