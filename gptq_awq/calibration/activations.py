"""Activations: the calibration data as it flows from block to block.

A batch is one batch of calibration windows as hidden states, with the arguments every block wants beside
them. The states live in the compute dtype; blocks put new ones in place of the old ones, which nobody changes.

Methods that compare the quantized model with full precision (`Method.needs_full`) have the latter's hidden states
beside. Before block k is solved, `hidden` is what the quantized model feeds it and `full` what full precision does;
afterwards both are its outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gptq_awq.calibration.offload import Spilled
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.models.attention import faster_attention_of
from gptq_awq.models.blocks import PROBE_TOKENS, BlockCalls, Call, text_config
from gptq_awq.models.offload import resident
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.runtime.profiling import phase
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.checksummed import DamagedError
from gptq_awq.storage.journal import Journal


class BatchActivations:
    """One batch on its way through the model (the one mutable value of the pipeline).

    Attributes:
        number: of the batch, in the order of the calibration windows; -1: the probe.
        calls: the other arguments of every block.
        mask: True at real tokens; None when all are.
        hidden: what enters the next block.
        full: what enters it in the full-precision model; None where no one asks.
        spill: the folder that hidden states lie in; None: in memory.
    """

    def __init__(
        self,
        number: int,
        hidden: Float[Tensor, "batch tokens width"],
        calls: list[Call],
        mask: Bool[Tensor, "batch tokens"] | None,
        full: Float[Tensor, "batch tokens width"] | None = None,
        spill: Path | None = None,
    ) -> None:
        self.number, self.calls, self.mask, self.spill = number, calls, mask, spill
        self.hidden, self.full = hidden, full

    @property
    def hidden(self) -> Float[Tensor, "batch tokens width"]:
        """What enters the next block."""
        return _read(self._hidden)

    @hidden.setter
    def hidden(self, x: Float[Tensor, "batch tokens width"]) -> None:
        self._hidden = self._put(x, "hidden")

    @property
    def full(self) -> Float[Tensor, "batch tokens width"] | None:
        """The same in full precision."""
        return None if self._full is None else _read(self._full)

    @full.setter
    def full(self, x: Float[Tensor, "batch tokens width"] | None) -> None:
        self._full = None if x is None else self._put(x, "full")

    def _put(self, x: Tensor, what: str) -> Tensor | Spilled:
        return x if self.spill is None else Spilled.of(x, self.spill / f"{self.number:06d}-{what}")


def _read(held: Tensor | Spilled) -> Tensor:
    return held.read() if isinstance(held, Spilled) else held


@dataclass(frozen=True)
class Activations:
    """All calibration batches, or this rank's, and a probe of a few tokens for observing the topology."""

    batches: list[BatchActivations]
    probe: BatchActivations
    ranks: Ranks = ONE

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int, full: nn.Module | None = None) -> None:
        """Pass every batch through `block`, and its full-precision states, if it has any, through `full`."""
        for batch in self.batches:
            with phase("forward", *batch.hidden.shape[:2]), faster_attention_of(block):
                batch.hidden = batch.calls[index].run(block, batch.hidden)
        if full is not None:
            self.advance_full(full, index)

    @torch.no_grad()
    def advance_full(self, full: nn.Module, index: int) -> None:
        """Pass every batch's full-precision states through `full`, nothing else."""
        for batch in self.batches:
            assert batch.full is not None
            with phase("forward", *batch.hidden.shape[:2]), faster_attention_of(full):
                batch.full = batch.calls[index].run(full, batch.full)

    def keep(self, journal: Journal, index: int) -> None:
        """Keep what every batch takes from block `index` into the next, a file for each. Raises OSError."""
        for batch in self.batches:
            states = [batch.hidden] if batch.full is None else [batch.hidden, batch.full]
            journal.keep_batch(index, batch.number, states)

    def restore(self, journal: Journal, index: int) -> None:
        """Go on from what `keep` kept after block `index`; where it raises, on every rank, nothing has changed.

        Raises:
            FileNotFoundError, DamagedError: a batch is not there, or is not one of these.
        """

        def check() -> None:
            for batch in self.batches:
                _check_fitting(batch, journal.batch(index, batch.number))

        self.ranks.together(check, FileNotFoundError, DamagedError)
        for batch in self.batches:
            hidden, *full = journal.batch(index, batch.number)
            batch.hidden = hidden.to(batch.hidden.device)
            batch.full = full[0].to(batch.hidden.device) if full else None

    def probe_input(self) -> Float[Tensor, "1 tokens width"]:
        """The first real tokens that enter the next block, of this rank's batches."""
        return self.batches[0].hidden[:1, : self.probe.hidden.shape[1]]


