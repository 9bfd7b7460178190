"""Dequantized weights in a plain transformers folder: no smaller than the model was, and every engine loads it.

bfloat16 (8 significant bits) and float16 (11) round what codes and scales stand for; float32 holds it as it is. The
verifier compares with the weights so rounded.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source, torch_dtype
from gptq_awq.export.folder import read_config, write_folder
from gptq_awq.models.auto_class import auto_class
from gptq_awq.models.experts import unfuse
from gptq_awq.models.offload import each_tensor
from gptq_awq.models.offloaded_model import open_offloaded

QUANTIZED = "gptq_awq_quantized"
"""Key of config.json: names of the modules whose weights were quantized, and now are plain numbers."""


@dataclass(frozen=True)
class HFFormat:
    """A transformers folder.

    Attributes:
        dtype: of all floating-point numbers: bfloat16, float16 or float32.
        shard: largest file.

    Raises:
        UserError: a dtype that there isn't.
    """

    dtype: str = "bfloat16"
    shard: str = "4GB"
    name: str = "hf"

    def __post_init__(self) -> None:
        torch_dtype(self.dtype, "export.hf.dtype")

    @property
    def notes(self) -> tuple[str, ...]:
        """For the card."""
        exact = self.dtype == "float32"
        return () if exact else (f"Dequantized weights are rounded to {self.dtype}; export.hf.dtype=float32 isn't.",)

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:
        """Every grid fits."""

    def rounded(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Dequantized weights as the folder holds them."""
        return weight.to(torch_dtype(self.dtype, "export.hf.dtype"))

    def write(self, source: Source, folder: Path) -> None:
        """Write the folder. Raises UserError where a number overflows the dtype."""
        dtype = torch_dtype(self.dtype, "export.hf.dtype")
        write_folder(source, folder, self._dequantized(source), dtype, None, self.shard)
        config = read_config(folder) | {QUANTIZED: list(source.weights)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _dequantized(self, source: Source) -> Iterator[tuple[str, Tensor]]:
        for name, weight in source.weights.items():
            w = self.rounded(weight.dequantize().cpu())
            if not torch.isfinite(w).all():
                raise UserError(f"{name} overflows export.hf.dtype={self.dtype}; choose bfloat16 or float32")
            yield f"{name}.weight", w.T if isinstance(source.model.get_submodule(name), Conv1D) else w

    def plain(self, folder: Path) -> dict[str, Tensor]:
        """All tensors, by transformers' names, which are not always those in the files."""
        return _read(folder).state_dict()

    def decoder(self) -> str:
        """transformers itself."""
        return f"transformers {transformers.__version__}"

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Every weight that was quantized, in the folder's dtype."""
        config, quantized = AutoConfig.from_pretrained(folder), read_config(folder)[QUANTIZED]
        model = open_offloaded(
            folder, config, torch_dtype(self.dtype, "export.hf.dtype"), torch.device("cpu"), str(folder)
        )
        unfuse(model)
        for key, weight in each_tensor(model, {f"{name}.weight" for name in quantized}.__contains__):
            name = key.removesuffix(".weight")
            yield Decoded(name, None, (weight.T if isinstance(model.get_submodule(name), Conv1D) else weight).detach())


def _read(folder: Path) -> PreTrainedModel:
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype="auto")
