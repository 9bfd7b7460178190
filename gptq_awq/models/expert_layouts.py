"""Layouts of fused experts: which parameters are experts' matrices, and which way round, as a block shows."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gptq_awq.models.blocks import Call

log = logging.getLogger(__name__)

PRODUCTS = {
    functional.linear,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    torch.Tensor.matmul,
    torch.Tensor.bmm,
    torch.Tensor.__rmatmul__,
}
PLAIN, TRANSPOSED = "plain", "transposed"
LAYOUTS = {PLAIN, TRANSPOSED}
VIEWS = {torch.Tensor.view, torch.Tensor.reshape}
TRANSPOSE = torch.Tensor.T.__get__  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class Layout:
    """Layout of a fused parameter.

    Attributes:
        transposed: whether the forward multiplies x @ fused[e], with fused[e] of shape (in, out).
        flat: number of experts that lie one below the other in two dimensions; None: three dimensions.
    """

    transposed: bool
    flat: int | None = None


def fused_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that may be fused experts, by name within the module: three dimensions, or two and no `weight`."""
    named = module.named_parameters()
    return {name: p for name, p in named if p.dim() == 3 or (p.dim() == 2 and name.rpartition(".")[2] != "weight")}


@torch.no_grad()
def observe_layout(block: nn.Module, hidden: Float[Tensor, "1 tokens width"], call: Call) -> dict[str, Layout]:
    """Map each fused-expert parameter of a block to its layout, as observed in one call.

    Parameters that take part in no product (kernels of convolutions), or in another one than of one expert's matrix
    or of a batch of them, are left out: they stay as they are.
    """
    watch = _Watch(fused_parameters(block))
    with watch:
        call.run(block, hidden)
    single = {name: uses for name, uses in watch.uses.items() if len(uses) == 1 and uses <= LAYOUTS}
    found = {name: Layout(TRANSPOSED in uses, watch.flat.get(name)) for name, uses in single.items()}
    for name in sorted(name for name, uses in watch.uses.items() if uses and name not in found):
        log.debug("%s multiplies by %s in %s", type(block).__name__, name, ", ".join(sorted(watch.uses[name])))
    return found


@dataclass(frozen=True)
class Product:
    """A product of activations and a weight, with the layout in which a forward wrote it."""

    x: Tensor
    weight: Any
    bias: Tensor | None
    transposed: bool


def product_of(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Product | None:
    """Recognise a call of F.linear(x, W, b), x @ W or torch.matmul(x, W); None for other functions."""
    if func is functional.linear and len(args) >= 2:
        return Product(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"), False)
    if func in (torch.Tensor.matmul, torch.matmul) and len(args) == 2:
        return Product(args[0], args[1], None, True)
    return None


class _Watch(TorchFunctionMode):
    """Mode that observes in which products, and in which layout, a forward uses parameters that may be experts."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = parameters
        self._whole = {id(p): p for p in parameters.values()}  # and views of flat ones, held so that ids stay unique
        self._slices: dict[int, tuple[Tensor, bool]] = {}  # and whether it is a transpose
        self.uses: dict[str, set[str]] = {name: set() for name in parameters}
        self.flat: dict[str, int] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.Tensor.__getitem__ and id(args[0]) in self._whole and args[0].dim() == 3 and out.dim() == 2:
            self._slices[id(out)] = out, False
        elif func == TRANSPOSE and id(args[0]) in self._slices:
            self._slices[id(out)] = out, not self._slices[id(args[0])][1]
        elif func in VIEWS and id(args[0]) in self._whole and args[0].dim() == 2 and out.dim() == 3:
            self._whole[id(out)] = out
            name = self._name(out)
            assert name is not None
            self.flat[name] = len(out)
        elif func in PRODUCTS:
            self._note(func, args, kwargs)
        return out

    def _name(self, tensor: Tensor) -> str | None:
        """Name of the parameter whose memory a tensor begins in; several may lie in one storage."""
        storage, start = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
        for name, p in self._named.items():
            inside = p.data_ptr() <= start < p.data_ptr() + p.numel() * p.element_size()
            if inside and p.untyped_storage().data_ptr() == storage:
                return name
        return None

    def _note(self, func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
        product = product_of(func, args, kwargs)
        for tensor in _tensors((args, kwargs)):
            if (name := self._name(tensor)) is None:
                continue
            as_expert = product is not None and tensor is product.weight and id(tensor) in self._slices
            use = func.__name__
            if product and as_expert:
                use = TRANSPOSED if product.transposed != self._slices[id(tensor)][1] else PLAIN
            if func in (torch.bmm, torch.Tensor.bmm) and tensor is args[1]:
                use = TRANSPOSED if tensor.is_contiguous() else PLAIN  # by the parameter itself, or by its transpose
            self.uses[name].add(use)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
