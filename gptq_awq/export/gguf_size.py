"""Size of a GGUF file besides some of its weights: metadata, vocabulary, norms, and what stays in 16 bits."""

from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

from gptq_awq.export.gguf_converter import Vocabulary, converter_root
from gptq_awq.export.gguf_file import write_gguf
from gptq_awq.export.gguf_layout import observe, skeleton

STAND_IN = "Q4_0"
"""Type that the weights are written in to measure the rest; it takes any width that llama.cpp has blocks for."""
ALIGNMENT = 32
"""Bytes that every tensor is padded to."""


def gguf_bytes_beside(model: PreTrainedModel, tokenizer: Any, names: Sequence[str]) -> int:
    """Bytes of the model's GGUF file besides the blocks of these weights, paddings after them included at their most.

    A file is written, with zeros for the weights, and measured: nothing else knows what a vocabulary takes.

    Raises:
        UserError: an architecture or a tokenizer that llama.cpp does not support.
    """
    zeros = {}
    for name in names:
        rows, columns = model.get_submodule(name).get_parameter("weight").shape
        width = gguf.quant_shape_to_byte_shape((rows, columns), gguf.GGMLQuantizationType[STAND_IN])[1]
        zeros[f"{name}.weight"] = (STAND_IN, np.zeros((rows, width), np.uint8))
    root, vocabulary = converter_root(None), None if tokenizer is None else Vocabulary("default")
    options = {"dtype": "F16", "model_name": "model", "vocabulary": vocabulary}
    with skeleton(model, tokenizer) as folder:
        layout, path = observe(root, folder, model), folder / "model.gguf"
        write_gguf(path, root, folder, model, layout, zeros, {}, options)
        size = path.stat().st_size
    return size - sum(data.size for _, data in zeros.values()) + ALIGNMENT * len(names)
