"""Provenance of a report: models, tokens, code, packages and machines, each with the number of runs it occurs in."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptq_awq.report.rows import Row

KINDS = ("model", "evaluated on", "calibrated on", "code", "packages", "machine")


def provenance(runs: Sequence[Row]) -> list[tuple[str, str, int]]:
    """Count runs by provenance: rows of (kind, value, number of runs), sorted by kind, then by first appearance."""
    found = Counter(fact for run in runs for fact in dict.fromkeys(_facts(run["manifest"])))
    return [(kind, which, found[kind, which]) for each in KINDS for kind, which in found if kind == each]


def _facts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model, tokens, sources = (manifest.get(key) or {} for key in ("model", "tokens", "sources"))
    if model:
        yield "model", _named(model.get("source"), model.get("sha256"), model.get("dtype"))
    for text, sha256 in (tokens.get("eval") or {}).items():
        yield "evaluated on", _named(text, sha256, (sources.get("eval") or {}).get(text))
    if tokens.get("calibration"):
        yield "calibrated on", _named(sources.get("calibration"), tokens["calibration"])
    if "code" in manifest:
        yield "code", str(manifest["code"])[:16]
    packages = manifest.get("packages") or {}
    if packages:
        yield "packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    machine = manifest.get("machine") or {}
    if machine:
        yield "machine", ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)


def _named(name: Any, sha256: Any, more: Any = None) -> str:
    """Join a name, the start of a hash and further details: `stories15M · 3f373bc1aff47096 · float32`."""
    return " · ".join(str(part) for part in (name, str(sha256 or "")[:16], more) if part)