def keep_block(
    journal: Journal,
    index: int,
    packed: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]],
    activations: Activations | None,
    ranks: Ranks,
) -> None:
    """Keep a finished block: each rank writes the activations of its own batches, then rank 0 writes the block.

    Args:
        packed: tensors and facts of the block.

    Raises:
        OSError: on all ranks, where any could not write.
    """

    def keep_activations() -> None:
        if activations is not None:
            activations.keep(journal, index)

    def append() -> None:
        if ranks.first:
            journal.append(index, *packed())

    ranks.together(keep_activations, OSError)
    ranks.together(append, OSError)


def _check_fitting(batch: BatchActivations, states: list[Tensor]) -> None:
    """Raise DamagedError unless these states may take the place of the batch's."""
    now = batch.hidden
    if any(x.shape != now.shape or x.dtype != now.dtype for x in states):
        raise DamagedError(f"a batch of shape {tuple(states[0].shape)} for one of {tuple(now.shape)}")
    if len(states) != 1 + (batch.full is not None):
        raise DamagedError(f"{len(states)} hidden states of a batch")


def batches_of(ranks: Ranks, tokens: TokenSet, tokens_per_batch: int) -> range:
    """Numbers of the batches that fall to this rank.

    Raises:
        UserError: there are fewer batches than ranks.
    """
    windows, seqlen = tokens.ids.shape
    count = -(-windows // max(1, tokens_per_batch // seqlen))
    if count < ranks.size:
        raise UserError(
            f"tokens_per_batch={tokens_per_batch}: makes {count} batches of the calibration text, for {ranks.size} "
            "ranks: lower it, raise data.samples, or start fewer ranks"
        )
    return range(ranks.rank, count, ranks.size)


def _check_alone(model: nn.Module) -> None:
    """Refuse blocks that read what others have kept: each is run by itself, on what was recorded of its call.

    Raises:
        UserError: naming what they read.
    """
    if shared := getattr(text_config(model), "num_kv_shared_layers", None):
        raise UserError(
            f"model: the last {shared} blocks read keys and values of earlier ones (num_kv_shared_layers), which "
            "calibration, block by block, can't follow; method=rtn needs no data"
        )


@phase("embed")
def open_activations(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: TokenSet,
    tokens_per_batch: int,
    compute_dtype: torch.dtype,
    track: Track = no_track,
    full: bool = False,
    spill: Path | None = None,
    ranks: Ranks = ONE,
) -> Activations:
    """Embed the calibration tokens and record what every block is called with; `full`, `spill`: see `BatchActivations`.

    Of several ranks each takes its share of the batches; which windows make a batch does not depend on them.

    Raises:
        UserError: blocks that can't be run one by one on what enters each.
    """
    with resident(model.get_input_embeddings()):  # pyright: ignore[reportCallIssue]
        return _opened(model, blocks, tokens, tokens_per_batch, compute_dtype, track, full, spill, ranks)


def _opened(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: TokenSet,
    tokens_per_batch: int,
    compute_dtype: torch.dtype,
    track: Track,
    full: bool,
    spill: Path | None,
    ranks: Ranks,
) -> Activations:
    _check_alone(model)
    recorder = BlockCalls(model, blocks)
    per_batch = max(1, tokens_per_batch // tokens.ids.shape[1])

    def batch(number: int, ids: Tensor, mask: Tensor | None) -> BatchActivations:
        hidden, calls = recorder.record(ids, mask)
        if hidden.dim() != 3:
            raise UserError(
                f"model: blocks of {type(model).__name__} pass on several hidden states of each token, which "
                "calibration can't follow; method=rtn needs no data"
            )
        on_device = None if mask is None else mask.to(hidden.device)
        hidden = hidden.to(compute_dtype)
        return BatchActivations(
            number, hidden, calls, on_device, hidden if full else None, None if number < 0 else spill
        )

    numbers = batches_of(ranks, tokens, tokens_per_batch)
    batches = []
    for number in track(numbers, "embed calibration text", len(numbers)):
        part = slice(number * per_batch, (number + 1) * per_batch)
        batches.append(batch(number, tokens.ids[part], None if tokens.mask is None else tokens.mask[part]))
    return Activations(batches, batch(-1, tokens.ids[:1, :PROBE_TOKENS], None), ranks)
