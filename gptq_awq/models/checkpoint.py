"""The tensors of a transformers folder, by the names that a model knows them by, read when they are asked for.

Checkpoints name and cut tensors in their own way (an expert's three matrices one by one, where the model has all
experts' in one tensor): transformers' rules for loading say how, and are applied here to a block's tensors at a time.
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
    """How tensors of the model come to be: from which of the files' tensors, through which conversion."""

    targets: list[str]
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)
    """Names in the files, and the converter's pattern for each."""


class Checkpoint:
    """A folder's safetensors files as tensors of `model`, whose own may be without storage.

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
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(source, renamings, converters, prefix, names)
        if target not in names and source in names:
            target, pattern = source, None
        if target not in names:
            return  # such as the output head of a model that is used without
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
        """These tensors and their names in the model, in the files' precision; none is a view of a file."""
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
        recipe = self._recipes[name]
        if recipe.converter is None:
            return {name: tensor(recipe.sources[0][0])}
        converter = copy.deepcopy(recipe.converter)
        for source, pattern in recipe.sources:
            converter.add_tensor(recipe.targets[0], source, pattern, partial(tensor, source))  # pyright: ignore
        made = converter.convert(recipe.targets[0], model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def nbytes(self, names: Collection[str]) -> int:
        """What the files hold of these tensors."""
        spans = self._spans(names)
        return sum(stop - start for _, start, stop in spans)

    def read_ahead(self, names: Collection[str]) -> None:
        """Ask the system to have these tensors in its page cache soon; returns at once."""
        if not hasattr(os, "posix_fadvise"):  # Linux has it
            return
        for path, start, stop in self._spans(names):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def _spans(self, names: Collection[str]) -> list[tuple[Path, int, int]]:
        recipes = {id(recipe): recipe for recipe in (self._recipes[name] for name in names)}
        sources = [source for recipe in recipes.values() for source, _ in recipe.sources]
        headers = {path: _header(path) for path in {self._files[source] for source in sources}}
        return [(self._files[source], *headers[self._files[source]][source]) for source in sources]


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Tensor → the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def folder_numbers(folder: Path) -> int:
    """How many numbers a folder's safetensors files hold; 0 where it has none."""
    count = 0
    for path in set(_files_of_tensors(folder).values()):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def _header(path: Path) -> dict[str, tuple[int, int]]:
    """Tensor → where its bytes begin and end in the file (the format: 8 bytes of length, JSON, data)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    start = 8 + length
    offsets = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
    return {name: (start + first, start + last) for name, (first, last) in offsets.items()}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts numbers in names as numbers: experts are stacked in that order."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
