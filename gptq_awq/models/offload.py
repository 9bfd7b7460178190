"""Offloaded modules: their weights stay on disk, are loaded into memory while they are used, and are freed again.

    with resident(block):
        ...                         # the block's weights are in memory; those of ordinary modules always are

A call of an offloaded module outside of `resident` loads its weights for the time of the call. While they are not in
memory, its parameters keep their names, shapes, dtypes and identity (tied ones stay tied) over a single NaN, so that
reading them by mistake shows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn

from gptq_awq.errors import UserError

Read = Callable[[], Iterable[tuple[str, Tensor]]]
"""Reader of parameters: yields names and tensors one by one, so that only one is in memory twice."""


class Residence:
    """Loads and frees the parameters of modules that are offloaded together.

    Args:
        modules: offloaded modules; tied ones share parameters.
        parameters: the modules' parameters, each under one name that `read` yields.
        read: reads the parameters, in any precision.
        read_ahead: is called when `read` will be called soon.
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
        """Read the parameters by `read` from now on, without reading ahead."""
        self._read, self._read_ahead = read, lambda: None

    def split(
        self, whole: nn.Parameter, parts: Sequence[nn.Parameter], views: Callable[[Tensor], Sequence[Tensor]]
    ) -> None:
        """Replace one parameter by several, `NAME.0.weight` and so on, each one of its `views`."""
        name = next(name for name, parameter in self.parameters.items() if parameter is whole)
        names, read = [f"{name}.{i}.weight" for i in range(len(parts))], self._read
        del self.parameters[name]
        self.parameters |= zip(names, parts, strict=True)

        def split() -> Iterator[tuple[str, Tensor]]:
            for own, tensor in read():
                yield from zip(names, views(tensor), strict=True) if own == name else [(own, tensor)]

        self._read = split

    def read_ahead(self) -> None:
        """Prepare to load the parameters soon, unless they are in memory."""
        if not self._here:
            self._read_ahead()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager that holds the parameters in memory; changes to them are lost when the last one exits."""
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
        """Residence of a copied module, which is an ordinary one: always in memory, without parameters to load."""
        copy = object.__new__(Residence)
        copy.parameters, copy._wanted, copy._here = {}, 1, True
        return copy


def residence(module: nn.Module) -> Residence | None:
    """The residence of an offloaded module; None for a module that is always in memory."""
    found = module.__dict__.get("residence")
    return found if found is not None and found.parameters else None


@contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """Context manager that holds the modules' weights in memory; ordinary modules need nothing."""
    with ExitStack() as stack:
        for module in modules:
            home = residence(module)
            if home is not None:
                stack.enter_context(home.held())
        yield


def homes(model: nn.Module) -> dict[int, Residence]:
    """Map the id of every offloaded parameter of a model to its residence."""
    return {id(p): home for home in map(residence, model.modules()) if home for p in home.parameters.values()}


def each_tensor(model: nn.Module, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a model's state dict whose names `wanted` accepts, by name; each is in memory until the next one."""
    at = homes(model)
    state = [(n, x) for n, x in model.state_dict(keep_vars=True).items() if wanted(n)]
    for _, group in groupby(state, key=lambda item: id(at.get(id(item[1])))):
        members = list(group)
        home = at.get(id(members[0][1]))
        with home.held() if home else nullcontext():
            yield from members


def read_ahead(module: nn.Module) -> None:
    """Start reading an offloaded module that is not in memory, to load it soon; returns at once."""
    if (home := residence(module)) is not None:
        home.read_ahead()


def offloaded(model: nn.Module) -> bool:
    """Whether any of the model's modules is offloaded."""
    return any(residence(module) is not None for module in model.modules())


def check_in_memory(model: nn.Module, use: str, instead: str) -> None:
    """Refuse what takes the whole model at once, for a model that is offloaded.

    Args:
        model: the model.
        use: the option and what it does, up to "the whole model".
        instead: what to choose.

    Raises:
        UserError: naming both.
    """
    if offloaded(model):
        raise UserError(
            f"{use} the whole model, which is offloaded from disk block by block; {instead}, or stream=false and a "
            "memory_budget that the model fits into"
        )
