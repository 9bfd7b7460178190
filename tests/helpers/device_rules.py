"""Rules that operations keep on a GPU and not on a CPU: one device for all operands, and hosts that wait."""

from collections.abc import Callable

import torch
from torch import Tensor

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.allclose,
}
"""Operations whose result, or its shape, the host waits for."""
SCALARS = {
    aten.fill_,
    aten.where,
    aten.masked_fill,
    aten.masked_fill_,
    aten.index_put,
    aten.index_put_,
    aten.index_fill,
}
"""Operations beside the pointwise that take a CPU tensor of no dimension on a GPU."""
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
"""Operations that move indices to what is indexed."""


GPU_ONLY = {aten.mm.dtype: lambda a, b, out_dtype: torch.mm(a.to(out_dtype), b.to(out_dtype))}
"""Operations that CPUs don't have."""


class MixedDevicesError(RuntimeError):
    """An operation was given tensors on several devices."""


def tensors(*values) -> list[Tensor]:
    """All tensors of arguments, and of lists and tuples among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors(*value)
    return found


def mapped(function, value):
    """A value, or the list or tuple of values, with a function applied to its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if not isinstance(value, (list, tuple)):
        return value
    parts = [mapped(function, part) for part in value]
    if hasattr(value, "_fields") or type(value).__module__ == "torch.return_types":
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return type(value)(parts)


def waits(func, args) -> bool:
    """Whether the host waits for the operation's result."""
    packet = func.overloadpacket
    return packet in WAITS or (packet in INDEXED and any(x.dtype in (torch.bool, torch.uint8) for x in _indices(args)))


def _indices(args) -> list[Tensor]:
    return [x for x in args[1] if x is not None] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []


def refuse_mixed(func, args, kwargs, on_device: Callable[[Tensor], bool]) -> None:
    """Raise where PyTorch refuses operands on the CPU beside operands on a GPU."""
    packet, operands = func.overloadpacket, tensors(*args, *kwargs.values())
    if packet in INDEXED and on_device(args[0]):
        operands = [x for x in operands if all(x is not index for index in _indices(args))]
    strays = [x for x in operands if not on_device(x)]
    if not strays:
        return
    scalars = torch.Tag.pointwise in func.tags or packet in SCALARS
    into = args[0] if func._schema.is_mutable and args and isinstance(args[0], Tensor) else None
    large = any(x.dim() for x in operands if on_device(x)) or len(operands) - len(strays) > 0
    if scalars and large and all(x.dim() == 0 for x in strays) and (into is None or on_device(into)):
        return
    shapes = ", ".join(f"{'cuda' if on_device(x) else 'cpu'} {tuple(x.shape)}" for x in operands)
    raise MixedDevicesError(f"{func}: expected all tensors to be on the same device, got {shapes}")
