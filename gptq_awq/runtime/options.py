"""Options: what each field that a config sets takes, declared once by its annotation and checked generically.

A class that a yaml names in `_target_` declares its options as annotated fields: `damping: NonNegative = 0.01`, or
`fallback: Literal["none", "rtn"] = "none"`. `check_config` reads these declarations from the class's source file, so a
mistake is found before that file, and torch with it, is imported; `checked_dataclass` applies the same declarations
where the class is constructed from Python.
"""

import ast
import builtins
import collections.abc
import dataclasses
import difflib
import pathlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from annotated_types import Ge, Gt, Interval, Le, Lt
from pydantic import BeforeValidator, ConfigDict, TypeAdapter
from pydantic.errors import PydanticUserError
from typing_extensions import dataclass_transform

from gptq_awq.errors import UserError

PositiveInt = Annotated[int, Ge(1)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Bits = Annotated[int, Interval(ge=2, le=8)]
GroupSize = Annotated[int, Ge(1)] | Literal[-1]
"""Columns that share a scale; -1: all of a row's."""
Search = Literal["minmax", "mse", "hessian"]
"""How the range of a group is chosen."""
ScaleDtype = Literal["float32", "float16", "bfloat16"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]

PACKAGE = Path(__file__).resolve().parent.parent
_LOOSE = ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_SPELLED = {True: "on", False: "off"}  # YAML 1.1 reads a bare on or off as a boolean
_KNOWN = ("typing", "collections.abc", "pathlib", "annotated_types", __name__)
_OPAQUE = {"object", "ABC", "Protocol", "Generic", "Callback"}
T = TypeVar("T")


@dataclass(frozen=True)
class Declared:
    """Options that a `_target_` declares.

    Attributes:
        types: name → annotation; Any where it isn't one that values of a config are checked by.
        required: names that have no default.
        open: further names are taken, too (`**kwargs`).
    """

    types: Mapping[str, Any]
    required: frozenset[str]
    open: bool


def check_config(config: Any, declared: Declared, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Check a resolved config against `declared`, and every node in it against its own `_target_`.

    Yields:
        (dotted name, value) of what was given in another spelling than its type's: `no` for a boolean, 1 for a float.

    Raises:
        UserError: naming the option, what it takes, and the nearest name where there is none of that name.
    """
    for key, value in config.items():
        option = f"{prefix}{key}"
        if str(key).startswith("_"):
            continue
        if key not in declared.types and not declared.open:
            raise UserError(f"{option}: there is no such option{nearest(key, declared.types, prefix)}")
        if isinstance(value, Mapping) and any(True for _ in targets_in(value)):
            yield from _check_node(value, option)
            continue
        known = checked(value, declared.types.get(key, Any), option)
        if not _same(known, value):
            yield option, known


def _check_node(node: Mapping[str, Any], option: str) -> Iterator[tuple[str, Any]]:
    target = node.get("_target_")
    if isinstance(target, str):
        yield from check_config(node, declared_by(target) or Declared({}, frozenset(), True), f"{option}.")
        return
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _check_node(value, f"{option}.{key}")


def targets_in(node: Any) -> Iterator[str]:
    """Every `_target_` in a resolved config, at any depth."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        yield from [target] if isinstance(target, str) else []
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from targets_in(item)


def nearest(name: Any, known: Mapping[str, Any] | typing.Iterable[str], prefix: str = "") -> str:
    """A question that proposes the known name nearest to a mistyped one; empty where none is near."""
    found = difflib.get_close_matches(str(name), [str(each) for each in known], n=1, cutoff=0.5)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def checked(value: Any, annotation: Any, option: str) -> Any:
    """The value as its annotation's type. Raises UserError naming `option` and what it takes."""
    if annotation is Any or (isinstance(value, str) and value == "???"):
        return value
    if isinstance(value, bool) and "on" in _choices(annotation):
        value = _SPELLED[value]
    try:
        return _adapter(annotation).validate_python(value)
    except PydanticUserError:  # an annotation that isn't one of data
        return value
    except ValueError:
        wanted = described(annotation)
        raise UserError(f"{option}={_shown(value)}: give {wanted}{_near_choice(value, annotation)}") from None


def _near_choice(value: Any, annotation: Any) -> str:
    return nearest(value, choices) if (choices := _choices(annotation)) else ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def described(annotation: Any) -> str:
    """In words, the values that an annotation takes: "a whole number from 2 to 8", "one of none, rtn"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return described(arguments[0]) + _bounds(arguments[1:])
    if origin in (Union, types.UnionType):
        parts = [described(each) for each in arguments if each is not type(None)]
        return " or ".join([*parts, *(["null"] if type(None) in arguments else [])])
    if origin is Literal:
        names = ", ".join(_shown(each) for each in arguments)
        return f"one of {names}" if len(arguments) > 1 else names
    if origin in (list, tuple, collections.abc.Sequence):
        return f"a list, each {described(arguments[0])}" if arguments else "a list"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(annotation, "a map" if origin in (dict, collections.abc.Mapping) else "a fitting value")


def _bounds(metadata: tuple[Any, ...]) -> str:
    low = next((each for each in _flat(metadata) if isinstance(each, (Ge, Gt))), None)
    high = next((each for each in _flat(metadata) if isinstance(each, (Le, Lt))), None)
    if isinstance(low, Ge) and isinstance(high, Le):
        return f" from {low.ge} to {high.le}"
    parts = [f"at least {low.ge}" if isinstance(low, Ge) else f"above {low.gt}"] if low else []
    parts += [f"at most {high.le}" if isinstance(high, Le) else f"below {high.lt}"] if high else []
    return ", " + " and ".join(parts) if parts else ""


def _flat(metadata: tuple[Any, ...]) -> Iterator[Any]:
    for each in metadata:
        yield from each if isinstance(each, annotated_types.GroupedMetadata) else [each]


def _choices(annotation: Any) -> list[str]:
    """The names that a Literal, alone or in a union, has."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [each for each in arguments if isinstance(each, str)]
    return [name for each in arguments for name in _choices(each)] if origin in (Union, types.UnionType) else []


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_without_booleans(annotation), config=_LOOSE)


def _without_booleans(annotation: Any) -> Any:
    """The annotation with numbers that don't take true and false for 1 and 0."""
    if annotation in (int, float):
        return Annotated[annotation, BeforeValidator(_no_boolean)]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[(_without_booleans(arguments[0]), *arguments[1:])]
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_without_booleans, arguments))]  # noqa: UP007 (of a tuple)
    if origin in (list, tuple, dict, collections.abc.Sequence, collections.abc.Mapping):
        return origin[tuple(each if each is ... else _without_booleans(each) for each in arguments)]
    return annotation


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a boolean is no number")
    return value


