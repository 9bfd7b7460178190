"""Peak memory of quantizing the first blocks of a large model offloaded to disk, and how it grows.

    python benchmarks/large_model.py geometry            2 blocks of an 8B geometry, random bf16 shards: ≤ 4 GB?
    python benchmarks/large_model.py depth               8 and 64 blocks of one width: how much more memory?
    python benchmarks/large_model.py tokens              few and many calibration tokens, hidden states spilled or not

Each measurement runs in a process of its own and reports its peak resident memory. Nothing is timed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from gptq_awq.api import load_method
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.data.tokens import make_token_set
from gptq_awq.models.offloaded_model import open_offloaded
from gptq_awq.quantization.quantize import quantize
from gptq_awq.storage.journal import Journal

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SMALL: dict[str, Any] = LLAMA_8B | {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}


def make(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a random Llama in bfloat16, one shard per block, so that the whole model is never in memory."""
    made = LlamaConfig(**config, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    folder.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(folder)
    h, f, kv = made.hidden_size, made.intermediate_size, made.hidden_size * config["num_key_value_heads"]
    kv //= made.num_attention_heads
    linears = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}
    shapes = {f"self_attn.{name}_proj.weight": shape for name, shape in linears.items()}
    shapes |= {"mlp.gate_proj.weight": (f, h), "mlp.up_proj.weight": (f, h), "mlp.down_proj.weight": (h, f)}
    shapes |= {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
    parts = [{f"model.layers.{i}.{k}": s for k, s in shapes.items()} for i in range(made.num_hidden_layers)]
    ends = {"model.embed_tokens.weight": (made.vocab_size, h), "lm_head.weight": (made.vocab_size, h)}
    parts += [{name: shape} for name, shape in ends.items()] + [{"model.norm.weight": (h,)}]
    where: dict[str, str] = {}
    for number, part in enumerate(parts):
        generator = torch.Generator().manual_seed(number)
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: _random(shape, generator) for name, shape in part.items()}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def measure(folder: Path, blocks: int, tokens: int, dtype: str, spill: bool, budget: int | None) -> dict[str, float]:
    """Quantize the first blocks with GPTQ in this process; returns peak resident memory after and before, in GB."""
    model = open_offloaded(
        folder, AutoConfig.from_pretrained(folder), getattr(torch, dtype), torch.device("cpu"), "model"
    )
    ids = torch.randint(0, model.config.vocab_size, (max(1, tokens // 512), 512))
    method, grid = load_method("gptq", bits=4, group_size=128)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        settings = Settings(
            tokens_per_batch=512, memory_budget=budget, scratch=Path(scratch) / "spilled" if spill else None
        )
        journal = Journal(Path(scratch) / "journal", "benchmark")
        began = _peak()
        calibration = make_token_set("random", ids, None, "random")
        steps = quantize(model, calibration, method, grid, settings, progress=journal)
        for done in islice(steps, blocks):
            print(f"block {done.index}: peak {_peak():.2f} GB", file=sys.stderr)
    return {"peak": _peak(), "began": began}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def apart(**options: Any) -> dict[str, float]:
    """Run `measure` in a process of its own."""
    command = [sys.executable, __file__, "measure", json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def geometry(folder: Path) -> list[str]:
    """Measure two blocks of an 8B geometry, with weights in float32 and bfloat16."""
    if not (folder / "model.safetensors.index.json").exists():
        make(folder, LLAMA_8B)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    lines = [f"{size:.1f} GB of shards; 2 blocks, GPTQ, 4 bits, group 128, 4096 tokens; target: at most 4 GB"]
    for dtype in ("float32", "bfloat16"):
        found = apart(folder=str(folder), blocks=2, tokens=4096, dtype=dtype, spill=True, budget=int(4e9))
        lines.append(f"weights in {dtype}: peak {found['peak']:.2f} GB (of which {found['began']:.2f} before)")
    return lines


def depth(folder: Path) -> list[str]:
    """Compare the peaks of models with 8 and 64 blocks of one width."""
    peaks = []
    for blocks in (8, 64):
        made = make(folder / f"{blocks}", SMALL | {"num_hidden_layers": blocks})
        options = {"folder": str(made), "blocks": blocks, "tokens": 4096, "dtype": "float32", "spill": False}
        peaks.append(apart(**options, budget=None)["peak"])
    return [
        f"8 blocks {peaks[0]:.2f} GB, 64 blocks {peaks[1]:.2f} GB: x {peaks[1] / peaks[0]:.3f}; target: at most 1.1"
    ]


def tokens(folder: Path) -> list[str]:
    """Compare the peaks of few and many calibration tokens, hidden states spilled to disk or not."""
    made, lines = make(folder / "tokens", SMALL | {"num_hidden_layers": 2}), []
    for spill in (False, True):
        few, many = (
            apart(folder=str(made), blocks=2, tokens=n, dtype="float32", spill=spill, budget=int(2.0e9))["peak"]
            for n in (4096, 65536)
        )
        lines.append(f"spill={spill}: 4096 tokens {few:.2f} GB, 65536 tokens {many:.2f} GB: + {many - few:.2f} GB")
    return lines


def main() -> None:
    """Run the measurement named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["geometry", "depth", "tokens", "measure"])
    parser.add_argument("options", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where models are made and kept; by default they are deleted")
    arguments = parser.parse_args()
    if arguments.what == "measure":
        options = json.loads(arguments.options)
        print(json.dumps(measure(**options | {"folder": Path(options["folder"])})))
        return
    with tempfile.TemporaryDirectory() as scratch:
        run = {"geometry": geometry, "depth": depth, "tokens": tokens}[arguments.what]
        print("\n".join(run(arguments.folder or Path(scratch))))


if __name__ == "__main__":
    main()
