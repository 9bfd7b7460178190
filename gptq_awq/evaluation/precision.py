"""Precision of a model's products while it is scored: float32, or a lower dtype with float32 accumulation.

float32 leaves the model unchanged. A lower dtype rounds the operands of the products in linear layers, the output layer
and (in bfloat16 on a CPU that multiplies it natively) causal attention; sums inside a product are float32, as hardware
computes them. The residual stream, norms, nonlinearities and softmax stay in float32. On a CPU with native bfloat16 the
results of products stay float32 too (kernels/product.py); elsewhere they are rounded, as torch does it. Weights are
cast at every call, so there is no second copy of the model in memory.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from gptq_awq.kernels import rank_k
from gptq_awq.kernels.product import packed, product
from gptq_awq.models.attention import attend, attends

Laid = tuple[Tensor, tuple, np.ndarray]
"""A matrix, what its content is known by while it is kept, and the matrix as it is laid out for products."""
FEW_ROWS = 32
"""Fewest rows of a product in the lower dtype: a smaller one takes as long as reading its weights."""


def lowered(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Context in which float32 products are computed in `dtype`; float32 leaves them unchanged."""
    return nullcontext() if dtype == torch.float32 else _LowerProducts(dtype)


def lowered_head(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Context like `lowered` for the output layer, only if results stay float32: a rounded logit is 0.06 off."""
    return _LowerProducts(dtype, shared=4) if _native(dtype) and device.type == "cpu" else nullcontext()


def _native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies `dtype` natively, with results in float32."""
    return dtype == torch.bfloat16 and rank_k.available()


class _LowerProducts(TorchFunctionMode):
    """Replaces F.linear, torch.addmm (GPT-2's layers) and attention of float32 tensors by products in `dtype`.

    Args:
        dtype: of the products' operands.
        shared: matrices that are kept as they were laid out, weights, too; 0: the last input only. A head's parts see
            two models' hidden states in turn, each of both with one part of the weight.
    """

    def __init__(self, dtype: torch.dtype, shared: int = 0) -> None:
        super().__init__()
        self._dtype, self._shared = dtype, shared
        self._native = _native(dtype)
        self._laid: list[Laid] = []  # the one used last comes last

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        if func in (linear, torch.addmm) and not kwargs:
            tensors = [x for x in args if x is not None]
            x = tensors[0] if func is linear else tensors[1]
            if all(t.dtype == torch.float32 for t in tensors) and x.numel() >= FEW_ROWS * x.shape[-1]:
                return self._product(func, args)
        return func(*args, **(kwargs or {}))

    def _product(self, func: Callable, args: tuple[Tensor | None, ...]) -> Tensor:
        """F.linear or torch.addmm in the lower dtype, returned in float32."""
        if not self._native or any(x is not None and x.device.type != "cpu" for x in args):
            return func(*(x if x is None else x.to(self._dtype) for x in args)).float()
        x, weight, bias = args if func is linear else (args[1], args[2].T, args[0])  # pyright: ignore
        assert x is not None
        assert weight is not None
        rows = x.numel() // x.shape[-1]
        right = self._laid_out(weight) if self._shared else _laid_out(weight)
        out = torch.from_numpy(product(self._laid_out(x), rows, right, len(weight)))
        out = out if bias is None else out + bias
        return out.reshape(*x.shape[:-1], len(weight))

    def _laid_out(self, x: Tensor) -> np.ndarray:
        """Pack x for products, reusing what is kept: queries, keys and values share one x, one after the other.

        Other views of the same memory are the same x; it is not used for anything else as long as x is kept, too.
        """
        key = (x.data_ptr(), x._version, x.shape, x.stride())
        found = next((laid for laid in self._laid if laid[1] == key), None)
        if found is None:
            found = x, key, _laid_out(x)
        self._laid = [*(laid for laid in self._laid if laid is not found), found][-max(1, self._shared) :]
        return found[2]

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """Causal attention in bfloat16, if supported natively; else torch's own."""
        if not self._native or not attends(torch.float32, *args, **kwargs):
            return scaled_dot_product_attention(*args, **kwargs)
        q, k, v = (x.bfloat16() for x in args)
        return attend(q, k, v, kwargs.get("scale")).float()


def _laid_out(x: Tensor) -> np.ndarray:
    """The rows of x, as `product` takes them."""
    return packed(x.detach().reshape(-1, x.shape[-1]).contiguous().numpy())
