"""End-to-end tuning of scales and norms: the last step of EfficientQAT (Chen et al., arXiv 2407.11062, sec. 3.3).

With every code fixed, the step sizes s of all linears and the model's vectors (norms, biases) learn together:

    min over s, norms of  mean over calibration tokens of  KL( p_full-precision ‖ p_quantized )

The paper minimises the next-token loss on thousands of windows; the divergence from the full-precision model says far
more per token (a whole distribution, not one word), so a few passes over the calibration set suffice. Adam on δ = log s
changes all scales by about the same fraction a step. One number per group learns, 64 times fewer than weights: this is
why it generalises from a few thousand tokens, where learning the codes this way does not (docs/methods/distill.md).
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.kernels.divergence import divergence_and_gradient
from gptq_awq.kernels.numbers import NUMBERS
from gptq_awq.models.attention import differentiable_attention
from gptq_awq.models.decoder_head import logits
from gptq_awq.models.linear import matrix
from gptq_awq.runtime.options import Fraction, NonNegative, PositiveInt, Seed, checked_dataclass
from gptq_awq.runtime.progress import Track
from gptq_awq.tuning.linear import check_scales, rescaled, scale_rates, tuned_linears
from gptq_awq.tuning.passes import first_and_last, shuffled
from gptq_awq.tuning.teacher import Teacher, inputs_of, tuned_decoder
from gptq_awq.tuning.vectors import Vectors

CHUNK_TOKENS = 128
"""Positions whose logits are computed at a time: 25 MB in float32 for a vocabulary of 49152."""
BETAS = 0.9, 0.95


@checked_dataclass
class Distill:
    """Distill: scales, norms and biases tuned end to end against the full-precision model's predictions.

    Attributes:
        epochs: passes over the calibration set.
        tokens_per_step: tokens per optimizer step, in whole windows, at least one.
        scale_lr: how far one step of a scale moves the last code at most, in codes: the scale changes by the fraction
            scale_lr / 2^b. The rate rises over `warmup` and falls to 0.
        vector_lr: largest change of a norm's or bias's entry in one step.
        warmup: fraction of the steps over which the rate rises.
        seed: seed of the order of windows.

    Raises:
        UserError: a value out of range.
    """

    epochs: NonNegative = 2.0
    tokens_per_step: PositiveInt = 512
    scale_lr: NonNegative = 0.04
    vector_lr: NonNegative = 1e-3
    warmup: Fraction = 0.1
    seed: Seed = 0
    name: str = "distill"

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid whose scales cannot be tuned."""
        check_scales(grid, "method.tuning.distill")

    def apply(
        self,
        model: nn.Module,
        weights: Mapping[str, QuantizedWeight],
        teacher: Teacher,
        tokens: TokenSet,
        track: Track,
    ) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
        """Tune a quantized model's scales, norms and biases in place.

        Args:
            model: quantized model, whose linears hold the dequantized `weights`.
            weights: quantized weights of all linears to tune, by full name.
            teacher: full-precision predictions to learn from.
            tokens: calibration tokens, the same that the teacher was built from.
            track: reports progress.

        Returns:
            The rescaled weights, and for the ledger the mean KL of the first and of the last pass.

        Raises:
            UserError: the loss has gradients that are not finite.
        """
        student = _Student(model, weights, teacher.dtype)
        windows = max(1, self.tokens_per_step // tokens.ids.shape[1])
        steps = round(self.epochs * len(tokens.ids) / windows)
        optimizer = student.optimizer(self.scale_lr, self.vector_lr)
        losses = []
        order = shuffled(len(tokens.ids), windows, steps, self.seed)
        for step, rows in enumerate(track(order, "tune (distill)", steps)):
            losses.append(student.learn(rows, teacher, tokens))
            rate = min(1.0, (step + 1) / max(1, self.warmup * steps)) * (1 - step / steps)
            student.step(optimizer, rate)
        if not losses:
            return student.write(model), {}
        first, last = first_and_last(losses, max(1, round(len(tokens.ids) / windows)))
        return student.write(model), {"steps": steps, "kl_first_pass": first, "kl_last_pass": last}


class _Student:
    """A copy of the quantized model in compute dtype, whose scales and vectors learn in float32."""

    def __init__(self, model: nn.Module, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> None:
        self._model = copy.deepcopy(model).to(dtype).requires_grad_(False)
        self._decoder = tuned_decoder(self._model)
        self._linears = tuned_linears(self._model, weights)
        self._weights = weights
        self._vectors = Vectors(self._model, model)
        self._template = None

    def optimizer(self, scale_lr: float, vector_lr: float) -> torch.optim.Optimizer:
        """Build Adam over scales and vectors; each parameter group's `largest` is its largest learning rate."""
        scales = scale_rates(self._linears, self._weights, scale_lr)
        vectors = {"params": list(self._vectors.masters.values()), "largest": vector_lr}
        return torch.optim.Adam([*scales, vectors], lr=0.0, betas=BETAS, eps=1e-12)

    def learn(self, rows: Int[Tensor, "windows"], teacher: Teacher, tokens: TokenSet) -> float:
        """Compute the mean KL on some windows, and add its gradients to the parameters'."""
        device = next(self._model.parameters()).device
        with differentiable_attention(teacher.dtype):
            out = self._decoder(**inputs_of(tokens, rows, device), use_cache=False)
        self._template = out
        mask = None if tokens.mask is None else tokens.mask[rows].to(device)
        hidden, target = out["last_hidden_state"], teacher.hidden[rows]
        hidden, target = (x.flatten(0, 1) if mask is None else x[mask] for x in (hidden, target))
        loss, grad = self._divergence(hidden, target, teacher)
        if not torch.isfinite(grad).all():
            raise UserError("method.tuning.distill: the loss is not finite; lower scale_lr and vector_lr")
        hidden.backward(grad)
        return loss

    def _divergence(self, hidden: Tensor, target: Tensor, teacher: Teacher) -> tuple[float, Tensor]:
        """Mean KL over tokens and its gradient in the hidden states, with the logits of a few tokens at a time."""
        total, grads = 0.0, []
        for start in range(0, len(hidden), CHUNK_TOKENS):
            part = hidden[start : start + CHUNK_TOKENS].detach().requires_grad_()
            with torch.no_grad():
                full = teacher.logits(target[start : start + CHUNK_TOKENS])
            own = logits(self._model, self._decoder, self._template, part[None])[0]  # pyright: ignore[reportArgumentType]
            kl, gradient = summed_kl(own.detach(), full)
            own.backward(gradient)
            grads.append(part.grad)
            total += kl
        return total / len(hidden), torch.cat(grads) / len(hidden)

    def step(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Take one optimizer step at `rate` times the largest learning rates, and clear the gradients."""
        self._vectors.step(optimizer, rate)

    @torch.no_grad()
    def write(self, model: nn.Module) -> dict[str, QuantizedWeight]:
        """Write tuned scales, norms and biases into the model, and return the rescaled weights."""
        tuned = {}
        for name, linear in self._linears.items():
            tuned[name] = rescaled(self._weights[name], linear.delta)
            matrix(model.get_submodule(name)).copy_(tuned[name].dequantize())
        self._vectors.write(model)
        return tuned


def summed_kl(
    own: Float[Tensor, "tokens words"], full: Float[Tensor, "tokens words"]
) -> tuple[float, Float[Tensor, "tokens words"]]:
    """Sum over tokens of KL(p‖q), p from full-precision logits and q from `own`, and its gradient q - p in those."""
    if own.device.type == "cpu" and own.dtype == full.dtype and own.dtype in NUMBERS:
        kl, gradient, kind = np.empty(len(own)), torch.empty(own.shape, dtype=own.dtype), NUMBERS[own.dtype]
        q, p, written = (x.contiguous().view(kind).numpy() for x in (own, full, gradient))
        divergence_and_gradient(q, p, own.dtype == torch.bfloat16, kl, written)
        return float(kl.sum()), gradient
    log_p, log_q = full.float().log_softmax(-1), own.float().log_softmax(-1)
    p = log_p.exp()
    return float((p * (log_p - log_q)).sum()), log_q.exp_().sub_(p).to(own.dtype)
