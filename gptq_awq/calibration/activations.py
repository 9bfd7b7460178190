"""Activations: the calibration data as hidden states, passed from block to block.

A `BatchActivations` holds the hidden states of one batch of calibration windows, in the compute dtype, and the other
arguments that each block is called with. A block's outputs replace its inputs; no tensor is written to.

Methods that compare the quantized model with full precision (`Method.needs_full`) carry the full-precision model's
hidden states as well. Before block k is solved, `hidden` enters it in the quantized model and `full` in the
full-precision model; afterwards both are its outputs.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gptq_awq.calibration.batch_activations import BatchActivations
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.models.attention import faster_attention_of
from gptq_awq.models.blocks import PROBE_TOKENS, BlockCalls
from gptq_awq.models.offload import resident
from gptq_awq.models.walk import Walk
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.runtime.profiling import phase
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.checksummed import DamagedError
from gptq_awq.storage.journal import Journal


@dataclass(frozen=True)
class Activations:
    """The calibration batches as hidden states that enter one block.

    Attributes:
        batches: all batches; of several ranks, those of this one.
        probe: a batch of `PROBE_TOKENS` tokens, whose calls a block's topology is observed with.
        ranks: the processes that the batches are spread over.
        repeated: numbers of the blocks that the model calls more than once.
    """

    batches: list[BatchActivations]
    probe: BatchActivations
    ranks: Ranks = ONE
    repeated: frozenset[int] = frozenset()

    @torch.no_grad()
    def enter(self, index: int) -> bool:
        """Let all batches go on to block `index`; false where the model does not call it.

        Where the model calls it again, further batches are what it is called with then, as the model is now.
        """
        self.batches[:] = self.own
        entered = all([batch.enter(index) for batch in (*self.batches, self.probe)])
        if entered and index in self.repeated:
            self.batches.extend([later for batch in self.own for later in batch.later(index, len(self.own))])
        return entered

    @property
    def own(self) -> list[BatchActivations]:
        """The batches without those of later calls of a block."""
        return [batch for batch in self.batches if not batch.again]

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int, full: nn.Module | None = None) -> None:
        """Replace every batch's hidden states by the outputs of `block` (number `index`), and `full`'s likewise."""
        for batch in self.batches:
            with phase("forward", *batch.hidden.shape[:2]), faster_attention_of(block):
                batch.pass_through(block, index)
        if full is not None:
            self.advance_full(full, index)

    @torch.no_grad()
    def advance_full(self, full: nn.Module, index: int) -> None:
        """Replace every batch's full-precision hidden states by the outputs of `full`; `hidden` stays as it is."""
        for batch in self.batches:
            with phase("forward", *batch.hidden.shape[:2]), faster_attention_of(full):
                batch.pass_full_through(full, index)

    def keep(self, journal: Journal, index: int) -> None:
        """Write the hidden states that block `index` returned to the journal, one file per batch. Raises OSError."""
        for batch in self.own:
            states = [batch.hidden] if batch.full is None else [batch.hidden, batch.full]
            journal.keep_batch(index, batch.number, states)

    def restore(self, journal: Journal, index: int) -> None:
        """Replace every batch's hidden states by those that `keep` wrote after block `index`.

        Raises (on every rank, and nothing has changed then):
            FileNotFoundError: a batch's file is missing.
            DamagedError: a file is damaged, or its states do not have the batch's shape, dtype and number.
        """

        def check() -> None:
            for batch in self.batches:
                _check_states(batch, journal.batch(index, batch.number))

        self.ranks.together(check, FileNotFoundError, DamagedError)
        for batch in self.batches:
            if batch.walk is not None:  # it passes the finished blocks again when it enters the next one
                if batch.full_walk is not None:  # which are in full precision until then
                    batch.full_walk.go_to(index + 1, batch.hidden.dtype)
                continue
            hidden, *full = journal.batch(index, batch.number)
            batch.hidden = hidden.to(batch.hidden.device)
            batch.full = full[0].to(batch.hidden.device) if full else None

    def probe_input(self) -> Float[Tensor, "1 tokens width"]:
        """A few tokens' hidden states that enter the next block, for which the probe's calls hold the other arguments.

        They are the start of this rank's first batch; where a forward is walked along, the probe's own.
        """
        if self.probe.walk is not None:
            return self.probe.hidden
        return self.batches[0].hidden[:1, : self.probe.hidden.shape[1]]


