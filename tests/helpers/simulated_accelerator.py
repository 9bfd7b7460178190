"""A simulated CUDA device: tensors that say they are on it, with their data in memory, and refuse what a GPU refuses.

    with accelerator() as device:
        model.to("cuda")
        ...
        assert device.waits <= 20

Each call of PyTorch passes through a `TorchFunctionMode`, which sees the devices that are asked for, and each operation
on `OnDevice` tensors through their `__torch_dispatch__`, which sees the devices that its operands are on. To PyTorch's
core, which must not know of CUDA, they are tensors on the CPU, so autograd and the kernels for CPUs are the real ones.

What it finds: operands on two devices (a CPU tensor of no dimension is let in where PyTorch does), generators of
another device, `.numpy()` of a tensor on the device and so any call of a numba kernel, branches of the program for
CPUs that a GPU takes as well, and how often the host waits for the device.

What it can't: Triton kernels (its compute capability is below what they need; tests/kernels runs them in Triton's
interpreter), streams and what asynchronous copies or pinned memory would change, the device's own arithmetic and
memory, several devices, and libraries that load CUDA code when they are imported, such as bitsandbytes.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.device_rules import GPU_ONLY, aten, mapped, refuse_mixed, tensors, waits

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
CAPABILITY = 7, 0
"""Compute capability: a V100's, which Triton doesn't support any more."""
FREE = 8 * 10**9


@dataclass
class Accelerator:
    """Requests that the simulated device has had.

    Attributes:
        uploads: tensors copied onto it.
        downloads: tensors copied from it.
        waits: how often the host had to wait for it: downloads, numbers read, shapes that depend on values.
    """

    uploads: int = 0
    downloads: int = 0
    waits: int = 0

    def moved(self, to: torch.device) -> None:
        """Count a copy between the devices."""
        if to.type == "cuda":
            self.uploads += 1
        else:
            self.downloads += 1
            self.waits += 1


COUNTED = Accelerator()
"""Requests to the accelerator that is simulated now."""


class OnDevice(Tensor):
    """A tensor that says it is on the simulated device; its values are in `held`, a plain CPU tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cpu",
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if not all(issubclass(kind, Tensor) for kind in types):  # such as a slice of fused experts, which isn't one
            return NotImplemented
        return called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def plain(x):
    """A tensor's values as a plain tensor."""
    return x.held if isinstance(x, OnDevice) else x


def wrapped(x):
    """A plain tensor's values on the device."""
    return x if isinstance(x, OnDevice) else OnDevice(x)


def place(x: Tensor) -> torch.device:
    """The device that a tensor says it is on; meta, too, as loaders ask which buffers are still empty."""
    if isinstance(x, OnDevice):
        return CUDA
    with torch._C.DisableTorchFunction():
        return x.device


def computed(func, args, kwargs):
    """Compute an operation with at least one operand on the device."""
    if func.overloadpacket in (aten.copy_, aten._copy_from):
        return _copied(func, args, kwargs)
    refuse_mixed(func, args, kwargs, lambda x: isinstance(x, OnDevice))
    COUNTED.waits += waits(func, args)
    compute = GPU_ONLY.get(func, func)
    out = compute(*(mapped(plain, x) for x in args), **{k: mapped(plain, x) for k, x in kwargs.items()})
    if func._schema.is_mutable and isinstance(out, Tensor):  # in place: the operand itself, which its views alias
        own = next((x for x in tensors(*args, *kwargs.values()) if isinstance(x, OnDevice) and x.held is out), None)
        if own is not None:
            assert own.shape == out.shape, f"{func} changes the shape of a tensor in place, which isn't simulated"
            return own
    return mapped(wrapped, out)


def _copied(func, args, kwargs):
    """Copy into a tensor, from whichever device."""
    into, source = args[:2]
    if place(into) != place(source):
        COUNTED.moved(place(into))
    func(plain(into), plain(source), *args[2:], **kwargs)
    return into


