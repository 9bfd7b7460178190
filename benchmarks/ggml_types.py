"""GPTQ onto llama.cpp's types against llama.cpp's own quantizer with an importance matrix, at equal bytes.

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-*.tgz
    python benchmarks/ggml_types.py --library package/bins/linux-x64/libggml-base.so --model DIR --text FILE --test FILE

The model is small_model.py's, whose widths are multiples of 256 and whose tokens are bytes. `ggml_quantize_chunk`,
which llama-quantize calls for every tensor, rounds each linear of the blocks by the squares of what enters it in the
calibration text; ours are rounding to nearest, GPTQ and Qronos on the same grid and text, with a search for scales. All
are packed and decoded by the gguf library. KL is from full precision; the ratio is to the quantizer's with its
importance matrix.
"""

import argparse
import copy
import ctypes
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from small_model import windows
from transformers import LlamaForCausalLM

from gptq_awq.api import load_method
from gptq_awq.calibration.input_statistics import input_statistics
from gptq_awq.evaluation.divergence import divergence
from gptq_awq.evaluation.perplexity import token_losses
from gptq_awq.export.gguf import pack_weight
from gptq_awq.grids.mix import llama_grid
from gptq_awq.quantization.quantize import quantize

TYPES = ("q4_0", "iq4_xs", "mxfp4", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs")


class GGML:
    """llama.cpp's quantizer, in its shared library."""

    def __init__(self, path: Path) -> None:
        self._call = ctypes.CDLL(str(path)).ggml_quantize_chunk
        self._call.restype = ctypes.c_size_t

    def rounded(self, kind: str, weight: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
        """A weight rounded to a type and decoded, by the squares of its inputs if given."""
        source = np.ascontiguousarray(weight.numpy(), np.float32)
        ggml = gguf.GGMLQuantizationType[kind.upper()]
        packed = np.zeros(gguf.quant_shape_to_byte_shape(source.shape, ggml), np.uint8)
        rows, columns = source.shape
        matrix = None if squares is None else np.ascontiguousarray(squares.numpy(), np.float32)
        self._call(
            ctypes.c_int(ggml),
            source.ctypes.data_as(ctypes.c_void_p),
            packed.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            None if matrix is None else matrix.ctypes.data_as(ctypes.c_void_p),
        )
        return torch.from_numpy(gguf.quants.dequantize(packed, ggml))


def theirs(full: Any, kind: str, ggml: GGML, squares: dict[str, torch.Tensor]) -> Any:
    """A copy of the model with llama.cpp's weights."""
    model = copy.deepcopy(full)
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.copy_(ggml.rounded(kind, module.weight.data, squares[f"model.layers.{name}"]))
    return model


def ours(full: Any, kind: str, method: str, search: str, tokens: Any) -> Any:
    """A copy of the model with weights of ours, decoded from their packed blocks."""
    model, (preset, _) = copy.deepcopy(full), load_method(method)
    for block in quantize(model, tokens, preset, llama_grid(kind, search)):
        for name, weight in block.weights.items():
            stored, data = pack_weight(weight)
            decoded = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[stored])
            model.get_submodule(name).weight.data.copy_(torch.from_numpy(decoded))
    return model


def cases(full: Any, kind: str, ggml: GGML, squares: dict[str, torch.Tensor], tokens: Any) -> Iterator[tuple[str, Any]]:
    """Names and models of all ways to round to a type."""
    yield "llama.cpp, imatrix", theirs(full, kind, ggml, squares)
    for method, search in (("rtn", "mse"), ("gptq", "mse"), ("gptq", "hessian"), ("qronos", "hessian")):
        yield f"{method}, {search}", ours(full, kind, method, search, tokens)


def main() -> None:
    """Round to every type in every way, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    args = parser.parse_args()
    full = LlamaForCausalLM.from_pretrained(args.model).eval().requires_grad_(False)
    tokens, test = windows(args.text, args.seqlen, args.samples), windows(args.test, args.seqlen, args.windows)
    squares = {name: own.squares for name, own in input_statistics(full, tokens).items()}
    baseline, ggml = token_losses(full, test), GGML(args.library.resolve())
    print("| type | by | KL | KL / llama.cpp's | seconds |\n|:---|:---|---:|---:|---:|")
    for kind in args.types:
        anchor, started = None, time.perf_counter()
        for name, model in cases(full, kind, ggml, squares, tokens):
            seconds = time.perf_counter() - started
            kl = float(divergence(model, test, baseline).kl.double().mean())
            anchor = anchor or kl
            print(f"| {kind} | {name} | {kl:.4f} | {kl / anchor:.2f} | {seconds:.1f} |", flush=True)
            started = time.perf_counter()


if __name__ == "__main__":
    main()
