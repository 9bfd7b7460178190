"""Modules whose tensors stay elsewhere, come into memory when they are wanted, and leave again.

    with resident(block):
        ...                         # its weights are there; an ordinary module's always are

A module that is called outside of this comes for the time of the call. In its absence its parameters keep their names,
shapes, types and identity (tied ones stay tied), over a single NaN: whoever reads them by mistake will notice.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn

Read = Callable[[], Iterable[tuple[str, Tensor]]]
"""Names and parameters, one after the other: only one need be in memory twice."""


class Residence:
    """Where the parameters of some modules are while they are away.

    Args:
        modules: that come and go together; tied ones share parameters.
        parameters: theirs, each under one name that `read` knows.
        read: what they are, in any precision.
        read_ahead: is told that `read` will be wanted soon.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        parameters: Mapping[str, nn.Parameter],
        read: Read,
        read_ahead: Callable[[], None],
    ) -> None:
        self.parameters = dict(parameters)
        self._read, self._read_ahead = read, read_ahead
        self._wanted = 0
        self._here = False
        self._empty()
        for module in modules:
            module.residence = self  # pyright: ignore[reportArgumentType]
            module.register_forward_pre_hook(self._come)
            module.register_forward_hook(self._go, always_call=True)

    def moved(self, read: Read) -> None:
        """From now on they are what `read` says."""
        self._read, self._read_ahead = read, lambda: None

    def split(
        self, whole: nn.Parameter, parts: Sequence[nn.Parameter], views: Callable[[Tensor], Sequence[Tensor]]
    ) -> None:
        """From now on one of them is known as several, `NAME.0.weight` and so on, which are `views` of it."""
        name = next(name for name, parameter in self.parameters.items() if parameter is whole)
        names, read = [f"{name}.{i}.weight" for i in range(len(parts))], self._read
        del self.parameters[name]
        self.parameters |= zip(names, parts, strict=True)

        def split() -> Iterator[tuple[str, Tensor]]:
            for own, tensor in read():
                yield from zip(names, views(tensor), strict=True) if own == name else [(own, tensor)]

        self._read = split

    def read_ahead(self) -> None:
        """They will be wanted soon."""
        if not self._here:
            self._read_ahead()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within: they are in memory, and what is written to them lasts as long."""
        self._wanted += 1
        try:
            self._fill()
            yield
        finally:
            self._wanted -= 1
            if not self._wanted:
                self._empty()

    def _fill(self) -> None:
        if self._here:
            return
        for name, tensor in self._read():
            if (parameter := self.parameters.get(name)) is not None:
                parameter.data = tensor.to(parameter.device, parameter.dtype)
        self._here = True

    def _empty(self) -> None:
        self._here = False
        for parameter in self.parameters.values():
            nan = torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device)
            parameter.data = nan.expand(parameter.shape)

    def _come(self, _module: nn.Module, _args: tuple) -> None:
        self._fill()

    def _go(self, _module: nn.Module, _args: tuple, _output: object) -> None:
        if not self._wanted:
            self._empty()

    def __deepcopy__(self, _memo: dict) -> "Residence":
        """A copy of a module is an ordinary one: it is always there."""
        copy = object.__new__(Residence)
        copy.parameters, copy._wanted, copy._here = {}, 1, True
        return copy


def residence(module: nn.Module) -> Residence | None:
    """Of a module that comes and goes; None for one that is always there."""
    found = module.__dict__.get("residence")
    return found if found is not None and found.parameters else None


@contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """Within: the modules' weights are in memory."""
    with ExitStack() as stack:
        for module in modules:
            home = residence(module)
            if home is not None:
                stack.enter_context(home.held())
        yield


def homes(model: nn.Module) -> dict[int, Residence]:
    """The id of every parameter that comes and goes → where it is."""
    return {id(p): home for home in map(residence, model.modules()) if home for p in home.parameters.values()}


def each_tensor(model: nn.Module, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the model's state, those that are wanted; each is there until the next one is asked for."""
    at = homes(model)
    state = [(n, x) for n, x in model.state_dict(keep_vars=True).items() if wanted(n)]
    for _, group in groupby(state, key=lambda item: id(at.get(id(item[1])))):
        members = list(group)
        home = at.get(id(members[0][1]))
        with home.held() if home else nullcontext():
            yield from members


def read_ahead(module: nn.Module) -> None:
    """The module will be wanted soon: let the system fetch it, if it isn't in memory."""
    if (home := residence(module)) is not None:
        home.read_ahead()


def offloaded(model: nn.Module) -> bool:
    """Whether any of the model's modules comes and goes."""
    return any(residence(module) is not None for module in model.modules())
