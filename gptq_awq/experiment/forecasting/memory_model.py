"""Memory that a run needs, counted by what it does: for the check before a run and for its forecast."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from gptq_awq.calibration.block_inputs import Settings, calibration_of, keeps_activations, waiting_bytes
from gptq_awq.data.tokens import TokenSet
from gptq_awq.experiment.plan import Plan
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.experts import experts_in
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.models.offload import offloaded
from gptq_awq.runtime import memory
from gptq_awq.tuning.distill import CHUNK_TOKENS

LEARNED = 36
"""Bytes of a weight whose rounding is learned: latent, gradient, Adam's moments, zero, original, weight, code."""
HEAD = 27
"""Bytes of a weight of an output head that is solved, at most: measured, GPTQ with a range search."""


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that a run needs beyond those of the process once the model is loaded.

    Attributes:
        plan: what is asked for.
        model: the model, loaded or offloaded.
        tokens: calibration data; None where the method looks at none.
        windows: texts to score.
    """

    plan: Plan
    model: Any
    tokens: TokenSet | None
    windows: Sequence[TokenSet] = ()

    @property
    def calibration(self) -> int:
        """Bytes of calibrating and solving, without the activations of waiting batches: the least that will do."""
        return 0 if self._calibration is None else max(self._calibration.most, self._head)

    @property
    def blocks(self) -> int:
        """Peak bytes of the block loop."""
        if self._calibration is None:
            held = self._largest * self._itemsize if offloaded(self.model) else 0
            return held + memory.SOLVED * max(w.numel() for w in self._matrices) + self._codes
        needed = self._calibration
        most = needed.most + (waiting_bytes(needed) if self._waits else 0)
        if self.plan.method.block_tunings:
            entered = needed.tokens * needed.hidden * needed.itemsize
            most = max(most, needed.lasting + entered + LEARNED * needed.block)
        return max(most, self._head) + self._codes + self._teacher

    @property
    def tuning(self) -> int:
        """Peak bytes of tuning the whole model: a copy, its gradients, and a step's activations and logits."""
        if self.tokens is None or not self.plan.method.model_tunings:
            return 0
        dtype, tokens = self.plan.compute_dtype, self.tokens.ids.shape[1]
        edges = 2 * sum(w.shape[0] + w.shape[1] for w in self._matrices)  # norms and products keep theirs, too
        logits = 8 * CHUNK_TOKENS * self.model.config.get_text_config().vocab_size * 4
        copies = (_numbers(self.model) + self._weights) * dtype.itemsize
        return self._codes + self._teacher + copies + logits + max(512, tokens) * edges * dtype.itemsize

    @property
    def scoring(self) -> int:
        """Peak bytes of scoring: a window, last hidden states, and a block or the head where they come from disk."""
        if not self.windows:
            return 0
        width, longest = self._width, max(text.ids.shape[1] for text in self.windows)
        window = memory.held_bytes(longest, width, max(w.shape[1] for w in self._matrices), self._itemsize)
        states = sum(text.ids.numel() for text in self.windows) * width * self._itemsize
        if not offloaded(self.model):
            return window + states
        return max(self._outside, self._largest) * self._itemsize + window + 2 * states  # of both models

    @cached_property
    def _calibration(self) -> memory.Calibration | None:
        if self.tokens is None:
            return None
        method = self.plan.method
        needed = calibration_of(self.model, self.tokens, self._settings, method.needs_full)
        together = method.block_transforms or not method.error_propagation
        squares = max(sum(w.shape[1] ** 2 for e in experts_in(b).values() for w in e.weights) for b in self._blocks)
        if not squares:
            return needed
        count, item = self.tokens.ids.numel(), needed.itemsize
        return replace(needed, more=memory.routed_bytes(count, needed.hidden, item, squares if together else 0))

    @property
    def _settings(self) -> Settings:
        return replace(self.plan.settings, scratch=self.plan.out)  # a run has a place for what spills

    @property
    def _waits(self) -> bool:
        """Whether batches wait for sites to be solved, and hold their activations meanwhile."""
        method = self.plan.method
        assert self.tokens is not None
        staged = method.error_propagation and method.solver is not None and method.solver.needs_hessian
        return staged and keeps_activations(self.model, self.tokens, self._settings, True, method.needs_full)

    @property
    def _head(self) -> int:
        """Bytes of solving the output head; blocks' copies and waiting batches are gone by then."""
        head = self.model.get_output_embeddings()
        if head is None or self.plan.method.head != "solve":
            return 0
        return HEAD * head.get_parameter("weight").numel()

    @property
    def _codes(self) -> int:
        """Bytes of codes and scales of all blocks, where tuning or a checkpoint needs them in the end."""
        wanted = self.plan.method.model_tunings or (self.plan.exports.formats and not offloaded(self.model))
        size = self.plan.grid.group_size or 0
        return int(self._weights * (1 + 8 / (size if size > 0 else 1 << 10))) if wanted else 0

    @property
    def _teacher(self) -> int:
        """Bytes of a `Teacher`: last hidden states, and a copy of the model's parts outside of the blocks."""
        if self.tokens is None or not self.plan.method.model_tunings:
            return 0
        return (self._outside + self.tokens.ids.numel() * self._width) * self.plan.compute_dtype.itemsize

    @cached_property
    def _blocks(self) -> nn.ModuleList:
        return find_blocks(self.model)[1]

    @cached_property
    def _matrices(self) -> list[Any]:
        return [matrix(module) for module in self._blocks.modules() if is_linear(module)]

    @property
    def _weights(self) -> int:
        return sum(w.numel() for w in self._matrices)

    @property
    def _largest(self) -> int:
        return max(map(_numbers, self._blocks))

    @property
    def _outside(self) -> int:
        return _numbers(self.model) - _numbers(self._blocks)

    @property
    def _itemsize(self) -> int:
        return next(self.model.parameters()).dtype.itemsize

    @property
    def _width(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]


def _numbers(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())
