"""Import of transformers without torch's compiler and distributed tensors, for commands that use neither.

transformers imports torch._dynamo, and with it Inductor and SymPy, for decorators that keep functions out of compiled
graphs; torch.distributed.tensor for models that are spread over devices; and scipy.optimize for the losses of object
detection. That takes longer than all else that transformers imports, and 140 MB. Here stand-ins have the few names that
it asks for; who asks them for anything else gets the real module, imported then. Nor is Trio imported, or the list of
what 500 models define made twice.

    import_transformers()          # a command that computes on one process; never the library
    from transformers import …
"""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)
WANTED = ("transformers.modeling_utils", "transformers.generation.utils", "transformers.models.auto.modeling_auto")
"""Modules of transformers that import what the stand-ins replace."""
COMPILER, TRACING, SOLVERS = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op", "scipy.optimize"
MARKS = ("disable", "allow_in_graph", "assume_constant_result")
"""Decorators of the compiler's that say how it shall treat a function."""
SYMBOLS, SHAPES = "sympy", "torch.fx.experimental.symbolic_shapes"
"""Modules that models of unknown sizes need, and that torch asks about each size of a model on its meta device."""
CALLED = {TRACING: "TransformGetItemToIndex", SOLVERS: "linear_sum_assignment"}
"""Module → the name in it that transformers imports, and calls for other models than those for text, if at all."""

ANSWERS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious"), lambda x, *_: x),
    **dict.fromkeys(("statically_known_true", "guarding_hint_or_throw"), lambda x: x),
    "has_guarding_hint": lambda _: True,
    "is_nested_int": lambda _: False,
    "sym_eq": lambda x, y: list(x) == list(y) if isinstance(x, (tuple, list)) else x == y,
    "sym_and": lambda *xs: all(xs),
    "sym_or": lambda *xs: any(xs),
}
"""What symbolic_shapes' functions say of plain numbers."""


def import_transformers() -> None:
    """Import transformers with stand-ins for what it will not call; where that fails, as it always is imported.

    A function that asks to be left out of compiled graphs is not marked then. A transformers that is imported already
    stays as it is.
    """
    if "transformers" in sys.modules:
        return
    importlib.import_module("torch")  # which needs the real ones
    given: dict[str, Mapping[str, Any]] = {module: {name: _later(module, name)} for module, name in CALLED.items()}
    given[COMPILER] = dict.fromkeys(MARKS, _unmarked)
    given[SYMBOLS] = {"Basic": type("Basic", (), {})}  # which no number is an instance of
    given[SHAPES] = {name: _of_numbers(name, answer) for name, answer in ANSWERS.items()}
    made = {name: _StandIn(name, values) for name, values in given.items() if name not in sys.modules}
    sys.modules.update(made)
    sys.meta_path.insert(0, _Within())
    try:
        with _undistributed(), _without("trio"), _listed_once():
            for name in WANTED:
                importlib.import_module(name)
    except Exception:  # another version of transformers may need more than the stand-ins have
        log.debug("transformers is imported with all that it imports", exc_info=True)
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        for stand_in in made.values():
            stand_in.leave()


class _StandIn(ModuleType):
    """A module with a few names, which makes way for the real one when it is asked for any other.

    Args:
        name: the module's full name.
        given: its names, and what they stand for.
    """

    def __init__(self, name: str, given: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(given, __path__=[], __spec__=ModuleSpec(name, None))  # a package, for `_Within`
        self._given = given

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real(), name)

    def real(self) -> ModuleType:
        """Make way for the real module, and import it; who holds the stand-in finds the real names in it."""
        self.leave()
        for name in self._given:
            self.__dict__.pop(name, None)
        return importlib.import_module(self.__name__)

    def leave(self) -> None:
        """Let the next import of this module, and of those within it, find the real one."""
        for name, module in list(sys.modules.items()):
            if isinstance(module, _StandIn) and name.startswith(self.__name__):
                del sys.modules[name]


class _Within(MetaPathFinder, Loader):
    """Finder of modules within a module that has a stand-in: the real one is imported first."""

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        """Spec of the module; None where it lies in no stand-in."""
        package = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(package, _StandIn):
            return None
        package.real()
        return spec_from_loader(name, self) if name in sys.modules else find_spec(name)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module that the real package has imported already."""
        return sys.modules[spec.name]

    def exec_module(self, _module: ModuleType) -> None:
        """Leave a module as it is that has been executed."""


@contextmanager
def _undistributed() -> Iterator[None]:
    """Context in which torch says that it is built without its distributed part, as some builds are."""
    import torch.distributed

    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = available


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Context in which a module can't be imported, as if it weren't installed; one that is imported already stays.

    The hub's client takes Trio, where there is one, for requests that nobody here makes.
    """
    absent = {} if name in sys.modules else {name: None}
    sys.modules.update(absent)  # pyright: ignore[reportCallIssue, reportArgumentType]
    try:
        yield
    finally:
        for each in absent:
            del sys.modules[each]


@contextmanager
def _listed_once() -> Iterator[None]:
    """Context in which transformers reads the sources of its models, to list what they define, once and not twice."""
    transformers = importlib.import_module("transformers")
    utils: Any = importlib.import_module("transformers.utils.import_utils")
    models, read = Path(transformers.__file__ or "").parent / "models", utils.define_import_structure

    def listed(path: Any, prefix: str | None = None) -> dict[frozenset, dict[str, set]]:
        if Path(path) != models / "__init__.py" or prefix is not None:
            return read(path, prefix)
        found = read(models, prefix="models").items()  # which it has kept, among other names
        own = "models."
        return {k: {x.removeprefix(own): v for x, v in names.items() if x.startswith(own)} for k, names in found}

    utils.define_import_structure = listed
    try:
        yield
    finally:
        utils.define_import_structure = read


def _unmarked(function: Any = None, *_args: Any, **_options: Any) -> Any:
    """Stand in for a decorator, with or without arguments of its own, that returns functions as they are."""
    return function if callable(function) else _unmarked


def _of_numbers(name: str, answer: Callable[..., Any]) -> Any:
    """Make a function of symbolic_shapes' that answers for numbers, and asks the real one about anything else."""
    real = _later(SHAPES, name)
    return lambda *args: (answer if _numbers(args) else real)(*args)


def _numbers(x: Any) -> bool:
    """Whether all in some tuples and lists are plain numbers, and no symbols."""
    return all(map(_numbers, x)) if isinstance(x, (tuple, list)) else isinstance(x, (int, float))


def _later(module: str, name: str) -> Any:
    """Make a function that calls the one of that name in a module, imported then."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = importlib.import_module(module)
        return getattr(found.real() if isinstance(found, _StandIn) else found, name)(*args, **kwargs)

    return call
