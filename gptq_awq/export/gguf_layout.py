"""Where llama.cpp's converter puts every tensor of a model, observed; and `layout.npz`, which keeps it beside the file.

A GGUF tensor consists of runs of consecutive elements of the model's tensors: rows in another order, experts stacked,
fused matrices split. Packed blocks of 32 or 256 weights can follow where runs begin and end with whole blocks. Tensors
that the converter computes (norms + 1, -exp A) are kept in layout.npz as the model has them, so that a checkpoint can
be read back into a transformers model without the converter.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptq_awq.errors import UserError
from gptq_awq.export.folder import read_config, write_config, write_tokenizer
from gptq_awq.export.gguf_blocks import BLOCK_TYPES
from gptq_awq.export.gguf_converter import conversion, converter_root, imported, refusing
from gptq_awq.export.placement import Indices, Numbering, Runs
from gptq_awq.export.saved import SavedTensors, state_shapes
from gptq_awq.runtime.fingerprint import layout_sha256
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.atomic import replacing

LAYOUT = "layout.npz"


@dataclass(frozen=True)
class Part:
    """Elements of one of the model's tensors within a GGUF tensor, as runs.

    Attributes:
        name: name in the model's state dict.
        starts: first element of each run, in the flattened tensor (out, in).
        positions: where the run begins in the flattened GGUF tensor.
        lengths: number of elements.
    """

    name: str
    starts: Indices
    positions: Indices
    lengths: Indices

    def whole_blocks(self, block: int) -> bool:
        """Whether runs begin and end with whole blocks of `block` elements, in both tensors."""
        return not any((array % block).any() for array in (self.starts, self.positions, self.lengths))


@dataclass(frozen=True)
class Layout:
    """Layout of a GGUF file in terms of the model's tensors.

    Attributes:
        numbering: numbers of the elements of the model's tensors, matrices as (out, in).
        runs: GGUF tensor → the runs that it consists of; tensors that the converter computed are left out.
        computed: the model's tensors that are in no run → their values; without values before writing.
        exact: quantized weights whose codes could not follow, at least in part; float32 holds their values.
        flipped: weights that the model holds as (in, out).
    """

    numbering: Numbering
    runs: Mapping[str, Runs]
    computed: Mapping[str, np.ndarray] = field(default_factory=dict)
    exact: tuple[str, ...] = ()
    flipped: frozenset[str] = frozenset()

    def parts(self, tensor: str) -> list[Part]:
        """Parts of a GGUF tensor; none for a computed one."""
        runs = self.runs.get(tensor)
        return [] if runs is None else [Part(*split) for split in self.numbering.split(runs)]

    @property
    def computed_size(self) -> int:
        """Number of elements in computed tensors."""
        return sum(values.size for values in self.computed.values())

    def lost(self) -> list[str]:
        """Names of the model's tensors that are in no run."""
        found = {part.name for tensor in self.runs for part in self.parts(tensor)}
        return [name for name in self.numbering.shapes if name not in found]

    def types(self, kinds: Mapping[str, str]) -> dict[str, str]:
        """GGUF tensor → block type to store it in, or "F32" where its codes can't follow it.

        Args:
            kinds: tensors of the model that are quantized → block type of their grid.

        Raises:
            UserError: weights of several grids are stored in one tensor.
        """
        found = {}
        for tensor in self.runs:
            parts = self.parts(tensor)
            wanted = {kinds.get(part.name) for part in parts}
            if wanted == {None}:
                continue
            if len(wanted - {None}) > 1:
                of = {kinds[part.name]: part.name for part in parts if part.name in kinds}
                raise UserError(
                    "export.formats=gguf: llama.cpp has one block type for "
                    + " and ".join(f"{name} ({kind})" for kind, name in of.items())
                    + f" in {tensor}; choose one grid for them"
                )
            kind = next(iter(wanted - {None}))
            assert kind is not None
            fits = None not in wanted and all(part.whole_blocks(BLOCK_TYPES[kind].block) for part in parts)
            found[tensor] = kind if fits else "F32"
        return found

    def write(self, folder: Path) -> None:
        """Write layout.npz."""
        self.save(folder / LAYOUT)

    def save(self, path: Path) -> None:
        """Write the layout into a file."""
        head = {
            "shapes": self.numbering.shapes,
            "tensors": list(self.runs),
            "counts": [len(runs.starts) for runs in self.runs.values()],
            "exact": self.exact,
            "flipped": sorted(self.flipped),
        }
        arrays: dict[str, Any] = {f"computed/{name}": values for name, values in self.computed.items()}
        starts, lengths = ([getattr(runs, of) for runs in self.runs.values()] for of in ("starts", "lengths"))
        arrays["starts"] = np.diff(np.concatenate(starts), prepend=0)  # regular, and so small when compressed
        arrays["lengths"] = np.concatenate(lengths)
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def read(cls, folder: Path) -> "Layout":
        """Read layout.npz. Raises ValueError for one that contradicts itself."""
        return cls.load(folder / LAYOUT)

    @classmethod
    def load(cls, path: Path) -> "Layout":
        """Read a file that `save` wrote. Raises ValueError for one that contradicts itself."""
        with np.load(path, allow_pickle=False) as file:
            head = json.loads(file["head"].tobytes())
            cuts = np.cumsum(head["counts"])[:-1]
            starts, lengths = np.split(np.cumsum(file["starts"]), cuts), np.split(file["lengths"], cuts)
            computed = {key.removeprefix("computed/"): file[key] for key in file.files if key.startswith("computed/")}
        runs = {name: Runs(*pair) for name, *pair in zip(head["tensors"], starts, lengths, strict=True)}
        numbering = Numbering.of({name: tuple(shape) for name, shape in head["shapes"].items()})
        return cls(numbering, runs, computed, tuple(head["exact"]), frozenset(head["flipped"]))


