"""Second moments accumulated over batches: error against float64, and time against a plain XᵀX.

python benchmarks/moments.py [--width 1536] [--tokens 16384]
"""

import argparse
import time

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.calibration.moments import MomentsSum


def main() -> None:
    """Measure activations in float32 and in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=16384)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(options.tokens, options.width, generator=generator)
    batches *= torch.logspace(-1, 1, options.width)  # channels of very different size, as activations have
    for dtype in (torch.float32, torch.bfloat16):
        measure(batches.to(dtype))


def measure(batches: Float[Tensor, "tokens width"]) -> None:
    """Print error and time ratio for one matrix of activations."""
    parts = batches.split(2048)
    MomentsSum(batches.shape[1], torch.device("cpu")).add(parts[0], None)  # compiles
    start = time.perf_counter()
    total = MomentsSum(batches.shape[1], torch.device("cpu"))
    for part in parts:
        total.add(part, None)
    moments = total.finish("benchmark")
    accumulated = time.perf_counter() - start

    start = time.perf_counter()
    plain = torch.zeros(batches.shape[1], batches.shape[1])
    for part in parts:
        plain += part.float().T @ part.float()
    direct = time.perf_counter() - start

    exact = batches.double().T @ batches.double() / len(batches)
    error = float((moments.hessian - exact).norm() / exact.norm())
    smallest = float(torch.linalg.eigvalsh(moments.hessian.double()).min() / exact.diagonal().mean())
    print(f"{batches.dtype}: relative error {error:.1e}, smallest eigenvalue {smallest:.1e} of the mean diagonal")
    print(f"  accumulated {accumulated:.2f} s, plain float32 product {direct:.2f} s, ratio {direct / accumulated:.2f}")


if __name__ == "__main__":
    main()
