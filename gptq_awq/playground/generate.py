"""Let a quantized model write: `gptq-awq generate RUN_OR_CHECKPOINT --prompt TEXT`, streamed to the terminal.

    gptq-awq generate outputs/…/12-00-00_gptq_int_4bit --prompt "Why is the sky blue?"
    gptq-awq generate outputs/…/checkpoints/gptq --prompt "Once upon a time" --temperature 0.8 --plain
    gptq-awq generate outputs/… --full --prompt "…"            the full-precision model of the same run
    echo "Why is the sky blue?" | gptq-awq generate outputs/…  the prompt from standard input

A run with a checkpoint (export.formats) opens in seconds; another one is quantized again by its stored config.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gptq_awq.errors import UserError
from gptq_awq.evaluation.samples.continuation import Sampling, write
from gptq_awq.evaluation.samples.prompts import Prompt
from gptq_awq.playground.opening import open_model
from gptq_awq.runtime.commands import described_parser, exit_code
from gptq_awq.runtime.progress import rich_track


def parser() -> argparse.ArgumentParser:
    """Parser of the options of `gptq-awq generate`."""
    options = described_parser("gptq-awq generate", __doc__)
    options.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder, a checkpoint or a model")
    options.add_argument("--prompt", metavar="TEXT", action="append", help="to go on from (may be repeated)")
    options.add_argument("--tokens", type=int, default=128, metavar="N", help="write at most N tokens (default: 128)")
    options.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token each time")
    options.add_argument("--top-p", type=float, default=1.0, help="draw among tokens of this probability together")
    options.add_argument("--top-k", type=int, default=0, help="draw among this many likeliest tokens; 0: all")
    options.add_argument("--seed", type=int, default=0, help="of what is drawn")
    options.add_argument("--plain", action="store_true", help="go on from the bare text, without a chat template")
    options.add_argument("--full", action="store_true", help="of a run: the full-precision model")
    options.add_argument("--trust", action="store_true", help="allow code of others that a run's config names")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 with one line on stderr for a user's mistake."""
    options = parser().parse_args(argv)
    return exit_code(lambda: _generate(options))


def _generate(options: argparse.Namespace) -> None:
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed, options.tokens)
    prompts = [Prompt(text, not options.plain) for text in options.prompt or _from_input()]
    with rich_track(Console(stderr=True)) as track:
        opened = open_model(options.path, track, _say, options.full, options.trust)
    _say(opened.name)
    for prompt in prompts:
        if len(prompts) > 1:
            sys.stdout.write(f"> {prompt.text}\n")
        with opened.computing():
            write(opened.model, opened.tokenizer, prompt, sampling, _stream)
        sys.stdout.write("\n")


def _from_input() -> list[str]:
    """The prompt from standard input. Raises UserError where that is a terminal, or empty."""
    text = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    if not text:
        raise UserError("--prompt: give a text to go on from, or pipe one in")
    return [text]


def _stream(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