class _MadeInside(TorchDispatchMode):
    """While an operation on tensors of the device is running, tensors that it makes for itself are on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operands = tensors(*args, *kwargs.values())
        if any(isinstance(x, OnDevice) for x in operands):
            return computed(func, args, kwargs)
        out = func(*args, **kwargs)
        return out if operands else mapped(wrapped, out)


class _Transfer(torch.autograd.Function):
    """A copy onto the other device, and of its gradient back."""

    @staticmethod
    def forward(ctx, x, copy):
        return copy.clone() if isinstance(x, OnDevice) else OnDevice(x.clone())

    @staticmethod
    def backward(ctx, grad):
        COUNTED.moved(CPU if isinstance(grad, OnDevice) else CUDA)
        return (grad.held.clone() if isinstance(grad, OnDevice) else OnDevice(grad.clone())), None


def transferred(x: Tensor, device: torch.device) -> Tensor:
    """x on a device: itself where it is there already."""
    if place(x).type == device.type or device.type == "meta":
        return x
    COUNTED.moved(device)
    if x.requires_grad and torch.is_grad_enabled():
        return _Transfer.apply(x, plain(x))
    x = x.detach()
    return x.held.clone() if isinstance(x, OnDevice) else OnDevice(x.clone())


def called(func, args, kwargs):
    """Call a function of PyTorch with what it asks of devices answered for the simulated one."""
    if func in ANSWERS:
        return ANSWERS[func](*args, **kwargs)
    given = tensors(*args, *kwargs.values())
    on_device = any(isinstance(x, OnDevice) for x in given)
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type in ("cuda", "cpu"):
        out = _computed_on(func, args, kwargs | {"device": CPU}, on_device)
        _same_generator(func, kwargs, torch.device(asked))
        target = torch.device(asked)
        move = (lambda x: transferred(x, target)) if given else (wrapped if target.type == "cuda" else plain)
        return mapped(move, out)
    out = _computed_on(func, args, kwargs, on_device)
    _same_generator(func, kwargs, CUDA if on_device else CPU)
    return out


def _computed_on(func, args, kwargs, on_device):
    with torch._C.DisableTorchFunctionSubclass():
        if not on_device:
            return func(*args, **kwargs)
        with _MadeInside():
            return func(*args, **kwargs)


def _same_generator(func, kwargs, device: torch.device) -> None:
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != device.type:
        raise RuntimeError(f"{func}: expected a '{device.type}' device type for generator, got {generator.device}")


def _to(x, *args, **kwargs):
    """Tensor.to, whose device is a device, a name, a number, or another tensor's."""
    target, rest = kwargs.pop("device", None), []
    for argument in args:
        if isinstance(argument, (str, torch.device)) or (isinstance(argument, int) and not isinstance(argument, bool)):
            target = CUDA if isinstance(argument, int) else argument
        elif isinstance(argument, Tensor):
            target = place(argument)
            rest.append(argument.dtype)
        else:
            rest.append(argument)
    if target is not None and torch.device(target).type not in ("cpu", "cuda"):
        return _computed_on(Tensor.to, (x, torch.device(target), *rest), kwargs, isinstance(x, OnDevice))
    if not rest and target is not None:  # (device, dtype, non_blocking, copy), of which only the first was by position
        own = x
    rest = [value for value in rest if value is not None and not isinstance(value, bool)]
    wanted = {k: v for k, v in kwargs.items() if k != "non_blocking" and v is not None}
    own = _computed_on(Tensor.to, (x, *rest), wanted, isinstance(x, OnDevice)) if rest or wanted else x
    return own if target is None else transferred(own, torch.device(target))


def _no_numpy(x, *args, **kwargs):
    if isinstance(x, OnDevice):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory")
    return _computed_on(Tensor.numpy, (x, *args), kwargs, False)


def _no_array(x, *args, **kwargs):
    if isinstance(x, OnDevice):
        return _no_numpy(x)
    return _computed_on(Tensor.__array__, (x, *args), kwargs, False)


