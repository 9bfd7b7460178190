"""Read and write transformers folders: sharded safetensors with an index, configs and tokenizer."""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.export.base import Source
from gptq_awq.export.config import write_config
from gptq_awq.export.saved import (
    SavedTensors,
    Stored,
    blocks_by_name,
    read_state,
    renaming,
    saved,
    tied_names,
)
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.carried import carried, outdated_names
from gptq_awq.models.experts import experts_in
from gptq_awq.models.offload import each_tensor
from gptq_awq.runtime.memory import parse_bytes

log = logging.getLogger(__name__)
SHARD = "4GB"
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def write_folder(
    source: Source, folder: Path, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, shard: str = SHARD
) -> None:
    """Write a model with other weights in the original checkpoint's layout, which may join or split them.

    Args:
        source: the model; its other parameters are stored in `dtype`, tied ones once.
        folder: empty folder to write into.
        weights: (full name in the model, tensor) pairs that replace those of `source.weights`.
        dtype: dtype of all other floating-point tensors, also stated in config.json.
        shard: maximum size of a safetensors file.

    Raises:
        UserError: a parameter overflows `dtype`.
    """
    write_tensors(source, folder, chain(_fused(source, dtype, weights), _carried(source, dtype)), dtype, None, shard)


def write_packed(
    source: Source,
    folder: Path,
    weights: Mapping[str, Stored],
    parts: Callable[[str, QuantizedWeight], Mapping[str, Tensor]],
    dtype: torch.dtype,
    quantization_config: Mapping[str, Any],
    shard: str = SHARD,
) -> None:
    """Write a model with packed linears under the original checkpoint's names, one for each matrix of an expert.

    Args:
        source: the quantized model; its unpacked parameters are stored in `dtype`, tied ones once.
        folder: empty folder to write into.
        weights: those of the source by their names in the checkpoint, as `stored_weights` gives them.
        parts: packs a linear: name of the module that it is of, and weight → tensors by the last parts of their names.
        dtype: dtype of all unpacked floating-point tensors, also stated in config.json.
        quantization_config: entry of that name in config.json.
        shard: maximum size of a safetensors file.

    Raises:
        UserError: a parameter overflows `dtype`.
    """
    if experts_in(source.model):
        plain = _saved(source, dtype, {f"{name}.weight" for name in weights})
    else:
        rename = renaming(source.model)
        plain = ((rename(name), tensor) for name, tensor in plain_tensors(source, dtype))
    packed = ((f"{name}.{part}", x) for name, own in weights.items() for part, x in parts(*own).items())
    tensors = chain(plain, packed, _carried(source, dtype))
    write_tensors(source, folder, tensors, dtype, quantization_config, shard)


