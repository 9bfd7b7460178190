"""Options: what each field that a config sets takes, declared once by its annotation and checked generically.

A class that a yaml names in `_target_` declares its options as annotated fields: `damping: NonNegative = 0.01`, or
`fallback: Literal["none", "rtn"] = "none"`. `check_config` reads these declarations from the class's source file, so a
mistake is found before that file, and torch with it, is imported; `checked_dataclass` applies the same declarations
where the class is constructed from Python.
"""

import collections.abc
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from annotated_types import Ge, Gt, Interval, Le, Lt
from pydantic import AfterValidator, BeforeValidator, ConfigDict, StringConstraints, TypeAdapter
from typing_extensions import dataclass_transform

from gptq_awq.errors import UserError
from gptq_awq.runtime.declarations import Built, Declared, declared_by, targets_in

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Bits = Annotated[int, Interval(ge=2, le=8)]
GroupSize = Annotated[int, Ge(1)] | Literal[-1]
"""Columns that share a scale; -1: all of a row's."""
Search = Literal["minmax", "mse", "hessian"]
"""How the range of a group is chosen."""
Dtype = Literal["float32", "float16", "bfloat16"]
_BYTES = r"^\s*[0-9.]+(e[0-9]+)?\s*[kKmMgGtT]?i?[bB]?\s*$"
ByteSize = Annotated[str, StringConstraints(pattern=_BYTES), "a number of bytes, such as 4GB"]
ComputeDtype = Literal["auto"] | Dtype
_DEVICES = r"^(auto|cpu|cuda(:[0-9]+)?|mps|xpu(:[0-9]+)?)$"
Device = Annotated[str, StringConstraints(pattern=_DEVICES), "auto, cpu, cuda, cuda:1 or the like"]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
InputPath = Annotated[str, AfterValidator(lambda path: _existing(path)), "a file or folder that is there"]
"""Looked for while a config is checked; an object of Python's finds out when it reads the path."""
NamesBeside = Annotated[str | Sequence[str], "names of what is beside"]
"""Names of the nodes beside the option, such as the formats that `export.formats` chooses among."""

_LOOSE = ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_SPELLED = {True: "on", False: "off"}  # YAML 1.1 reads a bare on or off as a boolean
T = TypeVar("T")


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
        is_node = isinstance(value, Mapping) and any(True for _ in targets_in(value))
        if key not in declared.types and not (declared.more == "anything" or (declared.more == "nodes" and is_node)):
            raise UserError(f"{option}: there is no such option{nearest(key, declared.types, prefix)}")
        if is_node:
            yield from _check_node(value, option)
            continue
        annotation = declared.types.get(key, Any)
        if annotation is Built and isinstance(value, Mapping) and value:
            raise UserError(f"{_first(value, option)}: {option} is not set, so it has no such option")
        if annotation is NamesBeside:
            annotation = _names_of_nodes(config)
        known = checked(value, annotation, option)
        if not _same(known, value):
            yield option, known


def _names_of_nodes(config: Mapping[str, Any]) -> Any:
    names = tuple(key for key, value in config.items() if isinstance(value, Mapping) and "_target_" in value)
    return Literal[names] | list[Literal[names]] if names else Any


def _check_node(node: Mapping[str, Any], option: str) -> Iterator[tuple[str, Any]]:
    target = node.get("_target_")
    if isinstance(target, str):
        yield from check_config(node, declared_by(target) or Declared({}, "anything"), f"{option}.")
        return
    for key, value in node.items():
        if not isinstance(value, Mapping):
            continue
        if value and not any(True for _ in targets_in(value)):
            named = _first(value, f"{option}.{key}")
            raise UserError(f"{named}: there is no {option}.{key}{nearest(key, _without(node, key), f'{option}.')}")
        yield from _check_node(value, f"{option}.{key}")


def _without(node: Mapping[str, Any], key: str) -> list[str]:
    return [each for each in node if each != key]


