"""Memory that a run needs, by what it does: counted, and the same for the check before a run and for a forecast."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from gptq_awq.calibration.block_inputs import calibration_of, keeps_activations, waiting_bytes
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


@dataclass(frozen=True)
class MemoryModel:
    """Bytes beyond what the process has once the model is loaded.

    Attributes:
        plan: what is asked for.
        model: loaded, or offloaded.
        tokens: calibration data; None where the method looks at none.
        windows: to score.
    """

    plan: Plan
    model: Any
    tokens: TokenSet | None
    windows: Sequence[TokenSet] = ()

    @property
    def calibration(self) -> int:
        """What calibrating and solving allocates at the least, waiting batches' activations not counted."""
        return 0 if self._calibrated is None else max(self._calibrated.most, self._head)

    @property
    def blocks(self) -> int:
        """The block loop, at its most."""
        if self._calibrated is None:
            held = self._largest * self._itemsize if offloaded(self.model) else 0
            return held + memory.SOLVED * max(w.numel() for w in self._matrices) + self._codes
        needed = self._calibrated
        turns = [needed.most + (waiting_bytes(needed) if self._waits else 0)]
        if self.plan.method.block_tunings:
            entered = needed.tokens * needed.hidden * needed.itemsize
            turns.append(needed.lasting + entered + LEARNED * needed.block)
        return max(*turns, self._head) + self._codes + self._teacher

    @property
    def tuning(self) -> int:
        """Of the whole model: a copy, its weights once more for gradients, and a step's activations."""
        if self.tokens is None or not self.plan.method.model_tunings:
            return 0
        dtype, tokens = self.plan.compute_dtype, self.tokens.ids.shape[1]
        edges = 2 * sum(w.shape[0] + w.shape[1] for w in self._matrices)  # norms and products keep theirs, too
        logits = 8 * CHUNK_TOKENS * self.model.config.get_text_config().vocab_size * 4
        copies = (self._numbers + sum(w.numel() for w in self._matrices)) * dtype.itemsize
        return self._codes + self._teacher + copies + logits + max(512, tokens) * edges * dtype.itemsize

    @property
    def scoring(self) -> int:
        """One window on its way; a block or the head, where they come from disk; last hidden states of two models."""
        if not self.windows:
            return 0
        width, longest = self._width, max(text.ids.shape[1] for text in self.windows)
        columns = max(w.shape[1] for w in self._matrices)
        states = sum(text.ids.numel() for text in self.windows) * width * self._itemsize
        ends = (self._numbers - sum(p.numel() for p in self._blocks.parameters())) if offloaded(self.model) else 0
        window = memory.held_bytes(longest, width, columns, self._itemsize)
        return (
            max(ends, self._largest * offloaded(self.model)) * self._itemsize
            + window
            + states * (2 if offloaded(self.model) else 1)
        )

    @cached_property
    def _calibrated(self) -> memory.Calibration | None:
        if self.tokens is None:
            return None
        settings = replace(self.plan.settings, scratch=self.plan.out)  # a run has a place for what spills
        method = self.plan.method
        needed = calibration_of(self.model, self.tokens, settings, method.needs_full)
        together = method.block_transforms or not method.error_propagation
        squares = max(sum(w.shape[1] ** 2 for e in experts_in(b).values() for w in e.weights) for b in self._blocks)
        if not squares:
            return needed
        count, item = self.tokens.ids.numel(), needed.itemsize
        return replace(needed, more=memory.routed_bytes(count, needed.hidden, item, squares if together else 0))

    @property
    def _waits(self) -> bool:
        """Whether batches wait for sites to be solved, and hold what they have made so far."""
        method, settings = self.plan.method, replace(self.plan.settings, scratch=self.plan.out)
        assert self.tokens is not None
        staged = method.error_propagation and method.solver is not None and method.solver.needs_hessian
        return staged and keeps_activations(self.model, self.tokens, settings, True, method.needs_full)

    @property
    def _head(self) -> int:
        return memory.head_bytes(self._head_numbers) if self.plan.method.head == "solve" else 0

    @property
    def _codes(self) -> int:
        """Codes and scales of all blocks, where something wants them in the end."""
        wanted = self.plan.method.model_tunings or (self.plan.exports.formats and not offloaded(self.model))
        size = self.plan.grid.group_size or 0
        group = size if size > 0 else 1 << 10
        return int(sum(w.numel() for w in self._matrices) * (1 + 8 / group)) if wanted else 0

    @property
    def _teacher(self) -> int:
        """What end-to-end tuning learns from: last hidden states, and a copy of what is outside of the blocks."""
        if self.tokens is None or not self.plan.method.model_tunings:
            return 0
        ends = self._numbers - sum(p.numel() for p in self._blocks.parameters())
        return (ends + self.tokens.ids.numel() * self._width) * self.plan.compute_dtype.itemsize

    @cached_property
    def _blocks(self) -> nn.ModuleList:
        return find_blocks(self.model)[1]

    @cached_property
    def _matrices(self) -> list[Any]:
        return [matrix(module) for module in self._blocks.modules() if is_linear(module)]

    @property
    def _largest(self) -> int:
        return max(sum(p.numel() for p in block.parameters()) for block in self._blocks)

    @property
    def _numbers(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def _head_numbers(self) -> int:
        head = self.model.get_output_embeddings()
        return 0 if head is None else head.get_parameter("weight").numel()

    @property
    def _itemsize(self) -> int:
        return next(self.model.parameters()).dtype.itemsize

    @property
    def _width(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]
