"""Learned rounding, block by block: SignRound (Cheng et al., arXiv 2309.05516), started from the solver's codes.

Every weight has a latent u in code units, u = w / s + z at first, and rounds to ⌊u⌉; scales learn too, s exp(δ):

    Ŵ = s exp(δ) (clip(⌊u⌉, 0, 2^b - 1) - z),    min over u, δ of ‖block(X̃; Ŵ) - block_full-precision(X)‖²

with the straight-through estimator ∂L/∂u = s G, G = ∂L/∂Ŵ. SignRound starts from u = w / s + z, that is from
rounding to nearest. Here u starts inside of the cell of the code that the solver chose, at the point nearest to w but
no closer to an edge than `margin`: with rtn as the solver and margin 0 that is SignRound, with gptq it goes on from
GPTQ.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.models.attention import differentiable_attention
from gptq_awq.models.blocks import Call, call_of_windows
from gptq_awq.models.linear import matrix
from gptq_awq.runtime.options import NonNegative, PositiveInt, Seed, checked_dataclass
from gptq_awq.tuning.base import Example
from gptq_awq.tuning.linear import ColumnGroups, check_scales, rescaled, scale_rates
from gptq_awq.tuning.passes import first_and_last, shuffled
from gptq_awq.tuning.vectors import Vectors


@checked_dataclass
class LearnedRounding:
    """Learned rounding: a block's codes and scales, learned by gradients of its output error.

    Attributes:
        epochs: passes over the calibration set.
        tokens_per_step: tokens per optimizer step, in whole windows, at least one.
        rounding_lr: largest change of a latent in one step, in code units; it falls to 0 linearly.
        scale_lr: how far one step of a scale moves the last code at most, in codes: see `Distill`.
        vector_lr: largest change of a norm's or bias's entry in one step.
        margin: least distance between a latent's start and the edges of its code's cell, in code units, below 0.5.
        optimizer: "sign" (SignSGD, as in SignRound) or "adam".
        seed: seed of the order of windows.

    Raises:
        UserError: a value out of range.
    """

    epochs: NonNegative = 4.0
    tokens_per_step: PositiveInt = 1024
    rounding_lr: NonNegative = 0.01
    scale_lr: NonNegative = 0.016
    vector_lr: NonNegative = 0.0
    margin: Annotated[float, Interval(ge=0, lt=0.5)] = 0.1
    optimizer: Literal["sign", "adam"] = "adam"
    seed: Seed = 0
    name: str = "rounding"

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid other than uniform integer codes with scales that can be tuned."""
        if grid.arithmetic.kind != "affine":
            raise UserError(f"method.tuning.rounding: learns codes of uniform grids only, not of grid={grid.label}")
        check_scales(grid, "method.tuning.rounding")

    @torch.enable_grad()
    def apply_block(
        self,
        block: nn.Module,
        weights: Mapping[str, QuantizedWeight],
        originals: Mapping[str, Float[Tensor, "out in"]],
        examples: Sequence[Example],
    ) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
        """Learn one block's codes and scales, and with `vector_lr` its norms and biases, in place.

        Returns:
            The tuned weights, and for the ledger the steps, the relative output error of the first and of the last
            pass, and the share of codes that changed.

        Raises:
            UserError: calibration data with padding.
        """
        if any(e.mask is not None for e in examples):
            raise UserError("method.tuning.rounding: learns from unpadded windows only; choose data.packing=windows")
        windows = [
            _Window(x, y, e.call, row, len(e.inputs))
            for e in examples
            for row, (x, y) in enumerate(zip(e.inputs, e.targets, strict=True))
        ]
        per_step = max(1, self.tokens_per_step // examples[0].inputs.shape[1])
        steps = round(self.epochs * len(windows) / per_step)
        student = _StudentBlock(block, weights, originals, examples[0].inputs.dtype, self.margin)
        optimizer = student.optimizer(self.rounding_lr, self.scale_lr, self.vector_lr, self.optimizer)
        losses = []
        for step, rows in enumerate(shuffled(len(windows), per_step, steps, self.seed)):
            losses.append(student.learn([windows[i] for i in rows.tolist()]))
            student.step(optimizer, 1 - step / steps)
        tuned, changed = student.write(block)
        return tuned, _details(losses, per_step, len(windows)) | {"codes_changed": changed}


def _details(losses: list[float], per_step: int, windows: int) -> dict[str, Any]:
    if not losses:
        return {"steps": 0}
    first, last = first_and_last(losses, max(1, windows // per_step))
    return {"steps": len(losses), "error_first_pass": first, "error_last_pass": last}


@dataclass(frozen=True)
class _Window:
    """One calibration window at the block: hidden states that enter and shall leave it, and where its arguments are.

    Attributes:
        call: arguments of the window's batch, which has it as this `row` of its `size` windows.
    """

    input: Float[Tensor, "tokens width"]
    target: Float[Tensor, "tokens width"]
    call: Call
    row: int
    size: int


class _Rounded(Function):
    """Autograd function X Ŵᵀ, with the straight-through gradient in u and the gradient in δ (module docstring)."""

    @staticmethod
    def forward(ctx, x: Tensor, latent: Tensor, delta: Tensor, layer: "RoundedLinear") -> Tensor:
        W = layer.weight(latent, delta).to(x.dtype)
        ctx.save_for_backward(x, W, delta)
        ctx.layer = layer
        return x @ W.T

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, W, delta = ctx.saved_tensors
        (g,), layer = grads, ctx.layer
        G = (g.flatten(0, -2).T @ x.flatten(0, -2)).float()
        grad_delta = layer.groups.sums(G * W)
        grad_latent = layer.groups.times(G, layer.scales * delta.exp())
        return g @ W if ctx.needs_input_grad[0] else None, grad_latent, grad_delta, None


class RoundedLinear(nn.Module):
    """Replacement of a linear while its rounding is learned.

    Attributes:
        latent: u, (out, in) float32.
        delta: δ, (out, groups) float32.
    """

    def __init__(self, linear: nn.Module, weight: QuantizedWeight, original: Tensor, margin: float) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = linear.bias  # pyright: ignore[reportAttributeAccessIssue]
        self.groups, self.scales = ColumnGroups(weight), weight.scales.float()
        self.max_code = weight.grid.arithmetic.max_code
        self._zeros = self.groups.times(torch.ones_like(original), weight.zeros.float())
        codes, room = weight.codes.float(), 0.5 - max(margin, 1e-3)
        u = self.groups.times(original, 1 / self.scales) + self._zeros
        self.latent = nn.Parameter(torch.minimum(torch.maximum(u, codes - room), codes + room))
        self.delta = nn.Parameter(torch.zeros_like(self.scales))

    def codes(self, latent: Tensor) -> Tensor:
        """Codes ⌊u⌉ of the latents, clipped to the grid's range."""
        return latent.round().clamp_(0, self.max_code)

    def weight(self, latent: Tensor, delta: Tensor) -> Tensor:
        """Dequantized weight Ŵ of these latents u and log-scale steps δ."""
        return self.groups.times(self.codes(latent).sub_(self._zeros), self.scales * delta.exp())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Output of the linear with its codes and scales as learned so far."""
        out = _Rounded.apply(x, self.latent, self.delta, self)
        return out if self.bias is None else out + self.bias


class _StudentBlock:
    """A copy of a block in compute dtype, whose latents, scales and vectors learn in float32."""

    def __init__(
        self,
        block: nn.Module,
        weights: Mapping[str, QuantizedWeight],
        originals: Mapping[str, Tensor],
        dtype: torch.dtype,
        margin: float,
    ) -> None:
        self._block = copy.deepcopy(block).to(dtype).requires_grad_(False)
        self._weights = weights
        self._linears: dict[str, RoundedLinear] = {}
        for name, weight in weights.items():
            parent, _, last = name.rpartition(".")
            linear = RoundedLinear(self._block.get_submodule(name), weight, originals[name], margin)
            setattr(self._block.get_submodule(parent), last, linear)
            self._linears[name] = linear
        self._vectors = Vectors(self._block, block)

    def optimizer(self, rounding: float, scale: float, vector: float, kind: str) -> torch.optim.Optimizer:
        """Build the optimizer of latents, scales and vectors; each parameter group's `largest` is its largest step."""
        groups = [
            {"params": [linear.latent for linear in self._linears.values()], "largest": rounding},
            *scale_rates(self._linears, self._weights, scale),
            {"params": list(self._vectors.masters.values()), "largest": vector},
        ]
        if kind == "sign":
            return _SignSGD([g for g in groups if g["largest"]])
        return torch.optim.Adam([g for g in groups if g["largest"]], lr=0.0, betas=(0.9, 0.95), eps=1e-15)

    def learn(self, chosen: Sequence["_Window"]) -> float:
        """Compute the relative output error of some windows, and add its numerator's gradients to the parameters'."""
        x, y = torch.stack([w.input for w in chosen]), torch.stack([w.target for w in chosen]).float()
        call = call_of_windows([(w.call, w.row, w.size) for w in chosen])
        with differentiable_attention(x.dtype):
            out = call.run(self._block, x).float()
        loss = (out - y).square().mean()
        loss.backward()
        return float(loss.detach() / y.square().mean())

    def step(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Take one optimizer step at `rate` times the largest steps, and clear the gradients."""
        self._vectors.step(optimizer, rate)
        with torch.no_grad():
            for linear in self._linears.values():  # codes are clipped beyond this range: keep latents from straying
                linear.latent.clamp_(-0.5, linear.max_code + 0.5)

    @torch.no_grad()
    def write(self, block: nn.Module) -> tuple[dict[str, QuantizedWeight], float]:
        """Write what was learned into the block; returns the weights and the share of codes that changed."""
        tuned, changed, total = {}, 0, 0
        for name, linear in self._linears.items():
            codes = linear.codes(linear.latent).to(torch.uint8)
            changed, total = changed + int((codes != self._weights[name].codes).sum()), total + codes.numel()
            tuned[name] = rescaled(replace(self._weights[name], codes=codes), linear.delta)
            matrix(block.get_submodule(name)).copy_(tuned[name].dequantize())
        self._vectors.write(block)
        return tuned, changed / max(1, total)


class _SignSGD(torch.optim.Optimizer):
    """SignSGD: each step moves every parameter by lr against the sign of its gradient."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])