def _first(value: Any, option: str) -> str:
    """Name of the first option in a map of options, and its value."""
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        option = f"{option}.{key}"
    return f"{option}={_shown(value)}"


def nearest(name: Any, known: Mapping[str, Any] | typing.Iterable[str], prefix: str = "") -> str:
    """A question that proposes the known name nearest to a mistyped one; empty where none is near."""
    found = difflib.get_close_matches(str(name), [str(each) for each in known], n=1, cutoff=0.5)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def checked(value: Any, annotation: Any, option: str) -> Any:
    """The value as its annotation's type. Raises UserError naming `option` and what it takes."""
    if not _is_data(annotation):
        return value
    if isinstance(value, bool) and "on" in _choices(annotation):
        value = _SPELLED[value]
    try:
        return _adapter(annotation).validate_python(value)
    except ValueError:
        wanted = described(annotation)
        raise UserError(f"{option}={_shown(value)}: give {wanted}{_near_choice(value, annotation)}") from None


def _existing(path: str) -> str:
    if not Path(path).expanduser().exists():
        raise ValueError(path)
    return path


def _is_data(annotation: Any) -> bool:
    """Whether an annotation is one of values that a config can hold, and so can be checked."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal or annotation in (bool, int, float, str, None, type(None)):
        return True
    if origin is Annotated:
        return _is_data(arguments[0])
    containers = (Union, types.UnionType, list, tuple, dict, collections.abc.Sequence, collections.abc.Mapping)
    return origin in containers and all(each in (..., Any) or _is_data(each) for each in arguments)


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
        said = next((each for each in arguments[1:] if isinstance(each, str)), None)
        return said or described(arguments[0]) + _bounds(arguments[1:])
    if origin in (Union, types.UnionType):
        if len(arguments) == 2 and get_args(arguments[1])[:1] == arguments[:1]:
            return f"{described(arguments[0])}, or a list of these"
        parts = [described(each) for each in arguments if each is not type(None)]
        return " or ".join([*parts, *(["null"] if type(None) in arguments else [])])
    if origin is Literal:
        names = ", ".join(_shown(each) for each in arguments)
        return f"one of {names}" if len(arguments) > 1 else names
    if origin in (list, tuple, collections.abc.Sequence):
        return f"a list, each {described(arguments[0])}" if arguments else "a list"
    if origin in (dict, collections.abc.Mapping):
        return f"a map of {described(arguments[1])}" if arguments[1] is not Any else "a map"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", None: "null"}
    return words.get(annotation, "a fitting value")


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
    nested = origin in (Union, types.UnionType, list)
    return list(dict.fromkeys(name for each in arguments for name in _choices(each))) if nested else []


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
        container: Any = origin
        return container[tuple(each if each is ... else _without_booleans(each) for each in arguments)]
    return annotation


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a boolean is no number")
    return value


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def checked_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are checked by their annotations when an instance is made.

    The constructor raises UserError: "GPTQ.damping=-1: give a number, at least 0".
    """
    return _with_check(cls, kw_only=False)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def checked_keywords(cls: type[T]) -> type[T]:
    """A `checked_dataclass` whose fields are given by name only."""
    return _with_check(cls, kw_only=True)


def _with_check(cls: type[T], kw_only: bool) -> type[T]:
    own: Callable[[Any], None] | None = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:  # noqa: N807
        _check_fields(self)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=kw_only)(cls)


def _check_fields(instance: Any) -> None:
    hints = _hints(type(instance))
    for each in dataclasses.fields(instance):
        value = getattr(instance, each.name)
        if (annotation := hints.get(each.name)) is not None and InputPath not in (annotation, *get_args(annotation)):
            known = checked(value, annotation, f"{type(instance).__name__}.{each.name}")
            if not _same(known, value):
                object.__setattr__(instance, each.name, known)


@cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except Exception:  # names that only a type checker imports
        return {}
