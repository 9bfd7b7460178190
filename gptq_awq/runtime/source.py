"""Source code and versions of packages that numbers come from, as hashes; whether or not git is there."""

import hashlib
import platform
import re
import site
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gptq_awq.runtime.declarations import PACKAGE, source_of, targets_in

RUNS_ON = (
    *("torch", "triton", "numpy", "numba", "llvmlite", "transformers", "tokenizers", "safetensors", "accelerate"),
    *("flash_attn", "flash-linear-attention", "causal-conv1d", "mamba-ssm", "kernels"),
)
"""Packages that any forward may run on; models of transformers call those of the second line where they are there."""
PACKAGES = (
    *RUNS_ON,
    *("scipy", "greenlet", "datasets", "lm_eval", "gguf", "jinja2", "sentencepiece", "tiktoken", "protobuf"),
    *("bitsandbytes", "compressed-tensors", "mlx", "mlx-lm"),
)
"""Packages that numbers, codes or checkpoints of a run come from."""


@dataclass(frozen=True)
class Code:
    """Source files that something is computed by.

    Attributes:
        sources: module → its source.
        imports: top-level names of all that these import.
    """

    sources: Mapping[str, bytes]
    imports: frozenset[str]

    @classmethod
    def of(cls, modules: Iterable[str]) -> "Code":
        """Source of the modules, and of all that these import of this package or from files that lie beside them.

        Left out is what only reports, and what is installed: packages have versions.
        """
        wanted, sources, imports = list(modules), dict[str, bytes](), set[str]()
        while wanted:
            module = wanted.pop()
            if module in sources or (path := source_of(module)) is None or reports_only(module):
                continue
            sources[module] = path.read_bytes()
            names = _imported(sources[module], module if path.name == "__init__.py" else module.rpartition(".")[0])
            imports.update(name.partition(".")[0] for name in names)
            wanted += [name for name in names if _beside(name, module, path)]
        return cls(sources, frozenset(imports))

    def sha256(self) -> str:
        """Hash of the modules' names and sources."""
        digest = hashlib.sha256()
        for module, source in sorted(self.sources.items()):
            digest.update(module.encode() + b"\0" + source)
        return digest.hexdigest()

    def packages(self) -> dict[str, str | None]:
        """Versions of the packages that this code runs on."""
        imported = {name.lower() for name in self.imports}
        return package_versions(p for p in PACKAGES if p in RUNS_ON or p.replace("-", "_") in imported)


def code_sha256(config: Mapping[str, Any] | None = None) -> str:
    """Hash of the source that a run's numbers come from.

    These are all modules that `gptq_awq.experiment.run` imports, but for those that only report, and the modules that
    the config's `_target_`s name, the user's own included. So a new solver, or a better table, leaves finished runs of
    other methods what they are.
    """
    targets = (target.rpartition(".")[0] for target in targets_in(config or {}))
    return Code.of(["gptq_awq.experiment.run", *targets]).sha256()


def package_sha256() -> str:
    """Hash of all of this package's source files: the version of the code, whether or not git is there."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def reports_only(module: str) -> bool:
    """Whether a package that `module` lies in declares `REPORTS_ONLY`: nothing in it changes a number of a run."""
    package, *parts = module.split(".")
    return package == PACKAGE.name and any(_declares(tuple(parts[:depth])) for depth in range(1, len(parts) + 1))


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Versions of the packages that numbers depend on; None where one is not installed."""
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = _version(version, name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


@cache
def _version(read: Callable[[str], str], name: str) -> str:
    """Version of a package, asked once: a process goes on with what it has imported. Raises PackageNotFoundError."""
    return read(name)


def environment() -> dict[str, Any]:
    """Package versions and the machine."""
    import torch

    machine = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"packages": package_versions(), "machine": machine}


@cache
def _declares(parts: tuple[str, ...]) -> bool:
    path = PACKAGE.joinpath(*parts, "__init__.py")
    return path.is_file() and "\nREPORTS_ONLY = True\n" in path.read_text()


@lru_cache(maxsize=1024)
def _imported(source: bytes, package: str) -> list[str]:
    """Modules that a source file in `package` may import, also inside of functions: names, and names within modules."""
    text = re.sub(rb"#[^\n]*", b"", source).decode(errors="replace")
    found: list[str] = []
    for names in re.findall(r"^[ \t]*import[ \t]+([^\n;]+)", text, re.MULTILINE):
        found += [each.split()[0] for each in names.split(",") if each.split()]
    pattern = r"^[ \t]*from[ \t]+([.\w]+)[ \t]+import[ \t]*(\([^)]*\)|[^\n;]*)"
    for module, names in re.findall(pattern, text, re.MULTILINE):
        level = len(module) - len(module.lstrip("."))
        above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
        origin = ".".join([*above, *filter(None, [module.lstrip(".")])])
        found += [origin, *(f"{origin}.{each.split()[0]}" for each in names.strip("()").split(",") if each.split())]
    return found


def _beside(name: str, module: str, path: Path) -> bool:
    """Whether an imported name may be a module whose source is to be followed: of this package, or beside `module`."""
    own = module.partition(".")[0]
    if own == PACKAGE.name or name.partition(".")[0] == PACKAGE.name:  # its own name stands for the library's functions
        return name.startswith(f"{PACKAGE.name}.")
    package = path.name == "__init__.py"
    root = path.parents[module.count(".") + package]
    if name.partition(".")[0] != own and any(root.is_relative_to(folder) for folder in _installed()):
        return False
    there = root.joinpath(*name.split("."))
    return there.with_suffix(".py").is_file() or (there / "__init__.py").is_file()


@cache
def _installed() -> tuple[Path, ...]:
    """Folders of Python's own modules and of installed packages."""
    paths = {sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(Path(path) for path in paths)
