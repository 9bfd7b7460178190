"""Quality over time at equal bytes, in one run: our recipes beside AutoRound, llm-compressor and GPTQModel.

    python scripts/install_engine.py llmcompressor gptqmodel autoround
    python benchmarks/frontier.py --model DIR --text FILE [--bits 2 3 4] [--contestants fast autoround-50] [--out FILE]

All get the same float32 transformers folder, the same calibration windows (drawn from the text's first half by a seed),
asymmetric integers in groups of --group-size, and the same threads, each in a process of its own (benchmarks/peers/).
Ours with `+mixed` choose bits and groups for each linear in the size of uniform ones; all of ours take the command
line's options after their names ("yaqa_distill method.self_calibration.windows=32"). Seconds are of the quantizing
call, with writing of text (told apart), gradients and finding of widths, after a warm-up on one window that isn't
measured. KL from full precision and perplexity are of the text's second half, in float32 by our forward; KL's interval
is twice the standard error over windows. A plot goes beside --out.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from peers import call
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_awq.evaluation.divergence import token_kl
from gptq_awq.models.load import AssetModel, LoadedModel, LocalModel

OURS = ("rtn", "gptq", "fast", "fast+mixed", "yaqa", "best_3bit", "yaqa_distill", "yaqa_distill+mixed")
PEERS: Mapping[str, tuple[str, str, int]] = {
    "llmcompressor": ("llmcompressor", "gptq", 0),
    "gptqmodel": ("gptqmodel", "gptq", 0),
    "autoround-50": ("autoround", "autoround", 50),
    "autoround-200": ("autoround", "autoround", 200),
}
"""Driver, method and steps per block of each peer, with the library's own best settings."""
CONTESTANTS = (*OURS, *PEERS)


@dataclass(frozen=True)
class Outcome:
    """One contestant's outcome at one width; `error` is why there is none, `writing` the seconds of writing text."""

    name: str
    bits: int
    error: str | None = None
    seconds: float = 0.0
    kl: float = 0.0
    margin: float = 0.0
    perplexity: float = 0.0
    package: str = ""
    writing: float = 0.0

    def line(self) -> str:
        """The outcome's line in the table."""
        if self.error:
            return f"| {self.bits} | {self.name} | failed: {self.error} | | |"
        kl = f"{self.kl:.4f} ± {self.margin:.4f}"
        time = f"{self.seconds:.1f} s" + (f", {self.writing:.1f} of them writing" if self.writing else "")
        return f"| {self.bits} | {self.name} | {time} | {kl} | {self.perplexity:.3f} |"


@dataclass(frozen=True)
class Arena:
    """The model, calibration and held-out windows, and options, which all contestants share."""

    loaded: LoadedModel
    tokens: Int[Tensor, "samples seqlen"]
    held_out: Int[Tensor, "windows seqlen"]
    folder: Path
    options: argparse.Namespace

    def outcome(self, name: str, bits: int) -> Outcome:
        """Run a contestant at one width, after a warm-up, and score the weights that it left."""
        with tempfile.TemporaryDirectory(prefix="frontier-") as scratch:
            for part, rows in (("warm-up", self.tokens[:1]), ("run", self.tokens)):
                folder = Path(scratch) / part
                folder.mkdir()
                driver, method, steps = PEERS.get(name, ("ours", name, 0))
                job = self._job(method, bits, steps) if part == "run" else self._job(method, bits, 1, warm_up=True)
                (folder / "job.json").write_text(json.dumps(job))
                save_file({"ids": rows.contiguous()}, folder / "tokens.safetensors")
                if error := call(driver, folder, self.options.threads, self.options.timeout):
                    return Outcome(name, bits, error.replace("|", "\\|"))
            answer = json.loads((folder / "answer.json").read_text())
            kl, losses = self.scores(load_file(folder / "weights.safetensors"))
        margin = 2 * float(kl.std()) / len(kl) ** 0.5
        perplexity = float(losses.mean().exp())
        scored = float(kl.mean()), margin, perplexity
        return Outcome(name, bits, None, answer["seconds"], *scored, answer["package"], answer["writing"])

    def _job(self, method: str, bits: int, steps: int, warm_up: bool = False) -> dict[str, Any]:
        shared = {name: getattr(self.options, name) for name in ("group_size", "dtype", "batch_size", "threads")}
        own = {"model": str(self.folder), "method": method, "tuned": True, "bits": bits, "iters": steps}
        return shared | own | {"sym": False, "damping": 0.01, "warm_up": warm_up}

    @torch.no_grad()
    def scores(self, weights: Mapping[str, Tensor]) -> tuple[Float[Tensor, "windows"], Float[Tensor, "windows"]]:
        """Mean KL from full precision and mean loss of every held-out window, with the given weights in the model."""
        model: Any = self.loaded.model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        kl, losses = [], []
        full = [model(row[None]).logits[0, :-1].log_softmax(-1) for row in self.held_out]
        kept = {name: parameters[name].clone() for name in weights}
        for name, value in weights.items():
            parameters[name].copy_(value)
        for row, p in zip(self.held_out, full, strict=True):
            q = model(row[None]).logits[0, :-1].log_softmax(-1)
            losses.append(-q.gather(1, row[1:, None]).mean())
            kl.append(token_kl(p, q).mean())
        for name, value in kept.items():
            parameters[name].copy_(value)
        return torch.stack(kl), torch.stack(losses)