# -------------------------------------------------------------------- declarations, read without importing anything


@cache
def declared_by(target: str) -> Declared | None:
    """Options of the class or function that a dotted name stands for; None where its source can't tell."""
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
    required: set[str] = set()
    for base in found.bases:
        inherited = _of_base(base, tree)
        if inherited is None:
            return None
        fields |= inherited.types
        required |= inherited.required
    names = _namespace(tree)
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            if annotation.startswith("ClassVar") or "init=False" in (ast.unparse(node.value) if node.value else ""):
                continue
            fields[node.target.id] = _evaluated(node.annotation, names)
            required = required | {node.target.id} if node.value is None else required - {node.target.id}
    return Declared(fields, frozenset(required), open=False)


def _of_base(base: ast.expr, tree: ast.Module) -> Declared | None:
    name = ast.unparse(base).partition("[")[0]
    if name in _OPAQUE:
        return Declared({}, frozenset(), open=False)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return declared_by(f"{node.module}.{original}")
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node, tree)
    return None


def _of_function(found: ast.FunctionDef, tree: ast.Module, skip: int = 0) -> Declared:
    names, args = _namespace(tree), found.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)][skip:]
    fields = {a.arg: Any if a.annotation is None else _evaluated(a.annotation, names) for a, _ in pairs}
    return Declared(fields, frozenset(a.arg for a, default in pairs if default is None), open=args.kwarg is not None)


def _evaluated(annotation: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            annotation = ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return Any
    try:
        return eval(compile(ast.Expression(annotation), "<annotation>", "eval"), dict(names))
    except Exception:  # an annotation of other packages' types: not one that values of a config are checked by
        return Any


def _namespace(tree: ast.Module) -> dict[str, Any]:
    """The names that annotations of options may use: builtins, typing's, `Annotated` types of this module."""
    names: dict[str, Any] = {"__builtins__": {}}
    names |= {each: getattr(builtins, each) for each in ("bool", "int", "float", "str", "list", "tuple", "dict")}
    modules = {"typing": typing, "collections.abc": collections.abc, "pathlib": pathlib, __name__: _this()}
    modules["annotated_types"] = annotated_types
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in _KNOWN:
            for alias in node.names:
                names[alias.asname or alias.name] = getattr(modules[node.module], alias.name, Any)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = _evaluated(node.value, names) if isinstance(node.value, (ast.Subscript, ast.BinOp)) else Any
            if value is not Any:
                names[node.targets[0].id] = value
    return names


def _this() -> types.ModuleType:
    import sys

    return sys.modules[__name__]


# ----------------------------------------------------------------------------------- the same, for classes in Python


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def checked_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are checked by their annotations when an instance is made.

    Raises (from the constructor):
        UserError: "GPTQ.damping=-1: give a number, at least 0".
    """
    own: Callable[[Any], None] | None = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:  # noqa: N807
        if type(self) is made or own is None or not hasattr(own, "_checks"):
            _check_fields(self)
        if own is not None:
            own(self)

    __post_init__._checks = True  # type: ignore[attr-defined]
    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    made = dataclass(frozen=True)(cls)
    return made


def _check_fields(instance: Any) -> None:
    hints = _hints(type(instance))
    for each in dataclasses.fields(instance):
        value = getattr(instance, each.name)
        if (annotation := hints.get(each.name)) is not None:
            known = checked(value, annotation, f"{type(instance).__name__}.{each.name}")
            if not _same(known, value):
                object.__setattr__(instance, each.name, known)


@cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except Exception:  # names that only a type checker imports
        return {}
