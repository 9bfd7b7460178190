"""Every checkpoint format in every engine that runs it: seconds to pack and to verify, KL, perplexity.

    python benchmarks/engines.py [--model DIR] [--group 64] [--only gptq awq …] [--engines vllm mlx …]

Each case quantizes the model anew (round to nearest, except one GPTQ case with act_order), writes and decodes the
checkpoint, and lets engines run it on the same 2 × 256 tokens. KL is from a transformers model in float32 with the
decoded weights to the engine's own logits. Engines: `python scripts/install_engine.py NAME`.
"""

import argparse
import copy
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gptq_awq.api import quantize_model
from gptq_awq.data.corpora import LocalText, WikiText2
from gptq_awq.data.tokens import evaluation_windows
from gptq_awq.errors import UserError
from gptq_awq.export.awq import AWQFormat
from gptq_awq.export.base import Format, Source
from gptq_awq.export.bnb import BnbFormat
from gptq_awq.export.compressed_tensors import CompressedTensorsFormat
from gptq_awq.export.engines import ENGINES, find
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.gptq import GPTQFormat
from gptq_awq.export.hf import HFFormat
from gptq_awq.export.mlx import MLXFormat
from gptq_awq.export.reference import judge_engine
from gptq_awq.export.verify import Probe
from gptq_awq.export.write import Exports
from gptq_awq.grids.base import GridChoice
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.grids.table import TableGrid
from gptq_awq.models.load import AssetModel, LoadedModel, LocalModel
from gptq_awq.quantization.method import Method
from gptq_awq.runtime.progress import no_track
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN

ROUND = Method("rtn", RTN())
SCATTERED = Method("gptq", GPTQ(act_order=True))


@dataclass(frozen=True)
class Case:
    """A checkpoint to write: its format, the grid of its codes, and the method that computes them."""

    name: str
    format: Format
    grid: GridChoice
    method: Method = ROUND


def cases(group: int) -> list[Case]:
    """All cases, with groups of `group` columns where the format allows any."""

    def ints(bits: int, sym: bool, size: int = group) -> IntGrid:
        return IntGrid(bits, size, sym, scale_dtype="float16")

    gptq, awq, packed = GPTQFormat(), AWQFormat(), CompressedTensorsFormat()
    llama = [
        Case(kind, GGUFFormat(other_ids="allow"), LlamaMix(kind))
        for kind in ("q8_0", "q5_0", "q4_0", "q4_1", "q4_k_m", "q3_k_m", "q2_k")
    ]
    return [
        *(Case(f"{bits} bits sym", gptq, ints(bits, True)) for bits in (2, 3, 4, 8)),
        Case("4 bits asym (v2)", gptq, ints(4, False)),
        Case("4 bits sym, channel", gptq, ints(4, True, -1)),
        Case("4 bits sym, act_order", gptq, ints(4, True), SCATTERED),
        Case("4 bits asym", awq, ints(4, False)),
        Case("W4A16 sym", packed, ints(4, True)),
        Case("W4A16 asym", packed, ints(4, False)),
        Case("W4A16 sym, channel", packed, ints(4, True, -1)),
        Case("W8A16 sym", packed, ints(8, True)),
        Case("INT8 sym, channel", CompressedTensorsFormat(layout="int8"), ints(8, True, -1)),
        *llama,
        Case("4 bits asym (float32)", MLXFormat(), ints(4, False, 64 if group == 64 else 32)),
        Case("4 bits sym (float16)", MLXFormat(), ints(4, True, 64 if group == 64 else 32)),
        Case("NF4", BnbFormat(), TableGrid("nf4", group)),
        Case("NF4, double quantization", BnbFormat(), TableGrid("nf4", group, double_quant=True)),
        Case("INT8", BnbFormat(), ints(8, True, -1)),
        Case("float32", HFFormat(dtype="float32"), ints(3, False)),
    ]


def run(case: Case, loaded: LoadedModel, text, engines: list[str]) -> None:
    """Write the checkpoint of one case and print a table row per engine."""
    model = copy.deepcopy(loaded.model)
    calibration = text.ids.reshape(-1, 256)[:16] if case.method is SCATTERED else None
    weights = quantize_model(model, calibration, case.method, grid=case.grid).weights
    source = Source(model, loaded.tokenizer, loaded.name, weights)
    probe = Probe.of(model, text.ids[:2, :256], text.source)
    memory = math.exp(float(probe.nll.mean()))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        (done,) = Exports((case.format,)).write(source, Path(folder), probe, {}, no_track)
        verified = time.perf_counter() - began - done.seconds
        start = (
            f"| {case.format.name} | {case.name} | {done.size_bytes / 1e6:.1f} | {done.seconds:.1f} | {verified:.1f} |"
        )
        for name, engine in ENGINES.items():
            if name not in engines or case.format.name not in engine.formats or find(name, case.format.name) is None:
                continue
            try:
                judged = judge_engine(done.path, name)
            except UserError as error:
                print(f"{start} {name} | refused: {str(error).partition(': ')[2][:90]} | | | | | |", flush=True)
                continue
            found = judged.found
            off = 100 * (found.ppl_engine / memory - 1)
            print(
                f"{start} {name}, {engine.formats[case.format.name].dtype} | {found.max_abs:.1e} | {found.mean_kl:.1e} "
                f"| {found.max_kl:.1e} | {judged.limit:.1e} | {found.ppl_engine:.3f} | {off:+.3f}% |",
                flush=True,
            )


def main() -> None:
    """Write and verify every case, run it in every engine, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--text", help="a .txt file; default: WikiText-2 test")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--only", nargs="+", help="formats")
    parser.add_argument("--engines", nargs="+", default=[name for name in ENGINES if name != "xllamacpp"])
    options = parser.parse_args()
    source = LocalModel(path=options.model) if options.model else AssetModel(name="smollm2-135m", asset="smollm2-135m")
    loaded = source.load("float32", "cpu")
    text = LocalText(path=options.text).text("--text") if options.text else WikiText2(split="test").text("--text")
    windows = evaluation_windows(text, loaded.tokenizer, 256, 16, "--text")
    installed = [name for name in options.engines if find(name)]
    missing = ", ".join(set(options.engines) - set(installed)) or "none"
    print(f"torch {torch.__version__}; engines: {', '.join(installed)}; missing: {missing}\n")
    columns = "MB | pack, s | verify, s | engine | max abs d | KL mean | max | allowed | perplexity | from memory's"
    print(f"| format | what | {columns} |")
    print("|:---|:---|---:|---:|---:|:---|---:|---:|---:|---:|---:|---:|")
    for case in cases(options.group):
        if options.only is None or case.format.name in options.only:
            run(case, loaded, windows, options.engines)


if __name__ == "__main__":
    main()