def prepare(options: argparse.Namespace, scratch: Path) -> Arena:
    """Load the model and draw its windows: calibration from the text's first half, held-out ones from the second."""
    asset = AssetModel(name="smollm2-135m", asset="smollm2-135m")
    loaded = (LocalModel(path=options.model) if options.model else asset).load("float32", "cpu")
    text = Path(options.text).read_text(encoding="utf-8")[: options.characters]
    ids = torch.tensor(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    first, second = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(len(first) - options.seqlen, (options.samples,), generator=draw).tolist()
    tokens = torch.stack([first[start : start + options.seqlen] for start in starts])
    held_out = second[: options.held_out * options.seqlen].view(options.held_out, options.seqlen)
    loaded.model.save_pretrained(scratch / "model")
    loaded.tokenizer.save_pretrained(scratch / "model")
    return Arena(loaded, tokens, held_out, scratch / "model", options)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw KL over seconds, a panel for each width: circles are ours, squares the others'."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    widths = sorted({outcome.bits for outcome in outcomes})
    names = sorted(
        {o.name for o in outcomes if not o.error}, key=lambda name: (CONTESTANTS.index(name.split()[0]), name)
    )
    figure, panels = plt.subplots(1, len(widths), figsize=(4.5 * len(widths), 4.2), squeeze=False, layout="constrained")
    for panel, bits in zip(panels[0], widths, strict=True):
        panel.set(xscale="log", yscale="log", xlabel="seconds", title=f"{bits} bits")
        for each in (o for o in outcomes if o.bits == bits and not o.error):
            style = {"color": f"C{names.index(each.name)}", "fmt": "s" if each.name in PEERS else "o", "capsize": 2}
            panel.errorbar(each.seconds, each.kl, each.margin, label=each.name, **style)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("KL from full precision")
    handles = {
        label: mark for panel in panels[0] for mark, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=150)


def lines(arena: Arena, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Lines of the page: what was run, the table, and versions."""
    options, windows = arena.options, arena.held_out.shape
    machine = torch.cpu.get_capabilities()
    native = "AVX512-BF16" if machine.get("avx512_bf16") else "no AVX512-BF16"
    yield f"# {datetime.date.today()}, {arena.loaded.name}: quality over time\n"
    yield f"`python benchmarks/frontier.py {' '.join(a for a in sys.argv[1:] if '/' not in a)}`\n"
    yield (
        f"{options.threads} threads ({native}), {options.dtype}; groups of {options.group_size}, asymmetric; "
        f"{options.samples} × {options.seqlen} calibration tokens; KL and perplexity on {windows[0]} × {windows[1]}.\n"
    )
    yield "| bits | by | time | KL ± 2 SE | perplexity |\n|---:|:---|---:|---:|---:|"
    yield from (outcome.line() for outcome in outcomes)
    yield "\n" + ", ".join(sorted({outcome.package for outcome in outcomes if outcome.package}))


def contestant(text: str) -> str:
    """Check the name of a contestant, which options may follow where it is ours."""
    name, *more = text.split() or [""]
    if name not in OURS and (name not in PEERS or more):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(CONTESTANTS)}; only ours take options")
    return text


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--text", required=True, help="a text file, none that is a test set")
    parser.add_argument("--characters", type=int, default=1_400_000, help="of the text that are read")
    parser.add_argument("--contestants", nargs="+", type=contestant, default=CONTESTANTS)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=32, help="windows that are scored")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per forward of the peers")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=3 * 3600.0, help="seconds for one run")
    parser.add_argument("--out", type=Path, help="also write the page to this file, and the plot beside it")
    return parser.parse_args()


def main() -> None:
    """Run all contestants at all widths, and print each outcome when it is there."""
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="frontier-model-") as scratch:
        arena = prepare(options, Path(scratch))
        outcomes: list[Outcome] = []
        for bits in options.bits:
            for name in options.contestants:
                outcomes.append(arena.outcome(name, bits))
                print(outcomes[-1].line(), flush=True)
                if options.out:
                    options.out.write_text("\n".join(lines(arena, outcomes)) + "\n", encoding="utf-8")
    if options.out:
        plot(outcomes, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
