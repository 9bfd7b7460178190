"""Fused experts as linears: one nn.Linear per slice of a fused parameter, and back.

transformers keeps the experts of a mixture as parameters such as `experts.gate_up_proj` (experts, 2 I, H), and its
eager forward multiplies by one slice at a time: `F.linear(x, self.gate_up_proj[e])`, or `x @ self.gate_up_proj[e]`
where the layout is transposed. `unfuse` puts an `Experts`, a list of linears, in the parameter's place; their weights
are views of its slices. The forward stays the module's own: indexing an `Experts` gives a stand-in for the slice, and a
product with it calls the linear, so hooks fire, and everything that looks for linears finds them. A parameter with two
dimensions (DBRX) holds its experts one below the other, and its forward views it as three.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptq_awq.errors import UserError
from gptq_awq.models.expert_layouts import Layout, product_of


class Experts(nn.ModuleList):
    """The slices of a fused parameter as linears; a forward indexes it as it indexed the parameter.

    Args:
        fused: (experts, out, in), or (experts, in, out) where it is transposed; (experts · out, in) where it is flat.
        layout: how the forward uses it.
    """

    def __init__(self, fused: Float[Tensor, "..."], layout: Layout) -> None:
        stacked = fused if layout.flat is None else fused.unflatten(0, (layout.flat, -1))
        outs, ins = (2, 1) if layout.transposed else (1, 2)
        size = {"in_features": stacked.shape[ins], "out_features": stacked.shape[outs]}
        super().__init__(nn.Linear(**size, bias=False, device="meta") for _ in stacked)
        self.transposed, self.flat = layout.transposed, layout.flat is not None
        self.take(fused)

    def take(self, fused: Float[Tensor, "..."]) -> None:
        """Make the linears' weights views of `fused`, in its dtype and on its device.

        Raises:
            ValueError: `fused` has another shape.
        """
        expected = self.shape
        if fused.shape != expected:
            raise ValueError(f"experts of shape {tuple(fused.shape)} for a list of {tuple(expected)}")
        for linear, weight in zip(self._linears(), self.slices(fused), strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def slices(self, fused: Float[Tensor, "..."]) -> list[Float[Tensor, "out in"]]:
        """Views of a fused tensor as the linears' weights."""
        stacked = fused.detach().unflatten(0, (len(self), -1)) if self.flat else fused.detach()
        return [weight.T if self.transposed else weight for weight in stacked]

    def stacked(self, weights: Sequence[Float[Tensor, "out in"]]) -> Float[Tensor, "..."]:
        """A fused tensor of the linears' weights, or of tensors like them; the inverse of `slices`."""
        return (torch.cat if self.flat else torch.stack)([w.T if self.transposed else w for w in weights])

    def fused(self) -> Float[Tensor, "..."]:
        """The fused parameter: a view of the linears' storage where they share one, else a copy."""
        slices = [weight.data.T if self.transposed else weight.data for weight in self.weights]
        first, size = slices[0], slices[0].numel()
        storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
        together = first.is_contiguous() and all(
            s.untyped_storage().data_ptr() == storage and s.storage_offset() == offset + e * size
            for e, s in enumerate(slices)
        )
        if together and storage:
            stacked = first.as_strided((len(slices), *first.shape), (size, *first.stride()), offset)
            return stacked.flatten(0, 1) if self.flat else stacked
        return self.stacked([weight.data for weight in self.weights])

    @property
    def shape(self) -> torch.Size:
        """Shape of the fused parameter, from which forwards read the number of experts."""
        rows, columns = self.weights[0].T.shape if self.transposed else self.weights[0].shape
        return torch.Size((len(self) * rows, columns) if self.flat else (len(self), rows, columns))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.weights[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weights[0].device

    @property
    def weights(self) -> list[nn.Parameter]:
        """Weights of the linears, (out, in) each."""
        return [linear.weight for linear in self._linears()]  # pyright: ignore[reportReturnType]

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Multiply a batch of inputs, one of each expert, as `torch.bmm(x, fused)` does."""
        if func not in (torch.bmm, torch.Tensor.bmm) or kwargs or not isinstance(args[1], cls):
            raise UserError(f"model: experts' weights were seen in products of one kind, now in {func.__name__}")
        return torch.stack([linear(x) for linear, x in zip(args[1]._linears(), args[0], strict=True)])

    def transpose(self, *_dims: int) -> "Experts":
        """Stand-in for the parameter's transpose in `torch.bmm(x, fused.transpose(1, 2))`."""
        return self

    def view(self, *_shape: Any) -> "Experts":
        """Stand-in for the view of a flat parameter as three dimensions."""
        return self

    reshape = view

    def _linears(self) -> list[nn.Module]:
        return list(self._modules.values())  # pyright: ignore[reportReturnType]

    def __getitem__(self, index: Any) -> Any:
        """Stand-in for one expert's slice of the parameter; a slice object gives linears, as in any list."""
        if isinstance(index, slice):
            return self._linears()[index]
        return _Slice(self._linears()[int(index)], self.transposed)


@dataclass(frozen=True)
class _Slice:
    """Stand-in for one expert's matrix in a forward: a product with it calls the expert's linear."""

    linear: nn.Module
    transposed: bool

    @property
    def T(self) -> "_Slice":
        """Stand-in for the matrix's transpose."""
        return _Slice(self.linear, not self.transposed)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        product = product_of(func, args, kwargs or {})
        weight = product.weight if product else None
        if product is None or not isinstance(weight, cls) or product.transposed != weight.transposed:
            raise UserError(f"model: an expert's weight was seen in products of one kind, now it is in {func.__name__}")
        out = weight.linear(product.x)
        return out if product.bias is None else out + product.bias


def experts_in(module: nn.Module) -> dict[str, Experts]:
    """Unfused experts in a module, by name of the fused parameter that they replace."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Experts)}


def fuse(model: nn.Module) -> None:
    """Fuse the experts of a model again, in place, as transformers saves and loads them; the inverse of `unfuse`."""
    for name, experts in experts_in(model).items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        del owner._modules[attribute]
        setattr(owner, attribute, nn.Parameter(experts.fused(), requires_grad=False))


@contextmanager
def fused_in_name(model: nn.Module) -> Iterator[None]:
    """Context in which the model has a parameter without data for each `Experts`, where transformers asks its shape."""
    owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in experts_in(model)]
    for owner, name in owners:
        shape = owner._modules[name].shape  # pyright: ignore[reportOptionalMemberAccess]
        owner._parameters[name] = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)  # pyright: ignore[reportArgumentType,reportCallIssue]
    try:
        yield
    finally:
        for owner, name in owners:
            del owner._parameters[name]


def fused_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the tensors that are named after experts' linears into fused ones; other tensors stay as they are."""
    fused = dict(tensors)
    for name, experts in experts_in(model).items():
        if f"{name}.0.weight" not in tensors:  # experts of another block
            continue
        slices = [fused.pop(f"{name}.{e}.weight") for e in range(len(experts))]
        fused[name] = experts.stacked(slices)
    return fused


def holder(block: nn.Module, owner: str) -> str:
    """Name of the outermost module of a block that holds those experts, and nothing else that has parameters."""
    while "." in owner:
        above = owner.rpartition(".")[0]
        within = {id(p) for p in block.get_submodule(owner).parameters()}
        if any(id(p) not in within for p in block.get_submodule(above).parameters()):
            break
        owner = above
    return owner
