"""Where a library puts tensors is watched on a few blocks of each kind: the first, one between, and the last.

A model of 8 billion parameters has as many elements to number. Blocks whose tensors have the same shapes, and of which
a config says the same, are of one kind; where the watched ones of a kind went alike, the others of it go so, too.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from gptq_awq.export.placement import Indices, Numbering, Runs
from gptq_awq.models.blocks import find_blocks

Found = dict[str, Runs | None]
Watch = Callable[[Collection[str | None]], Found]
"""Watches a library convert some blocks (None: what is in no block) → runs of its tensors, None for computed ones."""


class Piece(NamedTuple):
    """Elements of one of a block's tensors within a tensor of the library, as runs; see `Numbering.split`."""

    rest: str
    starts: Indices
    positions: Indices
    lengths: Indices

    def same(self, other: "Piece") -> bool:
        """Whether two pieces are equal."""
        return self.rest == other.rest and all(map(np.array_equal, self[1:], other[1:]))


Places = dict[str, list[Piece] | None]
"""The library's name of a tensor with {} for its block → the pieces that it consists of; None: it is computed."""


def watched(model: PreTrainedModel, numbering: Numbering, block_of: Callable[[str], str | None], watch: Watch) -> Found:
    """Runs of all of a library's tensors, by watching it convert a few blocks of each kind.

    Args:
        model: model that is converted.
        numbering: numbers of its elements.
        block_of: block that one of the library's tensors is in, by its name.
        watch: watches the library convert blocks.
    """
    kinds, (prefix, _) = kinds_of_blocks(model), find_blocks(model)
    chosen = {kind: list(dict.fromkeys((each[0], each[len(each) // 2], each[-1]))) for kind, each in kinds.items()}
    found = watch([None, *(block for blocks in chosen.values() for block in blocks)])
    rest: list[str] = []
    for kind, blocks in kinds.items():
        others = [block for block in blocks if block not in chosen[kind]]
        own = [{name: runs for name, runs in found.items() if block_of(name) == block} for block in chosen[kind]]
        first, *more = (_places(numbering, prefix, block, runs) for block, runs in zip(chosen[kind], own, strict=True))
        if first is None or not all(_same(first, each) for each in more):
            rest += others
        else:
            for block in others:
                found |= _runs(numbering, prefix, block, first)
    return found | watch(rest) if rest else found


def kinds_of_blocks(model: PreTrainedModel) -> dict[Any, list[str]]:
    """Kind → its blocks: shapes of their tensors, and what the config says of each of them."""
    config, found = model.config.get_text_config(), {}
    _, blocks = find_blocks(model)
    told = [value for value in vars(config).values() if isinstance(value, list | tuple) and len(value) == len(blocks)]
    for index, block in enumerate(blocks):
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict(keep_vars=True).items())
        found.setdefault((shapes, repr([value[index] for value in told])), []).append(str(index))
    return found


def _places(numbering: Numbering, prefix: str, block: str, found: Found) -> Places | None:
    """Where a block's tensors went; None where they are together with those of others."""
    inside = f"{prefix}.{block}."
    places: Places = {}
    for name, runs in found.items():
        pieces = [] if runs is None else [Piece(*split) for split in numbering.split(runs)]
        if not all(piece.rest.startswith(inside) for piece in pieces):
            return None
        before, _, after = f".{name}".partition(f".{block}.")
        pieces = [piece._replace(rest=piece.rest.removeprefix(inside)) for piece in pieces]
        places[f"{before}.{{}}.{after}".removeprefix(".")] = None if runs is None else pieces
    return places


def _same(first: Places, other: Places | None) -> bool:
    """Whether two blocks' tensors went to the same places."""
    if other is None or first.keys() != other.keys():
        return False
    pairs = [(first[name] or [], other[name] or []) for name in first]
    return all(len(a) == len(b) and all(map(Piece.same, a, b)) for a, b in pairs)


def _runs(numbering: Numbering, prefix: str, block: str, places: Mapping[str, list[Piece] | None]) -> Found:
    """Runs of the tensors of a block that goes where another of its kind went."""
    found: Found = {}
    for name, pieces in places.items():
        own = None if pieces is None else [piece._replace(rest=f"{prefix}.{block}.{piece.rest}") for piece in pieces]
        found[name.format(block)] = None if own is None else numbering.joined(own)
    return found
