"""What a number depends on: hashes of data, weights and code, versions of packages, the machine."""

import ast
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gptq_awq.runtime.declarations import PACKAGE, source_of, targets_in

PACKAGES = ("torch", "transformers", "datasets", "lm_eval", "numba", "numpy", "tokenizers", "safetensors")
NOT_COMPUTED = (
    *("out", "tracking", "resume", "profile", "objective", "ranks_timeout_minutes", "cache_gb"),
    *("activations", "memory_budget", "stream", "forecast"),
)
"""Options that change no number."""


def package_sha256() -> str:
    """Hash of all of this package's source files: the version of the code, whether or not git is there."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def code_sha256(config: Mapping[str, Any] | None = None) -> str:
    """Hash of the source that a run's numbers come from.

    That is all that `gptq_awq.experiment.run` imports, but for what only reports, and the modules that the config's
    `_target_`s name, the user's own included (their own imports are not followed). So a new solver, or a better
    table, leaves finished runs of other methods what they are.
    """
    wanted = ["gptq_awq.experiment.run", *(target.rpartition(".")[0] for target in targets_in(config or {}))]
    sources: dict[str, bytes] = {}
    while wanted:
        module = wanted.pop()
        path = source_of(module)
        if module in sources or path is None or reports_only(module):
            continue
        sources[module] = path.read_bytes()
        wanted += _imported(sources[module])
    digest = hashlib.sha256()
    for module, source in sorted(sources.items()):
        digest.update(module.encode() + b"\0" + source)
    return digest.hexdigest()


def reports_only(module: str) -> bool:
    """Whether a package that `module` lies in declares `REPORTS_ONLY`: nothing in it changes a number of a run."""
    parts = module.split(".")[1:]
    inits = (PACKAGE.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1))
    return any("\nREPORTS_ONLY = True\n" in path.read_text() for path in inits if path.is_file())


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


def _imported(source: bytes) -> Iterator[str]:
    """The modules of this package that a source file imports, also inside of functions."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
        yield from (name for name in names if name.partition(".")[0] == "gptq_awq")


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
