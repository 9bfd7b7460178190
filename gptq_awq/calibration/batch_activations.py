"""One batch of calibration windows as hidden states between two blocks, and on its way through them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from gptq_awq.calibration.offload import Spilled
from gptq_awq.models.blocks import Call, hidden_of
from gptq_awq.models.walk import Walk


class BatchActivations:
    """Hidden states of one batch of calibration windows between two blocks; mutable, as each block replaces them.

    Attributes:
        number: index of the batch, in the order of the calibration windows; -1 for the probe.
        calls: for each block, its arguments other than the hidden states; of a forward that is walked along, those of
            the block that it has come to.
        mask: True at real tokens; None when all are.
        hidden: hidden states that enter the next block.
        full: hidden states that enter the next block of the full-precision model; None where the method needs none.
        spill: folder of the files that hold the hidden states; None keeps them in memory.
        walk: the model's own forward, where blocks are run within it; None where each is run by itself.
        full_walk: the full-precision model's own forward.
        again: whether it is a later call of a block that the model calls more than once.
    """

    def __init__(
        self,
        number: int,
        hidden: Float[Tensor, "batch tokens width"],
        calls: list[Call],
        mask: Bool[Tensor, "batch tokens"] | None,
        full: Float[Tensor, "batch tokens width"] | None = None,
        spill: Path | None = None,
        walk: Walk | None = None,
        full_walk: Walk | None = None,
    ) -> None:
        self.number, self.calls, self.mask, self.spill = number, calls, mask, spill
        self.walk, self.full_walk, self.again = walk, full_walk, False
        self._returned: dict[bool, Any] = {}  # what the block that a walk waits at returns: quantized, full
        self.hidden, self.full = hidden, full

    @property
    def hidden(self) -> Float[Tensor, "batch tokens width"]:
        """Hidden states that enter the next block, read from their file where they are spilled."""
        return _read(self._hidden)

    @hidden.setter
    def hidden(self, x: Float[Tensor, "batch tokens width"]) -> None:
        self._hidden = self._put(x, "hidden")

    @property
    def full(self) -> Float[Tensor, "batch tokens width"] | None:
        """Hidden states that enter the next block of the full-precision model; None where they are not carried."""
        return None if self._full is None else _read(self._full)

    @full.setter
    def full(self, x: Float[Tensor, "batch tokens width"] | None) -> None:
        self._full = None if x is None else self._put(x, "full")

    def pass_through(self, block: nn.Module, index: int) -> None:
        """Replace the hidden states by the outputs of `block` (number `index`)."""
        output = self.calls[index].whole(block, self.hidden)
        self.hidden = hidden_of(output)
        if self.walk is not None:
            self._returned[False] = output

    def pass_full_through(self, block: nn.Module, index: int) -> None:
        """Replace the full-precision hidden states by the outputs of `block` (number `index`), in full precision."""
        assert self.full is not None
        call = self.calls[index] if self.full_walk is None else self.full_walk.call
        output = call.whole(block, self.full)
        self.full = hidden_of(output)
        if self.full_walk is not None:
            self._returned[True] = output

    def enter(self, index: int) -> bool:
        """Go on to block `index`; false where the model does not call it."""
        if self.walk is None:
            return True
        dtype = self.hidden.dtype
        if not self.walk.go_to(index, dtype, self._returned.pop(False, None)):
            return False
        self.calls, self.hidden = [*([Call()] * index), self.walk.call], self.walk.hidden.to(dtype)
        if self.full_walk is not None:
            self.full_walk.go_to(index, dtype, self._returned.pop(True, None))
            self.full = self.full_walk.hidden.to(dtype)
        return True

    def finish(self) -> Iterator[Any]:
        """Walk to the end of the quantized model's forward, and of full precision's; yields the output of each."""
        for walk, full in ((self.walk, False), (self.full_walk, True)):
            if walk is not None:
                walk.go_to(sys.maxsize, self.hidden.dtype, self._returned.pop(full, None))
                yield walk.output

    def later(self, index: int, step: int) -> Iterator["BatchActivations"]:
        """Inputs of all later calls of block `index`, each as a batch; their numbers are `step` apart."""
        if self.walk is None:
            return
        dtype = self.hidden.dtype
        fulls = self.full_walk.later_calls(index, dtype) if self.full_walk else []
        for i, (hidden, call) in enumerate(self.walk.later_calls(index, dtype)):
            calls, full = [*([Call()] * index), call], fulls[i][0] if fulls else None
            batch = BatchActivations(self.number + step * (i + 1), hidden, calls, self.mask, full)
            batch.again = True
            yield batch

    def _put(self, x: Tensor, name: str) -> Tensor | Spilled:
        return x if self.spill is None else Spilled.of(x, self.spill / f"{self.number:06d}-{name}")


def _read(states: Tensor | Spilled) -> Tensor:
    return states.read() if isinstance(states, Spilled) else states