def _tolist(x):
    if isinstance(x, OnDevice):
        COUNTED.waits += 1
    return _computed_on(Tensor.tolist, (plain(x.detach()),), {}, False)


def _set_data(x, value):
    """`x.data = value`: a tensor may change its device by it."""
    if isinstance(x, OnDevice) == isinstance(value, OnDevice):
        _computed_on(Tensor.data.__set__, (x, value), {}, False)
        if isinstance(x, OnDevice):
            x.held = value.held
        return
    new = OnDevice(value.held) if isinstance(value, OnDevice) else value.detach().view_as(value)
    new.requires_grad_(x.requires_grad)
    if isinstance(x, torch.nn.Parameter):
        new = new if isinstance(new, OnDevice) else torch.nn.Parameter(new, x.requires_grad)
        new._is_param = True
    torch.utils.swap_tensors(x, new)


def _deepcopy(x, memo):
    if not isinstance(x, OnDevice):
        return _computed_on(Tensor.__deepcopy__, (x, memo), {}, False)
    if id(x) not in memo:
        made = OnDevice(x.held.detach().clone()).requires_grad_(x.requires_grad)
        if getattr(x, "_is_param", False):
            made._is_param = True
        memo[id(x)] = made
    return memo[id(x)]


def _asked_of_held(func):
    return lambda x, *args: _computed_on(func, (plain(x), *args), {}, False)


def _new_tensor(x, data, **kwargs):
    """`x.new_tensor(…)`: on x's device unless another is named."""
    device = torch.device(kwargs.pop("device", None) or place(x))
    made = torch.tensor(data, **{"dtype": x.dtype} | kwargs)
    return OnDevice(made) if device.type == "cuda" else made


ANSWERS = {
    Tensor.device.__get__: place,
    Tensor.is_cuda.__get__: lambda x: isinstance(x, OnDevice),
    Tensor.is_cpu.__get__: lambda x: place(x).type == "cpu",
    Tensor.get_device: lambda x: 0 if isinstance(x, OnDevice) else -1,
    Tensor.to: _to,
    Tensor.cpu: lambda x, *_, **__: transferred(x, CPU),
    Tensor.cuda: lambda x, *_, **__: transferred(x, CUDA),
    Tensor.new_tensor: _new_tensor,
    Tensor.numpy: _no_numpy,
    Tensor.__array__: _no_array,
    Tensor.tolist: _tolist,
    Tensor.data.__set__: _set_data,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.data_ptr: _asked_of_held(Tensor.data_ptr),
    Tensor.untyped_storage: _asked_of_held(Tensor.untyped_storage),
    Tensor.__repr__: lambda x, **_: f"{'OnDevice' * isinstance(x, OnDevice)}({plain(x.detach()).tolist()})",
}
"""Functions that a tensor's device is read, set or refused by."""


class _Asked(TorchFunctionMode):
    """Sees every call of PyTorch, with tensors on the device or without."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not all(issubclass(kind, Tensor) for kind in types):
            return func(*args, **(kwargs or {}))
        return called(func, args, kwargs or {})


class _Generator(torch.Generator):
    """A generator that says which device it is of."""

    place = CPU

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    @property
    def device(self):
        return self.place


PRETENDED = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "is_bf16_supported": lambda including_emulation=True: True,
    "get_device_name": lambda device=None: "simulated",
    "get_device_capability": lambda device=None: CAPABILITY,
    "mem_get_info": lambda device=None: (FREE, FREE),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1,
    "reset_peak_memory_stats": lambda device=None: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
}
"""Functions of torch.cuda, as far as the program calls them."""


@contextmanager
def accelerator() -> Iterator[Accelerator]:
    """Context manager under which "cuda" is the simulated device; yields the counts of what it is asked."""
    global COUNTED
    COUNTED = Accelerator()
    with pytest.MonkeyPatch.context() as patch, _Asked():
        for name, answer in PRETENDED.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch, "Generator", _Generator)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what isn't initialized with NaN
        try:
            yield COUNTED
        finally:
            torch.use_deterministic_algorithms(False)
    sys.stdout.flush()
