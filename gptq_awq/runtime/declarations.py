"""Declarations of options, read from a class's source file: names and annotations of its fields.

Nothing is imported, so that a command line can be checked before torch is; annotations are evaluated with the names
that options may use: Python's own types, `typing`'s, and those of `gptq_awq.runtime.options`.
"""

import ast
import builtins
import collections.abc
import pathlib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import annotated_types

PACKAGE = Path(__file__).resolve().parent.parent
_OPAQUE = {"object", "ABC", "Protocol", "Generic", "Callback"}
_OPTIONS = "gptq_awq.runtime.options"
_KNOWN = {"typing": typing, "collections.abc": collections.abc, "pathlib": pathlib, "annotated_types": annotated_types}


class Built:
    """Stands for the type of an option that isn't data: a node with a `_target_` builds its value."""


@dataclass(frozen=True)
class Declared:
    """Options that a `_target_` declares.

    Attributes:
        types: name → annotation; Any where it takes anything, Built where it names a type of other packages.
        more: what further names take (`**kwargs`): nothing, nodes that have a `_target_`, or anything.
    """

    types: Mapping[str, Any]
    more: Literal["nothing", "nodes", "anything"] = "nothing"


def targets_in(node: Any) -> Iterator[str]:
    """Every `_target_` in a resolved config, at any depth."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        yield from [target] if isinstance(target, str) else []
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from targets_in(item)


@cache
def declared_by(target: str) -> Declared | None:
    """Options of the class or function that a dotted name stands for; None where its source can't tell."""
    declared = _read(target)
    if declared is None or target.startswith(f"{PACKAGE.name}."):
        return declared
    return replace(declared, types={n: Any if t is Built else t for n, t in declared.types.items()})  # who knows


def _read(target: str) -> Declared | None:
    module, _, name = target.rpartition(".")
    source = source_of(module) if module else None
    if source is None:
        return None
    tree = _parsed(source)
    found = next((n for n in tree.body if getattr(n, "name", None) == name), None)
    if isinstance(found, ast.ClassDef):
        return _of_class(found, tree)
    return _of_function(found, tree) if isinstance(found, ast.FunctionDef) else None


def source_of(module: str) -> Path | None:
    """A module's source file; None where it has none, or there is no such module. Nothing of it is imported."""
    package, _, rest = module.partition(".")
    if package == PACKAGE.name:  # not by find_spec, which would import what is above it
        path = PACKAGE.joinpath(*rest.split("."))
        return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)
    try:
        spec = find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


@cache
def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return ast.Module([], [])


def _of_class(found: ast.ClassDef, tree: ast.Module) -> Declared | None:
    init = next((n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        return _of_function(init, tree, skip=1)
    fields: dict[str, Any] = {}
    for base in found.bases:
        inherited = _of_base(base, tree)
        if inherited is None:
            return None
        fields |= inherited.types
    names = _namespace(tree)
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            if annotation.startswith("ClassVar") or "init=False" in (ast.unparse(node.value) if node.value else ""):
                continue
            fields[node.target.id] = _evaluated(node.annotation, names)
    return Declared(fields)


def _of_base(base: ast.expr, tree: ast.Module) -> Declared | None:
    name = ast.unparse(base).partition("[")[0]
    if name in _OPAQUE:
        return Declared({})
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return declared_by(f"{node.module}.{original}")
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node, tree)
    return None


def _of_function(found: ast.FunctionDef, tree: ast.Module, skip: int = 0) -> Declared:
    names, args = _namespace(tree), found.args
    taken = [*args.posonlyargs, *args.args, *args.kwonlyargs][skip:]
    fields = {a.arg: Any if a.annotation is None else _evaluated(a.annotation, names) for a in taken}
    more: Literal["nothing", "nodes", "anything"] = "nothing"
    if args.kwarg is not None:
        more = "anything" if args.kwarg.annotation is None else "nodes"
    return Declared(fields, more)


def _evaluated(annotation: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            annotation = ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return Any
    try:
        return eval(compile(ast.Expression(annotation), "<annotation>", "eval"), dict(names))
    except Exception:  # names a type that is not among those that values of a config have
        return Built


def _namespace(tree: ast.Module) -> dict[str, Any]:
    """The names that annotations of options may use: builtins, typing's, `Annotated` types of this module."""
    names: dict[str, Any] = {"__builtins__": {}}
    names |= {each: getattr(builtins, each) for each in ("bool", "int", "float", "str", "list", "tuple", "dict")}
    modules = _KNOWN | {_OPTIONS: import_module(_OPTIONS)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                names[alias.asname or alias.name] = getattr(modules[node.module], alias.name, Any)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = _evaluated(node.value, names) if isinstance(node.value, (ast.Subscript, ast.BinOp)) else Built
            if value is not Built:
                names[node.targets[0].id] = value
    return names
