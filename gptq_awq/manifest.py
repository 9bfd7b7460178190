"""What a number depends on: hashes of data, weights and code, versions of packages, the machine."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "datasets", "lm_eval", "numba", "numpy", "tokenizers", "safetensors")
NOT_COMPUTED = ("out", "tracking", "resume", "cache_gb", "objective")
"""Options that change no number."""


def code_sha256() -> str:
    """Hash of the package's own source files: the code version, whether or not git is there."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of the resolved config, without what changes no number."""
    relevant = {key: value for key, value in config.items() if key not in NOT_COMPUTED}
    return _json_sha256(relevant)


def run_sha256(config: Mapping[str, Any], data: Mapping[str, Any], code: str) -> str:
    """What a run computes, as one hash: its config, the content of its data, the code and the packages it runs on.

    Two runs of one hash give the same numbers, whatever their folders are called.
    """
    return _json_sha256({"config": config_sha256(config), "data": data, "code": code, "packages": package_versions()})


def package_versions() -> dict[str, str | None]:
    """Of the packages that numbers depend on."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def environment() -> dict[str, Any]:
    """Package versions and the machine."""
    machine = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"packages": package_versions(), "machine": machine}


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
