"""Time of each method, in units of one plain forward of the calibration text through the model.

    python benchmarks/quantize.py [--model DIR] [--methods rtn gptq awq awq_gptq] [--bits 4]

Every method runs in its own process; its peak memory is the process's (loading included, evaluation not).
"""

import argparse
import json
import subprocess
import sys
import time

import torch

from gptq_awq import quantize_model
from gptq_awq.data.corpora import WikiText2
from gptq_awq.models.load import AssetModel, LocalModel
from gptq_awq.runtime import memory

CPU = torch.device("cpu")


def measure(model_path: str | None, method: str, bits: int, samples: int, seqlen: int) -> dict[str, float]:
    """Measure seconds of a forward and of quantization, and peak memory in bytes, in this process."""
    source = LocalModel(path=model_path) if model_path else AssetModel(name="smollm2-135m", asset="smollm2-135m")
    loaded = source.load("float32", "cpu")
    tokens = WikiText2(split="valid", samples=samples, seqlen=seqlen).tokens(loaded.tokenizer, seed=0)
    decoder = loaded.model.get_decoder()
    decoder(tokens.ids[:4])  # pages in the weights, warms up the matmuls
    start = time.perf_counter()
    with torch.no_grad():
        for batch in tokens.ids.split(4):
            decoder(batch, use_cache=False)
    forward = time.perf_counter() - start
    memory.reset_peak(CPU)
    start = time.perf_counter()
    quantize_model(loaded.model, tokens, method, bits)
    return {"forward": forward, "quantize": time.perf_counter() - start, "peak": memory.peak_bytes(CPU)}


def main() -> None:
    """Measure each method in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "awq", "awq_gptq"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.model, options.child, options.bits, options.samples, options.seqlen)))
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.cpu.get_capabilities().get('cpu_name')}"
    )
    print("| method | one forward | quantize | in forwards | peak memory |\n|:---|---:|---:|---:|---:|")
    for method in options.methods:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--child", method], capture_output=True, text=True, check=True
        )
        row = json.loads(done.stdout.splitlines()[-1])
        seconds = f"{row['forward']:.1f} s | {row['quantize']:.1f} s | {row['quantize'] / row['forward']:.2f}"
        print(f"| {method} | {seconds} | {row['peak'] / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
