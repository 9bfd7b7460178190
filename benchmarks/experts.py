"""Quantization time of a mixture of many small experts against dense models with as many parameters.

    python benchmarks/experts.py [--method gptq] [--experts 64] [--inner 128] [--tokens 16384] [--profile] [--repeat 2]

All are randomly initialised Qwen3 models (time does not depend on the weights), on the same tokens. One dense model is
`wide`: its feed-forward layers are as wide as all experts together, and so are their Hessians. The other is `deep`:
ordinary proportions, more blocks. Ratios are of quantization times in one run, the fastest of `--repeat` turns each.
`--profile` prints where the mixture's time went, by function.
"""

import argparse
import cProfile
import math
import pstats
import time
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gptq_awq import quantize_model

SEQLEN, VOCAB, HEAD = 256, 2048, 64


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """Sizes that the mixture and the dense models have in common, as arguments of their configs."""
    heads = options.width // HEAD
    return {
        "vocab_size": VOCAB,
        "hidden_size": options.width,
        "num_hidden_layers": options.depth,
        "head_dim": HEAD,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": SEQLEN,
    }


def wide(options: argparse.Namespace) -> PreTrainedModel:
    """Dense model whose feed-forward layers are as wide as all experts together."""
    torch.manual_seed(0)
    config = Qwen3Config(**shared(options), intermediate_size=options.experts * options.inner)
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


def deep(options: argparse.Namespace) -> PreTrainedModel:
    """Dense model with feed-forward layers three times as wide as the hidden states, in more blocks."""
    torch.manual_seed(0)
    width = options.width
    wanted = options.depth * (4 * width**2 + 3 * width * options.experts * options.inner)
    blocks = max(1, round(wanted / (13 * width**2)))
    sizes: dict[str, Any] = shared(options) | {"num_hidden_layers": blocks, "intermediate_size": 3 * width}
    config = Qwen3Config(**sizes)
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


def mixture(options: argparse.Namespace) -> PreTrainedModel:
    """Mixture of `experts` feed-forward layers of width `inner` per block."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **shared(options),
        num_experts=options.experts,
        num_experts_per_tok=options.active,
        moe_intermediate_size=options.inner,
    )
    return Qwen3MoeForCausalLM(config).eval().requires_grad_(False)


def seconds(model: PreTrainedModel, ids: torch.Tensor, method: str) -> float:
    """Wall time of quantizing `model`, in seconds."""
    start = time.perf_counter()
    quantize_model(model, ids, method)
    return time.perf_counter() - start


def main() -> None:
    """Time the models in turns and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--active", type=int, default=8, help="experts per token")
    parser.add_argument("--inner", type=int, default=128, help="width inside of an expert")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--no-wide", action="store_true", help="leave out the wide model, whose factors take minutes")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    ids = torch.randint(VOCAB, (options.tokens // SEQLEN, SEQLEN), generator=torch.Generator().manual_seed(0))
    small = argparse.Namespace(**vars(options) | {"experts": 8, "depth": 1})
    makers = (mixture, deep) if options.no_wide else (mixture, deep, wide)
    for make in makers:  # compiles what gets compiled
        quantize_model(make(small), ids[:4], options.method)
    best = dict.fromkeys(makers, math.inf)
    for _ in range(options.repeat):
        for make in makers:
            best[make] = min(best[make], seconds(make(options), ids, options.method))
    print(f"{options.method}, {options.experts} experts of {options.width} x {options.inner}, {options.tokens} tokens")
    for make, taken in best.items():
        count = sum(p.numel() for p in make(options).model.layers.parameters()) / 1e6
        print(f"{make.__name__}: {taken:.2f} s, {count:.1f}M parameters, mixture / this: {best[mixture] / taken:.2f}")
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(quantize_model, mixture(options), ids, options.method)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
