"""Text samples in tables: what runs write beside what full precision writes, the first token that differs marked."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gptq_awq.evaluation.samples.difference import Sample, read_samples
from gptq_awq.report import escape
from gptq_awq.report.rows import Row
from gptq_awq.report.table import Table as RunTable
from gptq_awq.report.table import labels

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSamples:
    """Text samples of one run.

    Attributes:
        path: of its folder.
        label: to call it by.
        samples: one per prompt.
    """

    path: str
    label: str
    samples: Sequence[Sample]


@dataclass(frozen=True)
class PromptTexts:
    """Texts written after one prompt: by full precision, and by runs (label, sample).

    Runs that compute with another model than the first one have another full precision, and a group of their own.
    """

    prompt: str
    full: str
    runs: Sequence[tuple[str, Sample]]


def stored_samples(runs: Iterable[Row]) -> dict[str, list[Sample]]:
    """Read the samples that runs stored (eval.samples), by the run's path; damaged files are named in a warning."""
    found = {}
    for run in runs:
        try:
            found[run["path"]] = read_samples(run["path"])
        except (OSError, ValueError) as error:
            log.warning("no text samples of %s: %s", run["path"], error)
    return {path: samples for path, samples in found.items() if samples}


def labelled(tables: Sequence[RunTable], samples: Mapping[str, Sequence[Sample]]) -> list[RunSamples]:
    """Samples of the runs in the tables, each with the label that the run has in plots."""
    return [
        RunSamples(run["path"], label, samples[run["path"]])
        for made in tables
        for run, label in zip(made.runs, labels(made), strict=True)
        if run["path"] in samples
    ]


def by_prompt(runs: Sequence[RunSamples]) -> list[PromptTexts]:
    """Group samples by prompt, in the order that prompts come in the first run."""
    rows = [(sample.prompt, sample.full, run.label, sample) for run in runs for sample in run.samples]
    places = {key: place for place, key in enumerate(dict.fromkeys(row[:2] for row in rows))}
    rows.sort(key=lambda row: places[row[:2]])
    groups = groupby(rows, key=lambda row: row[:2])
    return [PromptTexts(prompt, full, [row[2:] for row in group]) for (prompt, full), group in groups]


def parting_in_words(sample: Sample) -> str:
    """Say where a sample parts from full precision, and how near the choice was."""
    parting = sample.parting
    if parting is None:
        return f"the same, {sample.tokens} tokens"
    return (
        f"parts at token {parting.token + 1}: {_quoted(parting.full)} became {_quoted(parting.own)}; full precision "
        f"preferred its own by {parting.full_gap:.2f}, this run by {parting.own_gap:.2f}"
    )


def _quoted(piece: str) -> str:
    return f"“{escape.one_line(piece)}”" if piece.strip() else "(end, or blank)"


def table(runs: Sequence[RunSamples]) -> RenderableType:
    """Render samples for a terminal, a table per prompt; a text is bold from where it parts from full precision."""
    tables = []
    for texts in by_prompt(runs):
        title = Text(escape.one_line(texts.prompt), "bold")
        made = Table(title=title, title_justify="left", expand=True, show_lines=True)
        made.add_column("", ratio=1, overflow="fold")
        made.add_column("greedy continuation", ratio=4, overflow="fold")
        made.add_row("full precision", Text(_shown(texts.full)))
        for label, sample in texts.runs:
            made.add_row(Text(label), Group(_marked(sample), Text(parting_in_words(sample), "dim")))
        tables.append(made)
    return Group(*tables)


def _marked(sample: Sample) -> Text:
    parting = sample.parting
    if parting is None:
        return Text(_shown(sample.own))
    end = parting.at + max(len(parting.own), 1)
    return Text.assemble(
        _shown(sample.own[: parting.at]),
        (_shown(sample.own[parting.at : end]) or "∎", "reverse bold"),
        (_shown(sample.own[end:]), "bold"),
    )


def _shown(text: str) -> str:
    """Text with line ends kept and every other control character dropped, which a terminal would obey."""
    lines = text.splitlines()
    return "\n".join(" " * (len(line) - len(line.lstrip())) + escape.one_line(line.lstrip()) for line in lines)


def markdown(runs: Sequence[RunSamples]) -> str:
    """Render samples as Markdown, a table per prompt; the first token that differs is bold."""
    parts = []
    for texts in by_prompt(runs):
        rows = [("full precision", escape.markdown(texts.full), "")]
        for label, sample in texts.runs:
            rows.append((escape.markdown(label), _bold(sample), escape.markdown(parting_in_words(sample))))
        head = [f"### {escape.markdown(texts.prompt)}", ""]
        head += ["| run | greedy continuation | |", "| :--- | :--- | :--- |"]
        parts.append("\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(parts)


def _bold(sample: Sample) -> str:
    parting = sample.parting
    if parting is None:
        return escape.markdown(sample.own)
    end = parting.at + len(parting.own)
    before, piece, after = sample.own[: parting.at], sample.own[parting.at : end], sample.own[end:]
    return f"{escape.markdown(before)} **{escape.markdown(piece.strip()) or '∎'}** {escape.markdown(after)}"
