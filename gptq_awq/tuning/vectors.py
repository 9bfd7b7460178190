"""Norms and biases that learn in float32, while forwards run on a copy of the model in compute dtype."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Vectors:
    """A module's one-dimensional parameters as float32 masters, and those of the copy that forwards run on.

    Attributes:
        masters: name → float32 tensor that learns.
    """

    def __init__(self, copied: nn.Module, module: nn.Module) -> None:
        own = dict(module.named_parameters())
        self._shown = {n: p.requires_grad_(True) for n, p in copied.named_parameters() if p.dim() == 1 and n in own}
        self.masters: dict[str, Tensor] = {n: own[n].detach().float().clone() for n in self._shown}

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Step `optimizer` at `rate` times each group's `largest` learning rate, and update the copy's vectors."""
        for name, vector in self._shown.items():
            self.masters[name].grad = None if vector.grad is None else vector.grad.float()
            vector.grad = None
        for group in optimizer.param_groups:
            group["lr"] = group["largest"] * rate
        optimizer.step()
        optimizer.zero_grad()
        for name, vector in self._shown.items():
            vector.copy_(self.masters[name])

    @torch.no_grad()
    def write(self, module: nn.Module) -> None:
        """Write the learned vectors into the module."""
        own: Mapping[str, Any] = dict(module.named_parameters())
        for name, master in self.masters.items():
            own[name].copy_(master)
