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


def code_sha256() -> str:
    """Hash of the package's own source files: the code version, whether or not git is there."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of the resolved config, without the output folder, which changes no number."""
    relevant = {key: value for key, value in config.items() if key not in ("out", "tracking")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()


def environment() -> dict[str, Any]:
    """Package versions and the machine."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    machine = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"packages": packages, "machine": machine}
