"""Settings of runs: those that distinguish the rows of a table, and means over runs that differ in one of them."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from gptq_awq.report.rows import Row

IDENTITY = ("method", "grid", "bits", "group_size", "sym", "act", "kv")
SHOWN = {"method.name", "model", "model.name", "grid", "method", *IDENTITY, *(f"grid.{key}" for key in IDENTITY)}
LABELLED = ("act", "kv")  # their labels in IDENTITY tell all of their options
# Settings that change no number, or that are part of a metric's name.
ASIDE = ("out", "tracking", "export", "eval", "hydra", "resume", "profile", "activations")
LATE = ("model", "device", "compute_dtype", "tokens_per_batch", "seed")


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested config to keys such as `data.samples`; a list is one value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = tuple(map(str, value)) if isinstance(value, (list, tuple)) else value
    return found


def varied(runs: Sequence[Row]) -> dict[str, list[str]]:
    """Settings needed to distinguish the rows of one table: short name → a value per run.

    A setting that follows from the others (GPTQ's damping, where only GPTQ has one; a file's name, where its kind
    implies it) is left out, so that tables stay narrow.
    """
    configs = [_relevant(run["config"]) for run in runs]
    alike: list[Any] = [tuple(run[key] for key in IDENTITY) for run in runs]
    kept: list[str] = []
    for key in sorted({key for config in configs for key in config}, key=_order):
        finer = [(before, config.get(key)) for before, config in zip(alike, configs, strict=True)]
        if len(set(finer)) > len(set(alike)):
            alike = list(map(hash, finer))
            kept.append(key)
    names = _short_names(kept)
    return {names[key]: [_text(config, key) for config in configs] for key in kept}


def averaged(runs: Sequence[Row], over: str) -> list[Row]:
    """Average runs that differ in the setting `over` ("seed") only, into one row each.

    Metrics, sizes and times are means over the runs; `spread` maps metrics to their standard deviation, and `count`
    is the number of runs. Of runs with the same value of `over` only the first counts. Confidence intervals, which
    belong to single runs, are left out.
    """
    groups: dict[Any, dict[Any, Row]] = {}
    for run in runs:
        settings = {k: str(v) for k, v in _numeric(flat(run["config"])).items()}
        averaged_over = {k: v for k, v in settings.items() if is_setting(k, over)}
        rest = tuple(sorted(settings.items() - averaged_over.items()))
        group = groups.setdefault((run["model"], *(run[key] for key in IDENTITY), rest), {})
        group.setdefault(tuple(sorted(averaged_over.items())), run)
    return [_mean(list(group.values()), over) for group in groups.values()]


def is_setting(key: str, name: str) -> bool:
    """Whether the flat config's `key` (`data.samples`) is the setting `name`, given in full or by its last part."""
    return key == name or key.endswith(f".{name}")


def _mean(group: Sequence[Row], over: str) -> Row:
    metrics, spread = _means([run["metrics"] for run in group])
    seconds, _ = _means([run["seconds"] for run in group])
    sizes = ("bits_per_weight", "size_bytes", "baseline_size_bytes", "peak_memory_bytes")
    first = group[0]
    config = {k: v for k, v in flat(first["config"]).items() if not is_setting(k, over)}
    scalars = {key: _average([run[key] for run in group]) for key in sizes}
    more = {"metrics": metrics, "seconds": seconds, "config": config, "spread": spread, "count": len(group)}
    return dict(first) | scalars | more


def _means(maps: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means and standard deviations of the numbers that all of `maps` contain."""
    shared = [key for key in maps[0] if all(isinstance(each.get(key), (int, float)) for each in maps)]
    means = {key: fmean(each[key] for each in maps) for key in shared}
    return means, {key: stdev(each[key] for each in maps) for key in shared if len(maps) > 1}


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that may become a column; `data` is the calibration text's file, repository or class."""
    settings = flat(config)
    named = (settings.get(f"data.{key}") for key in ("path", "name", "_target_"))
    if text := next(filter(None, named), None):
        settings["data"] = str(text).rpartition("/")[2].removeprefix("gptq_awq.data.").removeprefix("corpora.")
    return {k: v for k, v in _numeric(settings).items() if k not in SHOWN and k.partition(".")[0] not in LABELLED}


def _numeric(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that change a number; older rows lack `eval.compute_dtype`, which was float32 then."""
    scored_in = {"eval.compute_dtype": settings.get("eval.compute_dtype", "float32")}
    return {k: v for k, v in settings.items() if k.partition(".")[0] not in ASIDE} | scored_in


def _order(key: str) -> tuple[bool, bool, int, str]:
    """Sort key of columns: the data and classes before their options, and settings that rarely vary last."""
    return key.partition(".")[0] in LATE, key != "data" and not key.endswith("_target_"), key.count("."), key


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten each key to its last part, unless two would share it; `_target_` becomes its group's name."""
    short = {key: key.removesuffix("._target_").rpartition(".")[2] for key in keys}
    return {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}


def _text(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key, "")
    if isinstance(value, tuple):
        return " ".join(value)
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).rpartition("/")[2].replace("\n", "\\n")  # a line break would end the row of a table