def conv1d_weights(model: PreTrainedModel) -> set[str]:
    """Names of weights that modules hold as (in, out)."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


@contextmanager
def skeleton(model: PreTrainedModel, tokenizer: Any) -> Iterator[Path]:
    """Context manager of a folder with all that the converter reads of a model, but its tensors."""
    with TemporaryDirectory(prefix="gguf-") as path:
        folder = Path(path)
        write_config(model, folder, torch.float32, None)
        config = json.loads((folder / "config.json").read_text())
        config.pop("auto_map", None)  # code of the folder that the model came from
        (folder / "config.json").write_text(json.dumps(config))
        if tokenizer is None:  # of which the converter looks at the files, too
            rows = len(model.get_input_embeddings().get_parameter("weight"))
            content = {"added_tokens": [], "model": {"vocab": {str(row): row for row in range(rows)}}}
            (folder / "tokenizer.json").write_text(json.dumps(content))
            (folder / "tokenizer_config.json").write_text("{}")
        else:
            write_tokenizer(tokenizer, folder)
        yield folder


def modules_by_tensor(model: PreTrainedModel) -> dict[str, list[str]]:
    """GGUF tensor, without ".weight" → modules whose weights it consists of: one, or experts in order.

    Raises:
        UserError: an architecture that llama.cpp's converter doesn't know.
    """
    with skeleton(model, None) as folder:
        layout = observe(converter_root(None), folder, model)
    parts = {tensor: layout.parts(tensor) for tensor in layout.runs if tensor.endswith(".weight")}
    return {
        tensor.removesuffix(".weight"): [part.name.removesuffix(".weight") for part in own]
        for tensor, own in parts.items()
    }


def observe(root: Path, folder: Path, model: PreTrainedModel) -> Layout:
    """Observe where the converter puts a model's tensors; what the pinned one does is kept in the cache.

    Args:
        root: the converter (converter_root).
        folder: folder with the model's config.json.
        model: model whose shapes count, not its values.

    Raises:
        UserError: an architecture or a tensor that the converter doesn't know.
    """
    flipped = conv1d_weights(model)
    shapes = {n: s[::-1] if n in flipped else s for n, s in state_shapes(model).items()}
    numbering = Numbering.of(shapes)
    if root.suffix != ".zip":  # a checkout, which may change
        return _observed(root, folder, model, numbering, flipped)
    kept = cache_dir() / "layouts" / f"{layout_sha256(read_config(folder), shapes, root.name)}.npz"
    with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        return Layout.load(kept)
    layout = _observed(root, folder, model, numbering, flipped)
    with suppress(OSError):  # the next run observes again
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as scratch:
            layout.save(scratch)
    return layout


def _observed(root: Path, folder: Path, model: PreTrainedModel, numbering: Numbering, flipped: set[str]) -> Layout:
    """The layout, by having the converter convert tensors of numbered elements."""

    def numbers(number: int) -> SavedTensors:
        def read(names: Any) -> Iterator[tuple[str, Tensor]]:
            for name in names:
                digits = numbering.digits(name, number)
                yield name, digits.T if name in flipped else digits

        return SavedTensors(model, read)

    with imported(root) as package:
        passes = [_lazily(package, folder, numbers(number)) for number in range(numbering.passes)]
        runs = {name: numbering.runs([_eager(each[name]) for each in passes]) for name in passes[0]}
    placed = {name: found for name, found in runs.items() if found is not None}
    layout = Layout(numbering, placed, flipped=frozenset(flipped))
    if not layout.runs:
        raise UserError(
            f"export.formats=gguf: llama.cpp's converter leaves out all tensors of {type(model).__name__}; choose "
            "another format"
        )
    return layout


def _lazily(package: Any, folder: Path, tensors: SavedTensors) -> dict[str, Any]:
    """GGUF tensor → its lazy array."""
    options = {"dtype": "F32", "out": folder / "unused", "model_name": "", "vocabulary": None}
    found: dict[str, Any] = {}
    instance = conversion(package, folder, tensors, tensors.meta, **options, config=tensors.config, exact=())
    instance.gguf_writer.add_tensor = lambda name, tensor, **_: found.__setitem__(name, tensor)
    with refusing():
        instance.prepare_tensors()
    return found


def _eager(array: Any) -> np.ndarray:
    return type(array).to_eager(array) if hasattr(array, "_meta") else np.asarray(array)
