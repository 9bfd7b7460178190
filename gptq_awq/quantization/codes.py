"""Quantized weights for checkpoints: codes of finished blocks, in memory or, for an offloaded model, in the journal."""

from collections.abc import Iterator, Mapping

from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.quantization.resume import BlockResult, weights_in
from gptq_awq.storage.journal import Journal


class KeptWeights(Mapping[str, QuantizedWeight]):
    """Quantized weights by module name, read from the journal block by block; one block is in memory at a time.

    Args:
        journal: journal of a run whose blocks are all finished.
        names: module name → index of its block; -1 for a module outside of the blocks.
        outside: quantized weights of the modules outside of the blocks: embedding, output head.
        grids: module name → grid.
    """

    def __init__(
        self,
        journal: Journal,
        names: Mapping[str, int],
        outside: Mapping[str, QuantizedWeight],
        grids: Mapping[str, Grid],
    ) -> None:
        self._journal, self._names, self._outside, self._grids = journal, names, outside, grids
        self._last: tuple[int, dict[str, QuantizedWeight]] = (-1, {})

    def __getitem__(self, name: str) -> QuantizedWeight:
        index = self._names[name]
        if index < 0:
            return self._outside[name]
        if self._last[0] != index:
            self._last = (-1, {})  # one block at a time
            self._last = (index, dict(weights_in(self._journal.block(index), self._grids)))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Codes:
    """Gathers the quantized weights of finished blocks for checkpoints.

    Args:
        journal: the run's journal.
        grids: module name → grid.
        offloaded: the model is offloaded; its blocks' codes stay in the journal.
        wanted: there will be a checkpoint; otherwise nothing is gathered.
    """

    def __init__(self, journal: Journal, grids: Mapping[str, Grid], offloaded: bool, wanted: bool) -> None:
        self._journal, self._grids, self._offloaded, self._wanted = journal, grids, offloaded, wanted
        self._blocks: dict[str, int] = {}
        self._held: dict[str, QuantizedWeight] = {}

    def add(self, block: BlockResult) -> None:
        """Add a finished block, or the result for modules outside of the blocks."""
        if self._wanted:
            self._blocks |= dict.fromkeys(block.weights, block.index)
            if not self._offloaded or block.index < 0:
                self._held |= block.weights

    def weights(self) -> Mapping[str, QuantizedWeight]:
        """All quantized weights gathered so far, by module name."""
        if not self._offloaded:
            return self._held
        return KeptWeights(self._journal, self._blocks, self._held, self._grids)
