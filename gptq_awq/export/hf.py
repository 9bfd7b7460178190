"""Dequantized weights in a plain transformers folder, which every engine loads and which saves no space.

bfloat16 (8 significant bits) and float16 (11) round the dequantized weights; float32 stores them exactly. The verifier
compares with the rounded weights.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source, torch_dtype
from gptq_awq.export.config import read_config
from gptq_awq.export.folder import FolderTensors, write_folder
from gptq_awq.models.auto_class import auto_class
from gptq_awq.models.offload import each_tensor
from gptq_awq.models.offloaded_model import open_offloaded
from gptq_awq.models.unfuse import unfuse
from gptq_awq.runtime.options import ByteSize, Dtype, checked_dataclass

QUANTIZED = "gptq_awq_quantized"
"""Key of config.json that lists the modules whose weights were quantized before they were dequantized."""


@checked_dataclass
class HFFormat:
    """Export to a transformers folder of dequantized weights.

    Attributes:
        dtype: dtype of all floating-point tensors: bfloat16, float16 or float32.
        shard: maximum size of a safetensors file.

    Raises:
        UserError: an unknown dtype.
    """

    dtype: Dtype = "bfloat16"
    shard: ByteSize = "4GB"
    name: str = "hf"

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentence for the model card on the rounding of dequantized weights, unless dtype is float32."""
        exact = self.dtype == "float32"
        return () if exact else (f"Dequantized weights are rounded to {self.dtype}; export.hf.dtype=float32 isn't.",)

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:
        """Accept every grid, as weights are stored dequantized."""

    def rounded(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Round a dequantized weight to the dtype of the folder."""
        return weight.to(torch_dtype(self.dtype, "export.hf.dtype"))

    def write(self, source: Source, folder: Path) -> None:
        """Write the folder. Raises UserError where a parameter overflows the dtype."""
        dtype = torch_dtype(self.dtype, "export.hf.dtype")
        write_folder(source, folder, self._dequantized(source), dtype, self.shard)
        config = read_config(folder) | {QUANTIZED: list(source.weights)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _dequantized(self, source: Source) -> Iterator[tuple[str, Tensor]]:
        for name, weight in source.weights.items():
            w = self.rounded(weight.dequantize().cpu())
            if not torch.isfinite(w).all():
                raise UserError(f"{name} overflows export.hf.dtype={self.dtype}; choose bfloat16 or float32")
            yield f"{name}.weight", w.T if isinstance(source.model.get_submodule(name), Conv1D) else w

    def plain(self, folder: Path) -> dict[str, Tensor]:
        """All tensors by their names in transformers, which may differ from those in the files."""
        return _read(folder).state_dict()

    def decoder(self) -> str:
        """Name of the decoder: transformers and its version."""
        return f"transformers {transformers.__version__}"

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Read every weight that was quantized, in the folder's dtype and without codes."""
        config, quantized = _config(folder), read_config(folder)[QUANTIZED]
        model = open_offloaded(
            folder, config, torch_dtype(self.dtype, "export.hf.dtype"), torch.device("cpu"), str(folder)
        )
        unfuse(model)
        for key, weight in each_tensor(model, {f"{name}.weight" for name in quantized}.__contains__):
            name = key.removesuffix(".weight")
            yield Decoded(name, None, (weight.T if isinstance(model.get_submodule(name), Conv1D) else weight).detach())


def _read(folder: Path) -> PreTrainedModel:
    made = _config(folder)
    return auto_class(made).from_pretrained(folder, config=made, dtype="auto", trust_remote_code=False)


def _config(folder: Path) -> PreTrainedConfig:
    """Read config.json, and run no code of the folder. Raises ValueError for more layers than there are tensors."""
    made = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    layers = getattr(made.get_text_config(), "num_hidden_layers", None) or 0
    if layers > len(FolderTensors(folder)):
        raise ValueError(f"config.json claims {layers} layers")
    return made
