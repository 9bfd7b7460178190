"""Targets of quantization: grids of the linears in the blocks and, if asked for, of the embedding and output head."""

from collections.abc import Iterator, Mapping

from torch import nn

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, GridChoice, Place
from gptq_awq.models.blocks import find_blocks, heads_of, key_value_heads, text_config
from gptq_awq.models.linear import is_linear, matrix


def assign_grids(model: nn.Module, choice: GridChoice, head: str | None = None) -> dict[str, Grid]:
    """Assign each weight that is to be quantized its grid: module name → grid.

    Args:
        model: a causal LM.
        choice: one grid for all linears, or a mix.
        head: quantization of the output head, as `Method.head` has it.

    Raises:
        UserError: a grid whose format does not take a weight's width; names in a grid's options that no weight has.
    """
    grids: dict[str, Grid] = {}
    places = [*_outside_places(model, head is not None), *block_places(model)]
    if unmatched := getattr(choice, "unmatched", lambda _: [])(places):
        raise UserError(f"{unmatched[0]}: the model has no such linear")
    for place in places:
        grid = choice.at(place)
        if grid is not None and place.head and head == "rtn" and grid.needs_hessian:
            grid = grid.without_search()
        if grid is not None:
            grid.check_columns(place.columns, place.name)
            grids[place.name] = grid
    return grids


def changes_output(model: nn.Module, grids: Mapping[str, Grid]) -> bool:
    """Whether the output head's weight, or the embedding it is tied to, has a grid."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return head is not None and any(model.get_submodule(name).weight is head.weight for name in grids)


def all_places(model: nn.Module) -> list[Place]:
    """Places of the embedding, of an output head with a matrix of its own, and of the blocks' linears."""
    return [*_outside_places(model, False), *block_places(model)]


def block_places(model: nn.Module) -> Iterator[Place]:
    """The places of the blocks' linears; a weight that several of them share has one."""
    prefix, blocks = find_blocks(model)
    shared_kv = (heads_of(model) or 1) // key_value_heads(text_config(model))
    seen: set[int] = set()  # weights that several blocks share have the place of the first
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if is_linear(module) and id(module.weight) not in seen:
                seen.add(id(module.weight))
                yield Place(f"{prefix}.{index}.{name}", matrix(module).shape[1], index, len(blocks), shared_kv)


def _outside_places(model: nn.Module, head_wanted: bool) -> Iterator[Place]:
    """The places of the input embedding, and of the output head where it is a matrix of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    tied = head is not None and head.weight is embedding.weight
    yield Place(names[id(embedding)], embedding.weight.shape[1], tied=tied)
    if head is not None and not tied:
        yield Place(names[id(head)], head.weight.shape[1], head=head_wanted)
