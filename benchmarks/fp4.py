"""GPTQ against range searches on NVFP4 and MXFP4: which lowers the KL more, and by how much?

    python benchmarks/fp4.py --model DIR --text FILE --test FILE [--seqlen 256] [--samples 64] [--windows 32] [--bytes]

Every grid with every choice of scales, rounded to nearest and by GPTQ and Qronos. KL from full precision is measured on
the same test windows; Δ and its p are of a paired test (block bootstrap) against rounding to nearest with the best
search of that grid. Seconds are of quantizing, beside GPTQ's on integers in groups of 32 in the same process. --bytes:
the model is small_model.py's, whose tokens are bytes.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_model import windows
from transformers import LlamaForCausalLM

from gptq_awq.api import load_method
from gptq_awq.data.corpora import LocalText
from gptq_awq.data.tokens import TokenSet, evaluation_windows
from gptq_awq.evaluation.divergence import divergence
from gptq_awq.evaluation.perplexity import token_losses
from gptq_awq.evaluation.statistics import paired_test
from gptq_awq.grids.base import Grid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.models.load import LocalModel
from gptq_awq.quantization.quantize import quantize

GRIDS = {
    "nvfp4": (ScaledFloatGrid(), ("minmax", "four_over_six", "mse", "hessian")),
    "mxfp4": (ScaledFloatGrid(group_size=32, scale="e8m0"), ("minmax", "mse", "hessian")),
}
METHODS = ("rtn", "gptq", "qronos")


def cases() -> Iterator[tuple[str, str, str, Grid]]:
    """Name of a grid, method, search, and the grid."""
    for name, (grid, searches) in GRIDS.items():
        for method in METHODS:
            for search in searches if method != "qronos" else searches[-1:]:
                yield name, method, search, replaced(grid, search)


def replaced(grid: Any, search: str) -> Grid:
    """The grid with another search."""
    return ScaledFloatGrid(grid.element, grid.group_size, grid.rows, grid.scale, search)  # pyright: ignore


def rounded(full: Any, tokens: TokenSet, method: str, grid: Grid) -> tuple[Any, float]:
    """A copy of the model on a grid, and the seconds that took."""
    model, (preset, _) = copy.deepcopy(full), load_method(method)
    started = time.perf_counter()
    for _ in quantize(model, tokens, preset, grid):
        pass
    return model, time.perf_counter() - started


def inputs(args: argparse.Namespace) -> tuple[Any, TokenSet, TokenSet]:
    """The model, calibration tokens and test windows."""
    if args.bytes:
        model = LlamaForCausalLM.from_pretrained(args.model).eval().requires_grad_(False)
        return model, windows(args.text, args.seqlen, args.samples), windows(args.test, args.seqlen, args.windows)
    loaded = LocalModel(path=args.model).load("float32", "cpu")
    calibration = LocalText(path=str(args.text), samples=args.samples, seqlen=args.seqlen)
    text = LocalText(path=str(args.test)).text("--test")
    test = evaluation_windows(text, loaded.tokenizer, args.seqlen, args.windows, "--windows")
    return loaded.model, calibration.tokens(loaded.tokenizer, seed=0), test


def main() -> None:
    """Quantize in every way, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--bytes", action="store_true")
    args = parser.parse_args()
    loaded, tokens, test = inputs(args)
    full = token_losses(loaded, test)
    rounded(loaded, tokens, "gptq", IntGrid(4, 32))  # compiles
    _, integers = rounded(loaded, tokens, "gptq", IntGrid(4, 32, scale_dtype="float16", search="hessian"))
    print(f"GPTQ on integers in groups of 32: {integers:.1f} s\n")
    print("| grid | method | search | KL | seconds / GPTQ's on integers |\n|:---|:---|:---|---:|---:|")
    found: dict[tuple[str, str, str], np.ndarray] = {}
    for name, method, search, grid in cases():
        torch.manual_seed(0)
        model, seconds = rounded(loaded, tokens, method, grid)
        kl = divergence(model, test, full).kl.double().numpy().flatten()
        found[name, method, search] = kl
        print(f"| {name} | {method} | {search} | {kl.mean():.5f} | {seconds / integers:.2f} |", flush=True)
    print("\n| grid | method | search | Δ KL from the best search to nearest | p |\n|:---|:---|:---|---:|---:|")
    for name in GRIDS:
        best = min((key for key in found if key[:2] == (name, "rtn")), key=lambda key: found[key].mean())
        for key, kl in found.items():
            if key[0] == name and key[1] != "rtn":
                paired = paired_test(found[best], kl)
                print(f"| {name} | {key[1]} | {key[2]} | {paired.delta:+.5f} | {paired.p_value:.4f} |")


if __name__ == "__main__":
    main()
