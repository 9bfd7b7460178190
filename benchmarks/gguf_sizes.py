"""GGUF files of given sizes: `grid=gguf` with GPTQ against llama.cpp's mixes with and without an importance matrix.

    python benchmarks/gguf_sizes.py --library libggml-base.so --model DIR --text FILE --test FILE [--types q4_k_m …]
        [--budgets 80MB …] [--bytes]

Arguments are those of ggml_types.py and fp4.py. For each of llama.cpp's file types: its mix, every tensor rounded by
`ggml_quantize_chunk` without and with an importance matrix; GPTQ on the same mix; and types chosen for each weight
under that mix's size, embedding and head included, rounded by GPTQ. A budget is held against the smallest of
llama.cpp's files that has at least its size. Sizes are of the blocks of all these weights.
"""

import argparse
import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from fp4 import inputs
from ggml_types import GGML

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

TYPES: Any = (
    *("q2_k", "iq3_xxs", "iq3_s", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
    *("iq4_nl", "q4_0", "q5_0", "q5_1"),
)


@dataclass
class Contest:
    """A model, its calibration windows, and what files are scored on.

    Attributes:
        full: the model.
        tokens: calibration windows.
        test: windows that KL is measured on.
        ggml: llama.cpp's quantizer.
        method: solver of ours.
    """

    full: Any
    tokens: Any
    test: Any
    ggml: GGML
    method: str
    squares: dict[str, torch.Tensor] = field(init=False)
    baseline: Any = field(init=False)
    output: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.squares = {name: own.squares for name, own in input_statistics(self.full, self.tokens).items()}
        self.baseline = token_losses(self.full, self.test)
        self.output = {name: weight.clone() for name, weight in self.full.lm_head.named_parameters()}

    def theirs(self, mix: LlamaMix, matrix: bool) -> tuple[float, int]:
        """KL and bytes of llama.cpp's file of a type."""
        model, size = copy.deepcopy(self.full), 0
        for name, grid in assign_grids(model, mix).items():
            weight, kind = model.get_submodule(name).weight.data, ggml_type(grid)
            assert kind is not None
            weight.copy_(self.ggml.rounded(kind, weight, self.squares.get(name) if matrix else None))
            rows, width = gguf.quant_shape_to_byte_shape(weight.shape, gguf.GGMLQuantizationType[kind.upper()])
            size += rows * width
        return self.kl(model), size

    def ours(self, grid: Any) -> tuple[float, int]:
        """KL and bytes of our file on a mix."""
        model, (preset, _), size = copy.deepcopy(self.full), load_method(self.method), 0
        for block in quantize(model, self.tokens, preset, grid):
            size += sum(pack_weight(weight)[1].size for weight in block.weights.values())
        return self.kl(model), size

    def chosen(self, budget: Any, cache: Path | None) -> tuple[float, int]:
        """KL and bytes of our file under a budget."""
        method, _ = load_method(self.method)
        grid = GGUFGrid(budget, TYPES, search="hessian")
        return self.ours(allocate(self.full, self.tokens, method, grid, cache=cache).grid)

    def kl(self, model: Any) -> float:
        """Mean KL from full precision on the test windows, in nats per token."""
        return float(divergence(model, self.test, self.baseline, output=self.output).kl.double().mean())


def main() -> None:
    """Make every file, score it, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("library", "text", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--types", nargs="+", default=["q2_k", "q3_k_m", "q4_k_m", "q5_k_m"])
    parser.add_argument("--budgets", nargs="*", default=[])
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--cache", type=Path, help="folder to keep sensitivities in, for several budgets")
    args = parser.parse_args()
    full, _, tokens, test = inputs(args)
    contest = Contest(full, tokens, test, GGML(args.library.resolve()), args.method)
    print("| size of | kB | llama.cpp | with imatrix | GPTQ | types chosen | kB | / imatrix | / GPTQ's |")
    print("|:---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    anchors = []
    for kind in args.types:
        mix: Any = LlamaMix(kind, "hessian")
        (plain, _), (anchor, size), (same, own) = (
            contest.theirs(mix, False),
            contest.theirs(mix, True),
            contest.ours(mix),
        )
        assert own == size
        anchors.append((size, kind, anchor))
        kl, taken = contest.chosen(kind, args.cache)
        row = f"| {kind} | {size / 1e3:.0f} | {plain:.4f} | {anchor:.4f} | {same:.4f} | {kl:.4f} | {taken / 1e3:.0f} |"
        print(f"{row} {kl / anchor:.2f} | {kl / same:.2f} |", flush=True)
    if args.budgets:
        print("\n| budget | kB | KL | llama.cpp's file | kB | with imatrix | ratio |")
        print("|:---|---:|---:|:---|---:|---:|---:|", flush=True)
    for budget in args.budgets:
        kl, taken = contest.chosen(budget, args.cache)
        size, kind, anchor = min((each for each in anchors if each[0] >= taken), default=max(anchors))
        row = f"| {budget} | {taken / 1e3:.0f} | {kl:.4f} | {kind} | {size / 1e3:.0f} | {anchor:.4f} |"
        print(f"{row} {kl / anchor:.2f} |", flush=True)


if __name__ == "__main__":
    main()
