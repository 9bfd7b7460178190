"""Streamed second moments: their error against float64, and their time against a plain XᵀX.

python benchmarks/moments.py [--width 1536] [--tokens 16384]
"""

import argparse
import time

import torch

from gptq_awq.moments import MomentsSum


def main() -> None:
    """Print error and ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=16384)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(options.tokens, options.width, generator=generator)
    batches *= torch.logspace(-1, 1, options.width)  # channels of very different size, as activations have
    parts = batches.split(2048)

    start = time.perf_counter()
    total = MomentsSum(options.width, torch.device("cpu"))
    for part in parts:
        total.add(part, None)
    moments = total.finish("here")
    streamed = time.perf_counter() - start

    start = time.perf_counter()
    plain = torch.zeros(options.width, options.width)
    for part in parts:
        plain += part.T @ part
    direct = time.perf_counter() - start

    exact = batches.double().T @ batches.double() / len(batches)
    error = float((moments.hessian - exact).norm() / exact.norm())
    smallest = float(torch.linalg.eigvalsh(moments.hessian.double()).min() / exact.diagonal().mean())
    print(f"relative error {error:.1e}, smallest eigenvalue {smallest:.1e} of the mean diagonal")
    print(f"streamed {streamed:.2f} s, plain product {direct:.2f} s, ratio {direct / streamed:.2f}")


if __name__ == "__main__":
    main()
