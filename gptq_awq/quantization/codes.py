"""What checkpoints are made of: the codes of finished blocks, in memory or, of a offloaded model, in the journal."""

from collections.abc import Iterator, Mapping

from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.quantization.resume import BlockResult, weights_in
from gptq_awq.storage.journal import Journal


class KeptWeights(Mapping[str, QuantizedWeight]):
    """Quantized weights of finished blocks, read from the journal as they are asked for; the last block's are kept.

    Args:
        journal: of a run whose blocks are all finished.
        names: module name → its block; -1: it is one of `ends`.
        ends: what lies outside of the blocks.
        grids: module name → grid.
    """

    def __init__(
        self,
        journal: Journal,
        names: Mapping[str, int],
        ends: Mapping[str, QuantizedWeight],
        grids: Mapping[str, Grid],
    ) -> None:
        self._journal, self._names, self._ends, self._grids = journal, names, ends, grids
        self._last: tuple[int, dict[str, QuantizedWeight]] = (-1, {})

    def __getitem__(self, name: str) -> QuantizedWeight:
        index = self._names[name]
        if index < 0:
            return self._ends[name]
        if self._last[0] != index:
            self._last = (-1, {})  # one block at a time
            self._last = (index, dict(weights_in(self._journal.block(index), self._grids)))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Codes:
    """Gathers what checkpoints will want.

    Args:
        journal: of the run.
        grids: module name → grid.
        offloaded: leave blocks' codes in the journal.
        wanted: whether there will be a checkpoint.
    """

    def __init__(self, journal: Journal, grids: Mapping[str, Grid], offloaded: bool, wanted: bool) -> None:
        self._journal, self._grids, self._offloaded, self._wanted = journal, grids, offloaded, wanted
        self._blocks: dict[str, int] = {}
        self._held: dict[str, QuantizedWeight] = {}

    def add(self, block: BlockResult) -> None:
        """A block is finished."""
        if self._wanted:
            self._blocks |= dict.fromkeys(block.weights, block.index)
            if not self._offloaded or block.index < 0:
                self._held |= block.weights

    def weights(self) -> Mapping[str, QuantizedWeight]:
        """All of them, by module name."""
        if not self._offloaded:
            return self._held
        return KeptWeights(self._journal, self._blocks, self._held, self._grids)
