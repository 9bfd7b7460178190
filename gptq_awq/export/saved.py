"""A model's tensors under the names, and in the layout, that transformers' save_pretrained gives them.

Models in memory may have fused experts (or, unfused, one linear per expert) and names of their own; checkpoints have
what was first published. transformers knows how to go back: `revert_weight_conversion`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose, revert_weight_conversion

from gptq_awq.errors import UserError
from gptq_awq.export.base import Source
from gptq_awq.export.placement import Numbering, indices
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.experts import experts_in, fused_in_name, fused_tensors
from gptq_awq.models.offload import each_tensor

Read = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]
"""Reads tensors of a model by their names in its state dict."""
View = Callable[[PreTrainedModel, Mapping[str, Tensor]], dict[str, Tensor]]
"""Gives tensors of a model's state dict the names and the layout that they have elsewhere."""


class SavedTensors(Mapping[str, Tensor]):
    """The tensors that a model's checkpoint holds, by their names there; each block's are computed together.

    Args:
        model: model whose layout they have.
        read: reads tensors by their names in the model's state dict.
        only: names in the state dict of those that count; None: all.
        view: gives tensors of the state dict, whole blocks of it, another layout; None: that of checkpoints.
    """

    def __init__(
        self, model: PreTrainedModel, read: Read, only: Collection[str] | None = None, view: View | None = None
    ) -> None:
        self._model, self._read, self._view, self.config = model, read, view or saved, model.config
        groups = _names_by_block(model)
        self._groups = {key: [n for n in names if only is None or n in only] for key, names in groups.items()}
        state = model.state_dict(keep_vars=True)
        self.meta: dict[str, Tensor] = {}
        """Tensors without data, by name: their shapes and dtypes."""
        self._group_of: dict[str, str | None] = {}
        for group, names in self._groups.items():
            empty = {name: torch.empty_like(state[name], device="meta") for name in names}
            for name, tensor in self._view(model, empty).items():
                self.meta[name], self._group_of[name] = tensor, group
        self._held: tuple[str | None, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        group = self._group_of[name]
        if self._held[0] != group:
            self._held = ("", {})  # frees the last block before this one is read
            self._held = group, self._view(self._model, dict(self._read(self._groups[group])))
        return self._held[1][name]

    def by_block(self) -> dict[str | None, list[str]]:
        """Names of the tensors by the block that they are in; None: in none."""
        found: dict[str | None, list[str]] = {}
        for name, group in self._group_of.items():
            found.setdefault(group, []).append(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)


def saved(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model's state dict, whole blocks of it, as its checkpoint holds them."""
    return _reverted(model, fused_tensors(model, tensors)) if tensors else {}


def _reverted(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with transformers' conversions taken back, some of which ask for the shape of a fused parameter."""
    with _reverting(model):
        return revert_weight_conversion(model, tensors)


@contextmanager
def _reverting(model: PreTrainedModel) -> Iterator[None]:
    """Context manager in which transformers takes conversions of a model's tensors back."""
    with fused_in_name(model), _transposing_back():
        yield


class _TransposedBack(Transpose):
    """The way back from a transposition that transformers does where shapes tell it to; on its own way back none do."""

    def convert(
        self, input_dict: dict[str, Tensor], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Tensor]:
        (given,) = input_dict.values()
        tensor = given[0] if isinstance(given, list) else given
        square = tensor.shape[self.dim0] == tensor.shape[self.dim1]  # which its reader takes as it is
        target = self.get_target_pattern(input_dict, source_patterns, target_patterns)
        return {target: tensor if square else tensor.transpose(self.dim0, self.dim1).contiguous()}


@contextmanager
def _transposing_back() -> Iterator[None]:
    """Context manager in which transformers takes transpositions back that depend on shapes (Qwen3-VL's experts).

    Its own save_pretrained leaves them, and only its own reader copes with that.
    """
    own = Transpose.reverse_op

    def reverse_op(self: Transpose) -> Any:
        return _TransposedBack(self.dim1, self.dim0) if self.check_dims else own.fget(self)  # pyright: ignore[reportOptionalCall]

    Transpose.reverse_op = property(reverse_op)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        Transpose.reverse_op = own  # pyright: ignore[reportAttributeAccessIssue]


def saved_names(model: PreTrainedModel) -> dict[str, str]:
    """Names of the model's tensors in its checkpoint, by their names in its state dict, where those differ.

    Tensors that a checkpoint keeps together with others, or in parts, are left out.
    """
    empty = ((name, torch.empty(shape, device="meta")) for name, shape in state_shapes(model).items())
    with _reverting(model):  # entered once: it looks for experts in all modules
        alone = {name: _names_alone(model, name, tensor) for name, tensor in empty}
    owners = Counter(new for found in alone.values() for new in found)
    single = {name: found[0] for name, found in alone.items() if len(found) == 1}
    return {name: new for name, new in single.items() if owners[new] == 1 and new != name}


def _names_alone(model: PreTrainedModel, name: str, tensor: Tensor) -> list[str]:
    """Names of what a tensor alone becomes in the checkpoint; none where the way back asks for others, too.

    To be used inside of `_reverting`.
    """
    try:
        return list(revert_weight_conversion(model, {name: tensor}))
    except ValueError:  # of a conversion that joins several tensors
        return []


def renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """A function that gives a tensor, a packed part of one, or a module its name in the model's checkpoint."""
    tensors = saved_names(model)
    modules = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in tensors.items()}

    def rename(name: str) -> str:
        module, _, part = name.rpartition(".")
        return tensors.get(name) or modules.get(name) or (f"{modules[module]}.{part}" if module in modules else name)

    return rename


class Stored(NamedTuple):
    """A quantized weight as a checkpoint holds it.

    Attributes:
        module: name of the module that it is of, or of a part of it.
        weight: the weight, or rows of it.
    """

    module: str
    weight: QuantizedWeight


def stored_weights(source: Source) -> dict[str, Stored]:
    """Quantized weights under the names of the original checkpoint, in mixtures one for each expert's matrix.

    Raises:
        UserError: the checkpoint keeps a weight in one tensor with others, or not as whole rows of it.
    """
    if experts_in(source.model):
        return saved_weights(source.model, source.weights)
    rename = renaming(source.model)
    return {rename(name): Stored(name, weight) for name, weight in source.weights.items()}


def state_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors by their names in its state dict; tied ones under one name."""
    again, state = tied_names(model), model.state_dict(keep_vars=True)
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in again}


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names in a model's state dict whose tensor is stored under another name: the one that transformers stores it by.

    Older readers want that one: where it is missing, some leave the embedding empty, and the head that is tied to it.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    targets = getattr(model, "all_tied_weights_keys", None) or {}
    kept = {next((name for name in same if name not in targets), same[0]) for same in names.values()}
    return {name for same in names.values() for name in same} - kept


def saved_weights(model: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> dict[str, Stored]:
    """Quantized weights under the names of the checkpoint's linears; fused ones are split by rows.

    Args:
        model: model that has the weights.
        weights: module name → quantized weight.

    Raises:
        UserError: the checkpoint keeps a weight in one tensor with others, or not as whole rows of it.
    """
    found: dict[str, Stored] = {}
    for names in _names_by_block(model).values():
        found |= _saved_in_group(model, names, weights)
    return found


def _saved_in_group(
    model: PreTrainedModel, names: Collection[str], weights: Mapping[str, QuantizedWeight]
) -> dict[str, Stored]:
    """Quantized weights of one block, found by numbering their elements."""
    shapes = state_shapes(model)
    mine = {name: weights[name.removesuffix(".weight")] for name in names if name.removesuffix(".weight") in weights}
    numbering = Numbering.of({name: tuple(weight.codes.shape) for name, weight in mine.items()})

    def numbered(number: int) -> dict[str, Tensor]:
        given = {n: numbering.digits(n, number) if n in mine else torch.zeros(1).expand(shapes[n]) for n in names}
        return saved(model, given)

    passes, found, left = [numbered(number) for number in range(numbering.passes)], {}, set(mine)
    for name in passes[0]:
        runs = numbering.runs([each[name].numpy() for each in passes]) if mine else None
        parts = [] if runs is None else list(numbering.split(runs))
        if len(parts) != 1 or passes[0][name].dim() != 2:
            continue
        ((own, starts, _, lengths),) = parts
        columns = mine[own].codes.shape[1]
        if passes[0][name].shape[1] == columns and not ((starts % columns).any() or (lengths % columns).any()):
            rows = torch.from_numpy(indices(starts // columns, lengths // columns))
            found[name.removesuffix(".weight")] = Stored(own.removesuffix(".weight"), mine[own].rows(rows))
            left.discard(own)
    if left:
        raise UserError(
            f"export.formats: checkpoints of {type(model).__name__} keep {min(left)} in one tensor with others, which "
            "this format has no place for; choose export.formats=[hf]"
        )
    return found


def _names_by_block(model: PreTrainedModel) -> dict[str | None, list[str]]:
    """Names of a model's tensors by the block that they are in; None: in none."""
    found: dict[str | None, list[str]] = {}
    block = blocks_by_name(model)
    for name in state_shapes(model):
        found.setdefault(block(name), []).append(name)
    return found


def blocks_by_name(model: PreTrainedModel) -> Callable[[str], str | None]:
    """A function from a tensor's name to the index (as a string) of the block that it is in; None outside of them."""
    prefix, _ = find_blocks(model)
    return lambda name: name[len(prefix) + 1 :].split(".")[0] if name.startswith(f"{prefix}.") else None


def read_state(model: PreTrainedModel) -> Read:
    """Reader of a model's own tensors; those that are offloaded are copied, as they leave memory again."""

    def read(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in each_tensor(model, set(names).__contains__):
            yield name, tensor.detach().to("cpu", copy=True)

    return read
