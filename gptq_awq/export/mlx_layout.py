"""Where mlx-lm puts every tensor of a model: its own class of the model is asked, with tensors of numbered elements.

mlx-lm's `sanitize` turns a published checkpoint's tensors into those of its class: experts are stacked, fused matrices
split, some tensors computed (norms + 1). Blocks are given to it one after the other; all other tensors are NaN then,
which nothing evaluates: MLX computes what is asked for only.
"""

import importlib.util
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.alike import watched
from gptq_awq.export.base import in_words_of
from gptq_awq.export.config import read_config, write_config
from gptq_awq.export.layout import Layout, digits_of, kept_layout, numbered
from gptq_awq.export.mlx_options import made, options_for_mlx
from gptq_awq.export.placement import Numbering, Runs
from gptq_awq.export.saved import Read, SavedTensors, View, read_state, saved
from gptq_awq.export.text_part import text_tensors
from gptq_awq.models.experts import experts_in, fused_tensors
from gptq_awq.runtime.fingerprint import layout_sha256

NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
"""The block that a tensor is in, by its name in mlx-lm."""


@dataclass(frozen=True)
class Conversion:
    """mlx-lm's conversion of one model.

    Attributes:
        model: model that is converted.
        config: its config.json.
    """

    model: PreTrainedModel
    config: Mapping[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Conversion":
        """The conversion of a model. Raises UserError where mlx-lm isn't installed."""
        if importlib.util.find_spec("mlx_lm") is None:
            raise UserError(
                "export.formats=mlx: mlx-lm says where tensors go, and it is not installed here: pip install mlx-lm, "
                "on Linux also 'mlx[cpu]'"
            )
        with TemporaryDirectory(prefix="mlx-") as path:
            write_config(model, Path(path), torch.float32, None)
            config = read_config(Path(path))
        with in_words_of(f"mlx: mlx refuses this {type(model).__name__}"):
            return cls(model, options_for_mlx(model.config, config))

    @cached_property
    def _text(self) -> set[str]:
        """Names of the language model's tensors; mlx-lm has no place for what a model sees with."""
        return text_tensors(self.model)

    @property
    def _numbered(self) -> tuple[Numbering, frozenset[str]]:
        """Numbers of the elements of the language model's tensors."""
        return numbered(self.model, self._text)

    def _held(self, read: Read, spelling: "Spelling") -> SavedTensors:
        """The tensors of a checkpoint of the language model, in a spelling."""
        return SavedTensors(self.model, read, self._text, spelling.view)

    def layout(self) -> Layout:
        """Where the model's tensors go; kept in the cache. Raises UserError for a model that mlx-lm doesn't know."""
        name = layout_sha256(self.config, self._numbered[0].shapes, f"mlx-lm {version('mlx-lm')}")
        return kept_layout(name, self._observed)

    def tensors(self, read: Read, only: Collection[str | None] | None = None) -> Iterator[tuple[str, Tensor]]:
        """mlx-lm's tensors of a model whose tensors `read` gives, block by block, in float32 where they are floats.

        Args:
            read: reads tensors by their names in the model's state dict.
            only: blocks that are converted; None: all, and what is in no block, which is a None among them.

        Raises:
            UserError: a model that mlx-lm doesn't know, or whose blocks it doesn't convert one by one.
        """
        import mlx.core as mx  # pyright: ignore[reportMissingImports]

        spelling = self._spelling
        held = self._held(read, spelling)
        nothing = _empty(held)
        for block, names in held.by_block().items():
            if only is not None and block not in only:
                continue
            given = {name: mx.array(_as_numpy(held[name])) for name in names}
            for name, array in sorted(self._converted(nothing | given, spelling).items()):
                if _block_of(name) == block:
                    yield name, _checked(name, np.array(array))

    @cached_property
    def _spelling(self) -> "Spelling":
        """The spelling of checkpoints that mlx-lm knows, the published one first; others are tried in turn."""
        spellings = [
            Spelling(saved),
            Spelling(saved, self._bare),
            Spelling(saved, self._experts_as_weights),
            Spelling(fused_tensors),
        ]
        failure: Exception | None = None
        with in_words_of(f"mlx: mlx refuses this {type(self.model).__name__}"):
            for spelling in spellings:
                try:
                    self._converted(_empty(self._held(read_state(self.model), spelling)), spelling)
                except Exception as error:  # classes stumble over what they don't know in many ways
                    failure = failure or error
                else:
                    return spelling
            assert failure is not None
            raise failure

    def _observed(self) -> Layout:
        """The layout, by having mlx-lm convert tensors of numbered elements."""
        numbering, flipped = self._numbered

        def watch(blocks: Collection[str | None]) -> dict[str, Runs | None]:
            read = [digits_of(numbering, flipped, number) for number in range(numbering.passes)]
            passes = zip(*(self.tensors(each, blocks) for each in read), strict=True)
            return {each[0][0]: numbering.runs([tensor.numpy() for _, tensor in each]) for each in passes}

        runs = watched(self.model, numbering, _block_of, watch)
        return Layout(numbering, {name: found for name, found in runs.items() if found is not None}, flipped=flipped)

    def _converted(self, tensors: Mapping[str, Any], spelling: "Spelling") -> dict[str, Any]:
        """The tensors as mlx-lm names them, which must be those that its class has."""
        theirs = made(self.config)  # sanitize may change it; weights aren't computed
        given = dict(map(spelling.named, tensors, tensors.values()))
        found = theirs.sanitize(given) if hasattr(theirs, "sanitize") else given
        theirs.load_weights(list(found.items()), strict=True)
        return found

    def _bare(self, name: str, array: Any) -> tuple[str, Any]:
        """A tensor under its name in a checkpoint without a head, which has no prefix of the decoder."""
        return name.removeprefix(f"{self.model.base_model_prefix}."), array

    def _experts_as_weights(self, name: str, array: Any) -> tuple[str, Any]:
        """Experts in one tensor as the weight (experts, out, in) of a module of that name."""
        experts = experts_in(self.model).get(name)
        if experts is None:
            return name, array
        return f"{name}.weight", array.swapaxes(-1, -2) if experts.transposed else array


class Spelling(NamedTuple):
    """How a checkpoint's tensors are spelled.

    Attributes:
        view: a model, and tensors of its state dict → tensors of a checkpoint.
        named: a tensor and its name there → its name and the tensor as mlx-lm is given them.
    """

    view: View
    named: Callable[[str, Any], tuple[str, Any]] = lambda name, array: (name, array)


def _empty(held: SavedTensors) -> dict[str, Any]:
    """A checkpoint's tensors without values: NaN, which nothing evaluates."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports]

    return {name: mx.broadcast_to(mx.array(float("nan")), tensor.shape) for name, tensor in held.meta.items()}


def _block_of(name: str) -> str | None:
    """The block that one of mlx-lm's tensors is in."""
    found = NUMBER.search(name)
    return found[1] if found else None


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's values; floats in float32, as numpy has no bfloat16."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _checked(name: str, array: np.ndarray) -> Tensor:
    """A converted tensor. Raises UserError for one that is of several blocks, or of none."""
    if np.isnan(array).any():
        raise UserError(f"export.formats=mlx: mlx-lm computes {name} from several blocks; choose another format")
    return torch.from_numpy(array)
