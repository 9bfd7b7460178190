"""Reading single tensors of a transformers folder on demand, by their names in the model.

Checkpoints may name and split tensors differently from the model (an expert's three matrices one by one, where the
model has those of all experts in one tensor). transformers' conversion rules map one to the other; here they are
applied to the tensors of one block at a time.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from gptq_awq.errors import UserError


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


class Checkpoint:
    """A folder's safetensors files, read as tensors of `model`, which may itself be on the meta device.

    Raises:
        UserError: naming `option`, where the folder has no safetensors files.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, option: str) -> None:
        self._model = model
        self._files = _files_of_tensors(folder)
        if not self._files:
            raise UserError(
                f"{option}: has no safetensors files, which alone can be offloaded; leave memory_budget out"
            )
        self._recipes: dict[str, _Recipe] = {}
        rules = get_model_conversion_mapping(model)
        names = model.state_dict()
        for source in sorted(self._files, key=_natural):
            self._add(source, rules, names)

    def _add(self, source: str, rules: list[Any], names: dict[str, Any]) -> None:
        """Add the files' tensor `source` to the recipe of the model's tensors that it is needed for, if any."""
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(source, renamings, converters, prefix, names)
        if target not in names and source in names:
            target, pattern = source, None
        if target not in names:
            return  # not in the model, such as an output head where only the decoder is loaded
        recipe = self._recipes.get(target)
        if recipe is None:
            converter = next((c for c in converters if pattern in c.source_patterns), None) if pattern else None
            made = [target]
            if converter is not None:
                made += [target.replace(converter.target_patterns[0], p) for p in converter.target_patterns[1:]]
            recipe = _Recipe(made, converter)
            self._recipes |= dict.fromkeys(made, recipe)
        recipe.sources.append((source, pattern or source))

    def __contains__(self, name: str) -> bool:
        return name in self._recipes

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the named tensors in the files' precision, into memory of their own; yields pairs of name and tensor."""
        made: dict[str, Tensor] = {}
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}

            def tensor(source: str) -> Tensor:
                path = self._files[source]
                if path not in handles:
                    # Not mapped: pages of a mapped file would count as this process' memory.
                    handles[path] = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                return handles[path].get_tensor(source)

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
        headers = {path: _header(path) for path in {self._files[source] for source in sources}}
        return [(self._files[source], *headers[self._files[source]][source]) for source in sources]


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Map each tensor name in a folder's safetensors files to the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def folder_numbers(folder: Path) -> int:
    """Number of parameters in a folder's safetensors files; 0 where it has none."""
    count = 0
    for path in set(_files_of_tensors(folder).values()):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def _header(path: Path) -> dict[str, tuple[int, int]]:
    """Map each tensor of a safetensors file to its first byte and its end (format: 8 bytes of length, JSON, data)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    start = 8 + length
    offsets = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
    return {name: (start + first, start + last) for name, (first, last) in offsets.items()}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that orders integers in names by value: experts are stacked in that order."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
