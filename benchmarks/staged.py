"""Time of true-sequential calibration by the staged forward, against one forward of the block per site.

    python benchmarks/staged.py [--model DIR]

Both gather the same moments and solve nothing, so the ratio is that of calibration alone.
"""

import argparse
import time

import torch

from gptq_awq.calibration.activations import open_activations
from gptq_awq.calibration.sequential import observe_forward, staged_forward
from gptq_awq.data.corpora import WikiText2
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.load import AssetModel, LocalModel
from gptq_awq.models.topology import observe_sites


def main() -> None:
    """Time both ways on the first blocks of a model, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--blocks", type=int, default=6)
    options = parser.parse_args()
    source = LocalModel(path=options.model) if options.model else AssetModel(name="smollm2-135m", asset="smollm2-135m")
    loaded = source.load("float32", "cpu")
    tokens = WikiText2(split="valid", samples=32, seqlen=256).tokens(loaded.tokenizer, seed=0)
    _, blocks = find_blocks(loaded.model)
    activations = open_activations(loaded.model, blocks, tokens, 2048, torch.float32)
    staged = repeated = 0.0
    for index, block in enumerate(list(blocks)[: options.blocks]):
        sites = observe_sites(block, activations.probe_input(), activations.probe.calls[index], absorbers=False)
        start = time.perf_counter()
        with torch.no_grad():
            for site in sites:
                observe_forward(block, index, [site], activations, advance=False)
            activations.advance(block, index)
        repeated += time.perf_counter() - start
        start = time.perf_counter()
        staged_forward(block, index, sites, activations, lambda _site, _moments: None)
        staged += time.perf_counter() - start
    print(f"one forward per site: {repeated:.2f} s, staged: {staged:.2f} s, ratio {repeated / staged:.2f}")


if __name__ == "__main__":
    main()
