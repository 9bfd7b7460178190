"""Time of perplexity, KL and agreement against a plain transformers loop, and the deviation of the values.

    python benchmarks/evaluation.py [--model DIR] [--windows 8] [--seqlen 2048] [--bits 4]

The plain loop is model(ids).logits and torch's cross entropy in float32, one window at a time; with KL it runs both
models on each window, as it has no cache, and takes the log-softmax of all logits. All contenders take turns on every
window, so that drifts of the machine's speed affect all alike. Perplexity alone is measured on the full-precision
model; KL and agreement on the model quantized by RTN, against the full-precision hidden states, which a run has from
its cache. Ratios are to the plain loop for the same scores, and for perplexity alone. On a busy machine compare CPU
seconds of one thread (OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1): waiting threads count too.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from gptq_awq import quantize_model
from gptq_awq.data.corpora import LocalText, WikiText2
from gptq_awq.data.tokens import evaluation_windows
from gptq_awq.evaluation.divergence import compare
from gptq_awq.evaluation.head import Head
from gptq_awq.evaluation.perplexity import next_token_nll
from gptq_awq.evaluation.states import window_states
from gptq_awq.models.load import AssetModel, LocalModel

Score = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass
class Contender:
    """A way to score a window, with its times and scores so far: losses, or losses, KL and agreement."""

    name: str
    score: Score
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    parts: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    def take_turn(self, window: torch.Tensor) -> None:
        """Score one window and record its time."""
        start, cpu_start = time.perf_counter(), time.process_time()
        scored = self.score(window)
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu_start)
        self.parts.append(scored)

    def mean(self, part: int) -> float:
        """Mean over all tokens of losses (part 0), KL (1) or agreement (2)."""
        return float(torch.cat([scored[part].double() for scored in self.parts]).mean())


def plain(model: PreTrainedModel) -> Score:
    """Losses by a plain loop of transformers and torch."""

    @torch.no_grad()
    def losses(window: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        return (torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"),)

    return losses


def plain_comparison(full: PreTrainedModel, quantized: PreTrainedModel) -> Score:
    """Losses, KL and agreement by a plain loop that runs both models on every window."""

    @torch.no_grad()
    def compared(window: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p, q = (model(window[None], use_cache=False).logits[0, :-1].log_softmax(-1) for model in (full, quantized))
        nll = torch.nn.functional.nll_loss(q, window[1:], reduction="none")
        return nll, (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)

    return compared


def ours(model: PreTrainedModel, dtype: torch.dtype, keep: dict[int, torch.Tensor]) -> Score:
    """Losses by the tiled head of gptq_awq; the hidden states are stored in `keep` for `comparison`."""
    head = Head.of(model, dtype)

    def losses(window: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = keep[window.data_ptr()] = window_states(head, window)
        return (next_token_nll(head, states, window[1:]),)

    return losses


def comparison(model: PreTrainedModel, dtype: torch.dtype, kept: dict[int, torch.Tensor]) -> Score:
    """Losses, KL and agreement of a quantized model against the full-precision hidden states in `kept`."""
    head = Head.of(model, dtype)
    return lambda window: compare(head, kept[window.data_ptr()], window_states(head, window), window[1:])


def report(contenders: list[Contender]) -> None:
    """Print seconds over all windows, ratios to the plain loop for the same scores and for losses, and the values."""
    ratios = "plain / this | in CPU seconds | perplexity alone / this"
    print(f"| | seconds | CPU seconds | {ratios} | perplexity | KL | agreement |")
    print("|:---|---:|---:|---:|---:|---:|---:|---:|---:|")
    losses = contenders[0]
    for c in contenders:
        same = next(plain for plain in contenders if len(plain.parts[0]) == len(c.parts[0]))
        seconds, cpu = sum(c.seconds), sum(c.cpu_seconds)
        kl, agree = (f"{c.mean(1):.4e}", f"{c.mean(2):.4f}") if len(c.parts[0]) > 1 else ("", "")
        ratios = f"{sum(same.seconds) / seconds:.2f} | {sum(same.cpu_seconds) / cpu:.2f}"
        values = f"{math.exp(c.mean(0)):.4f} | {kl} | {agree}"
        print(f"| {c.name} | {seconds:.2f} | {cpu:.2f} | {ratios} | {sum(losses.seconds) / seconds:.2f} | {values} |")


def main() -> None:
    """Let the contenders score every window in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--text", help="a text file; default: WikiText-2's test split")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args()
    source = LocalModel(path=options.model) if options.model else AssetModel(name="smollm2-135m", asset="smollm2-135m")
    loaded = source.load("float32", "cpu")
    text = LocalText(path=options.text).text("--text") if options.text else WikiText2(split="test").text()
    windows = evaluation_windows(text, loaded.tokenizer, options.seqlen, options.windows, "--windows").ids.long()
    quantized = copy.deepcopy(loaded.model)
    quantize_model(quantized, None, "rtn", options.bits)
    contenders = [
        Contender("plain loop, float32", plain(loaded.model)),
        Contender("plain loop, float32, + KL and agreement", plain_comparison(loaded.model, quantized)),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        kept: dict[int, torch.Tensor] = {}
        name = str(dtype).removeprefix("torch.")
        contenders.append(Contender(f"perplexity, {name}", ours(loaded.model, dtype, kept)))
        contenders.append(Contender(f"+ KL and agreement, {name}", comparison(quantized, dtype, kept)))
    for contender in contenders:  # compiles, and pages in the weights
        contender.take_turn(windows[0][:64])
        contender.seconds.clear()
        contender.cpu_seconds.clear()
        contender.parts.clear()
    for window in windows:
        for contender in contenders:
            contender.take_turn(window)
    cpu = torch.cpu.get_capabilities().get("cpu_name")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {cpu}")
    print(f"{loaded.name}, {len(windows)} x {options.seqlen} tokens, RTN with {options.bits} bits\n")
    report(contenders)


if __name__ == "__main__":
    main()
