"""Reading single tensors of a transformers folder on demand, by their names in the model.

Checkpoints may name and split tensors differently from the model (an expert's three matrices one by one, where the
model has those of all experts in one tensor). transformers' conversion rules map one to the other; here they are
applied to the tensors of one block at a time.
"""

import copy
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from gptq_awq.errors import UserError
from gptq_awq.models.experts import fused_in_name
from gptq_awq.models.quantized_source import decoded, quantization_of
from gptq_awq.models.tensor_files import stored_tensors
from gptq_awq.storage.headers import safetensors_places


@dataclass
class _Recipe:
    """How some of the model's tensors are made: from which tensors in the files, by which conversion.

    Attributes:
        targets: names in the model.
        converter: transformers' conversion; None where one tensor is only renamed.
        sources: names in the files, with the converter's pattern for each.
    """

    targets: list[str]
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Placed:
    """A tensor of the files, and its place in the model.

    Attributes:
        source: name in the files.
        target: name in the model, which may have no such place.
        pattern: that of `converter` which the name matched; None where the tensor is only renamed.
        converter: transformers' conversion; None where the tensor is only renamed.
    """

    source: str
    target: str
    pattern: str | None
    converter: WeightConverter | None


def placed(model: PreTrainedModel, sources: Iterable[str]) -> Iterator[Placed]:
    """Places in the model of tensors of the files, by transformers' rules of renaming and conversion."""
    rules, names = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    for source in sorted(sources, key=_natural):
        target, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, names)
        if target not in names and source in names:
            target, pattern = source, None
        converter = next((c for c in converters if pattern in c.source_patterns), None) if pattern else None
        yield Placed(source, target, pattern, converter)


class Checkpoint:
    """A folder's safetensors files, read as tensors of `model`, which may itself be on the meta device.

    Raises:
        UserError: naming `option`, where the folder has no safetensors files, or a tensor of another shape.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, option: str) -> None:
        self._model = model
        self._stored = decoded(stored_tensors(folder, option), quantization_of(folder), option)
        if not self._stored or any(tensor.file.suffix != ".safetensors" for tensor in self._stored.values()):
            raise UserError(
                f"{option}: has no safetensors files, which alone can be offloaded; leave memory_budget out"
            )
        self._recipes: dict[str, _Recipe] = {}
        names = model.state_dict()
        for place in placed(model, self._stored):
            if place.target in names:  # others have no place, such as an output head where only the decoder is loaded
                self._add(place)
        self._check_shapes(names, option)

    def _add(self, place: Placed) -> None:
        """Add a tensor of the files to the recipe of the model's tensors that it is needed for."""
        recipe = self._recipes.get(place.target)
        if recipe is None:
            made = [place.target]
            if place.converter is not None:
                patterns = place.converter.target_patterns
                made += [place.target.replace(patterns[0], p) for p in patterns[1:]]
            recipe = _Recipe(made, place.converter)
            self._recipes |= dict.fromkeys(made, recipe)
        recipe.sources.append((place.source, place.pattern or place.source))

    def _check_shapes(self, names: Mapping[str, Tensor], option: str) -> None:
        """Raise UserError if the headers say that a tensor has another shape than its place in the model."""

        def header(source: str) -> Tensor:
            return torch.empty(self._stored[source].shape, device="meta")

        for recipe in {id(recipe): recipe for recipe in self._recipes.values()}.values():
            try:
                made = self._make(recipe.targets[0], header)
            except Exception as error:  # of transformers' conversion: too few or too many tensors
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{option}: {recipe.targets[0]} cannot be made of its files' tensors ({reason})"
                ) from error
            for name, tensor in made.items():
                if name in names and tensor.shape != names[name].shape:
                    raise UserError(
                        f"{option}: {name} is of shape {tuple(tensor.shape)} in the files and of "
                        f"{tuple(names[name].shape)} by config.json"
                    )

    def __contains__(self, name: str) -> bool:
        return name in self._recipes

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the named tensors in the files' precision, into memory of their own; yields pairs of name and tensor."""
        made: dict[str, Tensor] = {}
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}

            def get(path: Path, part: str) -> Tensor:
                if path not in handles:
                    # Not mapped: pages of a mapped file would count as this process' memory.
                    handles[path] = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                return handles[path].get_tensor(part)

            def tensor(source: str) -> Tensor:
                return self._stored[source].read(source, get)

            for name in names:
                if name not in made:
                    made |= self._make(name, tensor)
                yield name, made.pop(name)

    def _make(self, name: str, tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Convert the sources of one model tensor, read by `tensor`; the recipe may make further tensors with it."""
        recipe = self._recipes[name]
        if recipe.converter is None:
            return {name: tensor(recipe.sources[0][0])}
        converter = copy.deepcopy(recipe.converter)
        for source, pattern in recipe.sources:
            converter.add_tensor(recipe.targets[0], source, pattern, partial(tensor, source))  # pyright: ignore
        with fused_in_name(self._model):
            made = converter.convert(recipe.targets[0], model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def nbytes(self, names: Collection[str]) -> int:
        """Number of bytes that the named tensors take in the files."""
        spans = self._spans(names)
        return sum(stop - start for _, start, stop in spans)

    def read_ahead(self, names: Collection[str]) -> None:
        """Ask the operating system to read the named tensors into its page cache; returns at once."""
        if not hasattr(os, "posix_fadvise"):  # not every system has it
            return
        for path, start, stop in self._spans(names):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def _spans(self, names: Collection[str]) -> list[tuple[Path, int, int]]:
        """File, first byte and end of every tensor in the files that the named ones are made of."""
        recipes = {id(recipe): recipe for recipe in (self._recipes[name] for name in names)}
        sources = [source for recipe in recipes.values() for source, _ in recipe.sources]
        parts = [place for source in sources for place in self._stored[source].places(source)]
        headers = {path: safetensors_places(path) for path in {path for path, _ in parts}}
        return [(path, *headers[path][name]) for path, name in parts]


def folder_numbers(folder: Path, option: str = "model.path") -> int:
    """Number of parameters in a folder's safetensors files; 0 where it has none."""
    stored = decoded(stored_tensors(folder, option), quantization_of(folder), option).values()
    return sum(math.prod(tensor.shape) for tensor in stored if tensor.file.suffix == ".safetensors")


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that orders integers in names by value: experts are stacked in that order."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