def keep_block(
    journal: Journal,
    index: int,
    packed: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]],
    activations: Activations | None,
    ranks: Ranks,
) -> None:
    """Write a finished block to the journal: each rank the activations of its own batches, then rank 0 the block.

    Args:
        journal: the folder of finished blocks.
        index: number of the block.
        packed: returns the block's tensors and facts; called on rank 0 only.
        activations: inputs of the next block; None where the next block needs none.
        ranks: the processes that share the work.

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


def _check_states(batch: BatchActivations, states: list[Tensor]) -> None:
    """Raise DamagedError unless `states` have the shape, the dtype and the number of the batch's hidden states."""
    now, expected = batch.hidden, 1 + (batch.full is not None)
    if any(x.shape != now.shape or x.dtype != now.dtype for x in states):
        raise DamagedError(
            f"hidden states are {tuple(states[0].shape)} {states[0].dtype}, not {tuple(now.shape)} {now.dtype}"
        )
    if len(states) != expected:
        raise DamagedError(f"a batch has {len(states)} hidden states, not {expected}")


def batches_of(ranks: Ranks, tokens: TokenSet, tokens_per_batch: int) -> range:
    """Numbers of this rank's batches: of all batches in order, every `ranks.size`-th from its own number on.

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


def check_hidden(hidden: Tensor, model: str) -> None:
    """Refuse hidden states that are not (batch, tokens, width); `model` names the model's class. Raises UserError."""
    if hidden.dim() != 3:
        raise UserError(
            f"model: blocks of {model} pass on several hidden states of each token, which "
            "calibration can't follow; method=rtn needs no data"
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
    walked: bool = False,
) -> Activations:
    """Embed the calibration tokens, and record the arguments that each block is called with.

    Of several ranks each embeds its share of the batches; which windows make a batch does not depend on them.

    Args:
        model: a causal LM.
        blocks: its transformer blocks.
        tokens: calibration windows.
        tokens_per_batch: calibration tokens per forward; a batch has at least one window.
        compute_dtype: dtype of the hidden states.
        track: reports progress over batches.
        full: carry the full-precision model's hidden states too; before the first block they are the same.
        spill: folder for files of hidden states; None keeps them in memory.
        ranks: the processes that share the batches.
        walked: run the blocks within the model's own forwards, which wait at them, and not each by itself.

    Raises:
        UserError: blocks that can't be run one by one, each on its own input; fewer batches than ranks.
    """
    if walked:
        return _open_walks(model, blocks, tokens, tokens_per_batch, compute_dtype, track, full, ranks)
    with resident(model.get_input_embeddings()):  # pyright: ignore[reportCallIssue]
        embed = _Embedding(BlockCalls(model, blocks), type(model).__name__, compute_dtype, full)
        per_batch = max(1, tokens_per_batch // tokens.ids.shape[1])
        numbers = batches_of(ranks, tokens, tokens_per_batch)
        batches = []
        for number in track(numbers, "embed calibration text", len(numbers)):
            rows = slice(number * per_batch, (number + 1) * per_batch)
            mask = None if tokens.mask is None else tokens.mask[rows]
            batches.append(embed.batch(number, tokens.ids[rows], mask, spill))
        return Activations(batches, embed.batch(-1, tokens.ids[:1, :PROBE_TOKENS]), ranks)


def _open_walks(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: TokenSet,
    tokens_per_batch: int,
    compute_dtype: torch.dtype,
    track: Track,
    full: bool,
    ranks: Ranks,
) -> Activations:
    """Activations of forwards of the whole model that wait at its first block; arguments as `open_activations` has."""
    per_batch = max(1, tokens_per_batch // tokens.ids.shape[1])

    def batch(number: int, rows: slice, length: int | None = None) -> BatchActivations:
        ids = tokens.ids[rows, :length].long()
        mask = None if tokens.mask is None else tokens.mask[rows, :length]
        walks = [Walk(model, blocks, ids, mask) for _ in range(1 + full)]
        hidden = walks[0].hidden.to(compute_dtype)
        on_device = None if mask is None else mask.to(hidden.device)
        rest = {"walk": walks[0], "full_walk": walks[1] if full else None}
        return BatchActivations(number, hidden, [walks[0].call], on_device, hidden if full else None, **rest)

    numbers = batches_of(ranks, tokens, tokens_per_batch)
    batches = [
        batch(number, slice(number * per_batch, (number + 1) * per_batch))
        for number in track(numbers, "embed calibration text", len(numbers))
    ]
    return Activations(batches, batch(-1, slice(1), PROBE_TOKENS), ranks, _repeated(model, blocks, tokens.ids))


def _repeated(model: nn.Module, blocks: nn.ModuleList, ids: Int[Tensor, "batch tokens"]) -> frozenset[int]:
    """Numbers of the blocks that the model calls more than once."""
    walk, counts = Walk(model, blocks, ids[:1, :PROBE_TOKENS].long()), Counter[int]()
    while walk.index is not None:
        counts[walk.index] += 1
        walk.leave(walk.call.whole(blocks[walk.index], walk.hidden))
    return frozenset(index for index, count in counts.items() if count > 1)


@phase("embed")
def embed_again(
    activations: Activations, model: nn.Module, blocks: nn.ModuleList, tokens: TokenSet, tokens_per_batch: int
) -> None:
    """Replace the quantized model's hidden states, once its embedding is rounded; full precision's stay what they are.

    Args:
        activations: activations that enter the first block.
        model: the model, whose embedding has changed.
        blocks: its transformer blocks.
        tokens: calibration windows.
        tokens_per_batch: calibration tokens per forward, as when the activations were opened.
    """
    per_batch = max(1, tokens_per_batch // tokens.ids.shape[1])
    with resident(model.get_input_embeddings()):  # pyright: ignore[reportCallIssue]
        walked = activations.batches[0].walk is not None
        recorder = None if walked else BlockCalls(model, blocks)
        for batch in activations.batches:
            rows = slice(batch.number * per_batch, (batch.number + 1) * per_batch)
            ids, mask = tokens.ids[rows], None if tokens.mask is None else tokens.mask[rows]
            if recorder is None:
                batch.walk = Walk(model, blocks, ids.long(), mask)
                continue
            hidden, batch.calls = recorder.record(ids, mask)
            batch.hidden = hidden.to(batch.hidden.dtype)


@dataclass(frozen=True)
class _Embedding:
    """The step from token ids to the first block's inputs.

    Attributes:
        recorder: runs the model up to its blocks.
        model: name of the model's class, for errors.
        compute_dtype: dtype of the hidden states.
        full: batches carry full-precision hidden states.
    """

    recorder: BlockCalls
    model: str
    compute_dtype: torch.dtype
    full: bool

    def batch(
        self,
        number: int,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        spill: Path | None = None,
    ) -> BatchActivations:
        """One batch of windows as the first block's input, with the arguments of every block.

        Raises:
            UserError: hidden states that are not (batch, tokens, width).
        """
        hidden, calls = self.recorder.record(ids, mask)
        check_hidden(hidden, self.model)
        on_device = None if mask is None else mask.to(hidden.device)
        hidden = hidden.to(self.compute_dtype)
        return BatchActivations(number, hidden, calls, on_device, hidden if self.full else None, spill)
