"""GGUF files of llama.cpp's sizes: `grid=gguf` with GPTQ against llama.cpp's mixes with an importance matrix.

    python benchmarks/gguf_sizes.py --library libggml-base.so --model DIR --text FILE --test FILE [--types q4_k_m …]

Arguments are those of ggml_types.py. For each of llama.cpp's file types: its mix, every tensor rounded by
`ggml_quantize_chunk` with an importance matrix; GPTQ on the same mix; and types chosen for each weight under that mix's
size, embedding and head included, rounded by GPTQ. Sizes are of the blocks of all these weights.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from ggml_types import GGML
from small_model import windows
from transformers import LlamaForCausalLM

from gptq_awq.allocation.allocate import allocate
from gptq_awq.api import load_method
from gptq_awq.calibration.input_statistics import input_statistics
from gptq_awq.evaluation.divergence import divergence
from gptq_awq.evaluation.perplexity import token_losses
from gptq_awq.export.gguf import ggml_type, pack_weight
from gptq_awq.grids.gguf import GGUFGrid
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.quantization.quantize import quantize
from gptq_awq.quantization.targets import assign_grids

TYPES: Any = ("q2_k", "iq3_xxs", "iq3_s", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")


def ours(full: Any, grid: Any, tokens: Any, solver: str = "gptq") -> tuple[Any, int]:
    """A copy of the model on a mix, and the bytes of its blocks."""
    model, (preset, _), size = copy.deepcopy(full), load_method(solver), 0
    for block in quantize(model, tokens, preset, grid):
        size += sum(pack_weight(weight)[1].size for weight in block.weights.values())
    return model, size


def theirs(full: Any, mix: LlamaMix, ggml: GGML, squares: dict[str, torch.Tensor]) -> Any:
    """A copy of the model with every weight of the mix rounded by llama.cpp."""
    model = copy.deepcopy(full)
    for name, grid in assign_grids(model, mix).items():
        weight, kind = model.get_submodule(name).weight.data, ggml_type(grid)
        assert kind is not None
        weight.copy_(ggml.rounded(kind, weight, squares.get(name)))
    return model


def main() -> None:
    """Make every file, score it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("library", "text", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--types", nargs="+", default=["q2_k", "q3_k_m", "q4_k_m", "q5_k_m"])
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    args = parser.parse_args()
    full = LlamaForCausalLM.from_pretrained(args.model).eval().requires_grad_(False)
    tokens, test = windows(args.text, args.seqlen, args.samples), windows(args.test, args.seqlen, args.windows)
    squares = {name: own.squares for name, own in input_statistics(full, tokens).items()}
    baseline, ggml, output = (
        token_losses(full, test),
        GGML(args.library.resolve()),
        dict(full.lm_head.named_parameters()),
    )
    method, _ = load_method("gptq")

    def kl(model: Any) -> float:
        return float(divergence(model, test, baseline, output=output).kl.double().mean())

    print("| size of | kB | llama.cpp, imatrix | GPTQ | types chosen, GPTQ | / llama.cpp's | / GPTQ's |")
    print("|:---|---:|---:|---:|---:|---:|---:|")
    for kind in args.types:
        mix: Any = LlamaMix(kind, "hessian")
        anchor, (plain, size) = kl(theirs(full, mix, ggml, squares)), ours(full, mix, tokens)
        found = allocate(full, tokens, method, GGUFGrid(kind, TYPES, search="hessian"), cache=None)
        chosen, own = ours(full, found.grid, tokens)
        assert own <= size
        a, b, c = anchor, kl(plain), kl(chosen)
        print(f"| {kind} | {size / 1e3:.0f} | {a:.4f} | {b:.4f} | {c:.4f} | {c / a:.2f} | {c / b:.2f} |", flush=True)


if __name__ == "__main__":
    main()
