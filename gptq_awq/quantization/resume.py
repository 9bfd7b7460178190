"""Resuming: finished blocks are kept in a journal, so that a killed run goes on after the last one, bit for bit.

Kept are codes, scales and zeros (a byte per weight and a little more, whatever the model's dtype), and the block's
parameters without a grid, since transforms change them. Weights are dequantized from the codes.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gptq_awq.calibration.activations import Activations, keep_block
from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, QuantizedWeight, group_of_columns
from gptq_awq.models.offload import residence
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.runtime import memory
from gptq_awq.runtime.profiling import phase
from gptq_awq.storage.checksummed import ChecksummedFile, DamagedError
from gptq_awq.storage.journal import Journal

log = logging.getLogger(__name__)
Row = dict[str, Any]
"""One linear's row of the ledger, as JSON values."""


@dataclass(frozen=True)
class BlockResult:
    """The quantized weights and ledger rows of one finished block.

    Attributes:
        index: index of the block; -1 for modules outside of the blocks (embedding, output head).
        weights: module name → quantized weight.
        rows: rows of the ledger, one per linear.
        restored: whether an earlier attempt at this run had finished the block.
    """

    index: int
    weights: dict[str, QuantizedWeight] = field(repr=False)
    rows: list[Row] = field(repr=False)
    restored: bool = False

    def release(self, block: nn.Module) -> None:
        """Free the weights of an offloaded block once its result was used; the journal has them.

        Freed memory is given back to the system, as the C library's share of it would grow from block to block.
        """
        if residence(block) is not None:
            self.weights.clear()
            memory.trim()


@dataclass
class Progress:
    """Keeps a run's finished blocks in a journal, and restores them.

    A full disk ends the keeping, and not the run, unless the model is offloaded.

    Attributes:
        journal: the folder of finished blocks; None: nothing is kept.
        ranks: the processes that share the work.
    """

    journal: Journal | None
    ranks: Ranks = ONE

    @phase("disk")
    def save(self, prefix: str, block: nn.Module, done: BlockResult, activations: Activations | None) -> None:
        """Keep a finished block, and the activations that enter the next one.

        Args:
            prefix: name of the block in the model.
            block: the finished block.
            done: its result.
            activations: inputs of the next block; None where they need not be kept.

        Raises:
            UserError: an offloaded model's block cannot be written.
        """
        if self.journal is None:
            return
        try:
            keep_block(self.journal, done.index, lambda: _packed(prefix, block, done), activations, self.ranks)
        except OSError as error:
            if residence(block) is not None:
                raise UserError(
                    f"an offloaded model's finished blocks must be kept in the cache, which failed: {error}"
                ) from error
            log.warning("progress is not kept, a killed run would start again: %s", error)
            self._clear()
            self.journal = None

    def save_head(self, count: int, done: BlockResult) -> None:
        """Keep a finished output head, as the block after the model's `count` blocks."""
        self.save("", nn.Module(), replace(done, index=count), None)

    def finished(self, count: int, activations: Activations | None) -> int:
        """Number of leading blocks, of `count`, that the journal holds; 0 where one of them is damaged.

        An output head that is solved counts as one more block. `activations` are replaced by the inputs of the block
        after the finished ones.
        """
        if self.journal is None:
            return 0
        journal = self.journal
        try:
            done = self.ranks.from_first(lambda: min(journal.count(), count))
            self.ranks.together(lambda: _checked(journal, done), DamagedError, FileNotFoundError)
            if done and activations is not None and done < count:
                activations.restore(journal, done - 1)
        except (DamagedError, FileNotFoundError) as error:
            log.warning("the progress in %s can't be used (%s): starting again", journal.folder, error)
            self._clear()
            return 0
        return done

    def restore(
        self, finished: int, prefix: str, blocks: nn.ModuleList, grids: Mapping[str, Grid]
    ) -> Iterator[BlockResult]:
        """Write the first `finished` blocks back into the model, in place, and yield their results.

        Args:
            finished: number of leading blocks that are finished.
            prefix: name of the list of blocks in the model.
            blocks: the model's blocks.
            grids: module name → grid.
        """
        for index in range(finished):
            name, block = f"{prefix}.{index}", blocks[index]
            self.settle(name, block, index, grids)
            assert self.journal is not None
            content = self.journal.block(index)
            weights = dict(weights_in(content, grids))
            if residence(block) is None:
                state = _state(content, weights, block, name)
                block.load_state_dict({key.removeprefix(f"{name}."): value for key, value in state})
            yield BlockResult(index, weights, content.facts["rows"], restored=True)

    def head(self, count: int, grids: Mapping[str, Grid]) -> BlockResult:
        """Result of the finished output head, as `save_head` kept it after the model's `count` blocks."""
        assert self.journal is not None
        content = self.journal.block(count)
        return BlockResult(-1, dict(weights_in(content, grids)), content.facts["rows"], restored=True)

    def settle(self, name: str, block: nn.Module, index: int, grids: Mapping[str, Grid]) -> None:
        """Let the weights of a finished offloaded block be read from the journal from now on; others stay in memory."""
        if (home := residence(block)) is None:
            return
        assert self.journal is not None
        journal = self.journal

        def read() -> Iterator[tuple[str, Tensor]]:
            content = journal.block(index)
            return _state(content, dict(weights_in(content, grids)), block, name)

        home.moved(read)

    def _clear(self) -> None:
        if self.journal is not None and self.ranks.first:
            self.journal.clear()