def _carried(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Tensors that transformers has no place for, under the names of the source's files; says which are left out."""
    if outdated := outdated_names(source.model):
        log.warning(
            "%d tensors of the source that transformers has no place for (%s …) are left out of the checkpoint: a "
            "transform changed what they read",
            len(outdated),
            outdated[0],
        )
    yield from carried(source.model, dtype)


def write_tensors(
    source: Source,
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    quantization_config: Mapping[str, Any] | None,
    shard: str = SHARD,
) -> None:
    """Write tensors in the order they come, with configs, tokenizer and processor; see `write_folder`."""
    shards = Shards(folder, shard)
    for name, tensor in tensors:
        shards.add(name, tensor)
    shards.finish()
    write_config(source.model, folder, dtype, quantization_config)
    if source.tokenizer is not None:
        write_tokenizer(source.tokenizer, folder)
    _copy_processor(source.model.name_or_path, folder)


def _saved(source: Source, dtype: torch.dtype, without: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Unquantized tensors in the original checkpoint's layout and in `dtype`."""
    tensors = SavedTensors(source.model, read_state(source.model))
    for name in tensors:
        if name not in without:
            yield name, stored(name, tensors[name], dtype)


def _fused(source: Source, dtype: torch.dtype, packed: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the original checkpoint's layout, one block at a time, as a fused expert tensor combines many."""
    _, blocks = find_blocks(source.model)
    block = blocks_by_name(source.model)

    def reverted(index: str | None, group: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of a block in the original layout; only those of `group` if the rest is written already."""
        plain = [] if index in written else plain_tensors(source, dtype, lambda name: block(name) == index)
        tensors = dict(chain(group, plain))
        written.add(index)
        return saved(source.model, tensors)

    written: set[str | None] = set()
    rest = [(index, ()) for index in [*map(str, range(len(blocks))), None]]  # blocks without packed tensors
    for index, group in chain(groupby(packed, key=lambda item: block(item[0])), rest):
        yield from reverted(index, group).items()


def _copy_processor(origin: str | None, folder: Path) -> None:
    """Copy a multimodal model's processor configs from the folder that it was loaded from, if it has any."""
    if not origin:
        return
    for path in (Path(origin) / file for file in PROCESSOR):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


class Shards:
    """Writer of sharded safetensors: collects tensors and writes a file whenever the next would exceed the limit."""

    def __init__(self, folder: Path, shard: str) -> None:
        self._folder, self._limit = folder, parse_bytes(shard)
        self._tensors: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._held = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; write the collected ones first where it would exceed the limit."""
        if self._tensors and self._held + tensor.nbytes > self._limit:
            self._flush()
        self._tensors[name] = tensor.contiguous()
        self._held += tensor.nbytes

    def finish(self) -> None:
        """Write the remaining tensors, give the files their final names, and index them if there are several."""
        self._flush()
        count = len(self._files)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        names = names if count > 1 else ["model.safetensors"]
        for i, name in enumerate(names):
            self._part(i).rename(self._folder / name)
        if count > 1:
            file_of_tensor = {
                tensor: name for name, tensors in zip(names, self._files, strict=True) for tensor in tensors
            }
            index = {"metadata": {"total_size": self._total}, "weight_map": file_of_tensor}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")

    def _flush(self) -> None:
        save_file(self._tensors, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._tensors))
        self._total += self._held
        self._tensors, self._held = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}"


def plain_tensors(
    source: Source, dtype: torch.dtype, wanted: Callable[[str], bool] = lambda _name: True
) -> Iterator[tuple[str, Tensor]]:
    """Unquantized tensors whose name is `wanted`, on the CPU in `dtype`; tied weights under one name.

    Integer tensors keep their dtype. Raises UserError where a value overflows `dtype`.
    """
    packed = {id(source.model.get_submodule(name).get_parameter("weight")) for name in source.weights}
    again = tied_names(source.model) | {f"{name}.weight" for name in source.weights}
    for name, tensor in each_tensor(source.model, lambda name: wanted(name) and name not in again):
        if id(tensor) not in packed:
            yield name, stored(name, tensor, dtype)


def stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a tensor on the CPU, in `dtype` unless it is of integers. Raises UserError where a value overflows."""
    value = tensor.detach().to("cpu", dtype) if tensor.is_floating_point() else tensor.detach().cpu()
    if not torch.isfinite(value).all():
        raise UserError(f"{name} overflows {str(dtype).removeprefix('torch.')}: export it as bfloat16 or float32")
    return value.clone(memory_format=torch.contiguous_format)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files as transformers 4 reads them, too, and copy the SentencePiece model it came with."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        path.write_text(
            json.dumps(_legacy_tokenizer(json.loads(path.read_text())), indent=2, ensure_ascii=False) + "\n"
        )
    model = Path(getattr(tokenizer, "name_or_path", None) or ".") / "tokenizer.model"
    if model.is_file():
        shutil.copyfile(model, folder / model.name)


def _legacy_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's config in the spelling before transformers 5, which later ones read alike."""
    found = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")}
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


class FolderTensors(Mapping[str, Tensor]):
    """Tensors of a folder's safetensors files by name, each read on access."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt", backend="pread") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
