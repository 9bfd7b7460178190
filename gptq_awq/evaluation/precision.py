"""In what precision a decoder computes while it is scored.

`float32` leaves the model as it is. A lower dtype rounds what enters each linear layer, and its weights and output, to
that dtype; sums inside of the product are float32, as hardware does them. All else stays as it is: the residual
stream, norms, attention, activations, the output layer. (Autocast also rounds activations and attention, for no more
speed on a CPU: its KL from float32 is a third higher.) Weights are cast at every call: 0.4% of the time of a window of
2048 tokens of SmolLM2-135M, 2% of lm-eval's short batches, and no second copy of the model in memory.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

FEW_ROWS = 32
"""A product of fewer rows takes as long as reading its weights, and is left alone."""


def lowered(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Within: linear layers multiply in `dtype`; float32: as they are."""
    return nullcontext() if dtype == torch.float32 else _LowerProducts(dtype)


class _LowerProducts(TorchFunctionMode):
    """Answers F.linear and torch.addmm (GPT-2's layers) of float32 tensors with products in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (linear, torch.addmm) and not kwargs:
            tensors = [x for x in args if x is not None]
            x = tensors[0] if func is linear else tensors[1]
            if all(t.dtype == torch.float32 for t in tensors) and x.numel() >= FEW_ROWS * x.shape[-1]:
                return self._product(func, args)
        return func(*args, **(kwargs or {}))

    def _product(self, func: Callable, args: tuple[Tensor | None, ...]) -> Tensor:
        return func(*(x if x is None else x.to(self._dtype) for x in args)).float()