def _checked(journal: Journal, count: int) -> None:
    """Raise FileNotFoundError or DamagedError where one of the first `count` blocks is missing or damaged."""
    for index in range(count):
        journal.block(index)


def _state(
    content: ChecksummedFile, weights: Mapping[str, QuantizedWeight], block: nn.Module, name: str
) -> Iterator[tuple[str, Tensor]]:
    """Names in the model, and tensors, of a finished block's state: plain parameters, and dequantized weights."""
    for key, value in _under("plain/", content.tensors).items():
        yield f"{name}.{key}", value
    for linear, weight in weights.items():
        flipped = isinstance(block.get_submodule(linear.removeprefix(f"{name}.")), Conv1D)
        yield f"{linear}.weight", weight.dequantize().T if flipped else weight.dequantize()


def _packed(prefix: str, block: nn.Module, done: BlockResult) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A finished block as tensors and facts, for the journal."""
    on_grid = {f"{name.removeprefix(f'{prefix}.')}.weight" for name in done.weights}
    state = block.state_dict().items()
    tensors = {f"plain/{name}": value for name, value in state if name not in on_grid}
    for name, weight in done.weights.items():
        tensors |= {f"{name}/codes": weight.codes, f"{name}/scales": weight.scales, f"{name}/zeros": weight.zeros}
        tensors |= {f"{name}/store/{key}": value for key, value in weight.store.items()}
        if not weight.natural_order:
            tensors[f"{name}/group_of_column"] = weight.group_of_column
    facts = {"rows": done.rows, "losses": {name: weight.loss for name, weight in done.weights.items()}}
    grids: dict[str, Any] = {name: weight.grid for name, weight in done.weights.items()}
    shared = {name: grid.tensor_scale for name, grid in grids.items() if grid.shared_by_tensor}
    return tensors, facts | {"tensor_scales": shared}


def weights_in(content: ChecksummedFile, grids: Mapping[str, Grid]) -> Iterator[tuple[str, QuantizedWeight]]:
    """Names and quantized weights of one finished block, read from its file in the journal."""
    for name, loss in content.facts["losses"].items():
        kept, grid = _under(f"{name}/", content.tensors), grids[name]
        if grid.shared_by_tensor:
            grid = replace(grid, tensor_scale=content.facts["tensor_scales"][name])  # pyright: ignore
        groups = kept.get("group_of_column")
        if groups is None:
            groups = group_of_columns(kept["codes"].shape[1], grid.group_size)
        store = _under("store/", kept)
        yield name, QuantizedWeight(kept["codes"], kept["scales"], kept["zeros"], groups, grid, loss, store)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, named without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
