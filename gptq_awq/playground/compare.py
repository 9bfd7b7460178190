"""Put what runs write beside what full precision writes: `gptq-awq compare RUN [RUN …] --prompts FILE`.

    gptq-awq compare outputs/A outputs/B --prompts prompts.txt              a table on the terminal
    gptq-awq compare multirun/… --prompts prompts.jsonl --out texts         texts/samples.md and texts/report.html too

Both take the likeliest token each time. Where they part first is marked, with the gap: by how much full precision held
its own token likelier than the run's. A gap near 0 was a tie that anything could have turned; a large one is a loss.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gptq_awq.errors import UserError
from gptq_awq.evaluation.samples.continuation import Continuation, continue_greedily
from gptq_awq.evaluation.samples.difference import Sample, compared
from gptq_awq.evaluation.samples.prompts import Prompt, read_prompts
from gptq_awq.playground.opening import StoredRun
from gptq_awq.report import make_report, records
from gptq_awq.report.samples import RunSamples, markdown, table
from gptq_awq.results import FILE_NAME, load
from gptq_awq.runtime.commands import described_parser, exit_code
from gptq_awq.runtime.progress import Track, rich_track


@dataclass(frozen=True)
class Options:
    """How texts are written, for all runs alike."""

    prompts: Sequence[Prompt]
    tokens: int
    trust: bool


def parser() -> argparse.ArgumentParser:
    """Parser of the options of `gptq-awq compare`."""
    options = described_parser("gptq-awq compare", __doc__)
    options.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs, or of sweeps")
    options.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, or .jsonl with a field prompt")
    options.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a prompt (may be repeated)")
    options.add_argument("--tokens", type=int, default=64, metavar="N", help="write at most N tokens (default: 64)")
    options.add_argument("--plain", action="store_true", help="go on from the bare text, without a chat template")
    options.add_argument("--out", type=Path, metavar="FOLDER", help="write samples.md and report.html there")
    options.add_argument("--trust", action="store_true", help="allow code of others that a run's config names")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 with one line on stderr for a user's mistake."""
    options = parser().parse_args(argv)
    return exit_code(lambda: _main(options))


def _main(options: argparse.Namespace) -> None:
    prompts = [Prompt(text, not options.plain) for text in options.prompt]
    if options.prompts is not None:
        prompts += read_prompts(options.prompts, "--prompts", not options.plain)
    if not prompts:
        raise UserError("--prompts: name a file with a prompt a line, or give --prompt TEXT")
    if options.tokens < 1:
        raise UserError(f"--tokens {options.tokens}: give 1 or more")
    runs = [found for path in options.runs for found in _runs_in(path)]
    console = Console(stderr=True)
    with rich_track(console) as track:
        found = list(_compared(runs, Options(prompts, options.tokens, options.trust), track))
    Console().print(table(found))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "samples.md").write_text(markdown(found) + "\n", encoding="utf-8")
        report = make_report(records(load(*runs)), samples={each.path: each.samples for each in found})
        (options.out / "report.html").write_text(report.text("html", options.out), encoding="utf-8")
        sys.stderr.write(f"wrote {options.out / 'samples.md'} and report.html\n")


def _runs_in(path: Path) -> list[Path]:
    """The runs in a folder, or it itself. Raises UserError where there is none."""
    if (path / FILE_NAME).is_file():
        return [path]
    found = [row["path"] for row in records(load(path)) if row["status"] == "done"] if path.is_dir() else []
    if not found:
        raise UserError(f"{path}: holds no finished run")
    return [Path(folder) for folder in found]


def _compared(runs: Sequence[Path], options: Options, track: Track) -> Iterator[RunSamples]:
    """Continue the prompts with each run; full precision, which runs of one model share, is asked once."""
    known: dict[str, list[Continuation]] = {}
    for path in runs:
        with tempfile.TemporaryDirectory() as scratch:
            run = StoredRun.read(path, Path(scratch), options.trust)
            model = (run.result.manifest.get("model") or {}).get("sha256") or str(path)
            if model not in known:
                loaded = run.full()
                known[model] = _written(loaded.model, loaded.tokenizer, options, track)
                del loaded
            opened = run.quantized(track, lambda line: sys.stderr.write(f"{line}\n"))
            with opened.computing():
                own = _written(opened.model, opened.tokenizer, options, track)
        samples: list[Sample] = compared(known[model], own)
        yield RunSamples(str(path), run.label, samples)


def _written(model: Any, tokenizer: Any, options: Options, track: Track) -> list[Continuation]:
    return continue_greedily(model, tokenizer, options.prompts, options.tokens, track)


if __name__ == "__main__":
    sys.exit(main())
