"""Tables say what can be told apart, and never put numbers of two protocols side by side."""

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gptq_awq.errors import UserError
from gptq_awq.report import comparison, final_table, main
from gptq_awq.results import Result, load

PPL = "wikitext2/ppl@2048"
METRICS = {
    PPL: 22.15,
    f"{PPL}/baseline": 19.23,
    f"{PPL}/delta": 2.92,
    f"{PPL}/delta_ci95": [2.71, 3.12],
    "wikitext2/kl": 0.1234,
    "wikitext2/top1_agreement": 0.8512,
    "lm_eval/lambada/acc": 0.3525,
    "lm_eval/lambada/acc/baseline": 0.355,
    "lm_eval/lambada/acc/delta": -0.0025,
    "lm_eval/lambada/acc/delta_ci95": [-0.02, 0.015],
}
TOKENS = {"tokens": {"eval": {"wikitext2": "ab12" * 16, "lm_eval/lambada": "cd34" * 16}}}
RESULT = Result(
    method="gptq",
    bits=4,
    bits_per_weight=4.5,
    group_size=64,
    sym=False,
    model="SmolLM2-135M",
    status="done",
    metrics=METRICS,
    size_bytes=90_000_000,
    baseline_size_bytes=270_000_000,
    seconds={"load": 2.0, "quantize": 52.5, "evaluate": 20.0},
    peak_memory_bytes=1_240_000_000,
    ledger="ledger.jsonl",
    manifest=TOKENS,
    config={"seed": 0, "out": "a", "method": {"solver": {}}},
)


def rendered(result: Result) -> dict[str, str]:
    """The lines of the final table on a usual terminal, by their first words."""
    console = Console(file=io.StringIO(), width=100)
    console.print(final_table(result))
    assert isinstance(console.file, io.StringIO)
    lines = [line.strip() for line in console.file.getvalue().splitlines() if line.strip()]
    return {line.split("  ")[0]: line for line in lines}


def write(root: Path, **runs: Result) -> Path:
    for name, run in runs.items():
        (root / name).mkdir(parents=True)
        run.write(root / name)
    return root


def cells(markdown: str) -> list[dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_final_table_has_size_metrics_time_and_memory() -> None:
    lines = rendered(RESULT)
    assert "SmolLM2-135M: gptq, 4 bits, group 64, asymmetric" in lines
    for label, parts in {
        "bits per weight": ["4.500", "with scales and zeros"],
        "size": ["270.0 MB", "90.0 MB", "66.7% smaller"],
        PPL: ["19.23", "22.15", "+2.92 [+2.71, +3.12]"],
        "wikitext2/kl": ["0.1234"],
        "wikitext2/top1_agreement": ["0.8512"],
        "lm_eval/lambada/acc": ["0.3550", "0.3525", "-0.003 [-0.020, +0.015]"],
        "time": ["74.5 s", "load 2.0, quantize 52.5, evaluate 20.0"],
        "peak memory": ["1.24 GB"],
    }.items():
        assert all(part in lines[label] for part in parts), lines[label]


def test_not_distinguishable_is_said_exactly_where_the_interval_contains_zero() -> None:
    for interval, said in (([-0.1, 0.2], True), ([0.0, 0.2], True), ([0.01, 0.2], False), ([-2, -1], False)):
        metrics = {PPL: 22.15, f"{PPL}/delta": 0.05, f"{PPL}/delta_ci95": interval}
        assert ("not distinguishable" in rendered(replace(RESULT, metrics=metrics))) is said
    without_interval = replace(RESULT, metrics={PPL: 22.15, f"{PPL}/delta": 0.05})
    assert "not distinguishable" not in rendered(without_interval)


def test_the_final_table_of_a_failed_run_says_why() -> None:
    failed = replace(
        RESULT,
        status="failed",
        error="export.formats=[gguf] [/x]",
        metrics={},
        size_bytes=None,
        seconds={"load": 1.0},
    )
    assert any("failed: export.formats=[gguf] [/x]" in line for line in rendered(failed).values())


def test_full_precision_against_itself_differs_by_nothing() -> None:
    metrics = {PPL: 19.23, f"{PPL}/baseline": 19.23, f"{PPL}/delta": 0.0, f"{PPL}/delta_ci95": [0.0, 0.0]}
    line = rendered(replace(RESULT, method="fp", bits=None, group_size=None, sym=None, metrics=metrics))[PPL]
    assert line.split() == [PPL, "19.23", "19.23", "0"]


def test_a_comparison_has_a_row_per_run_and_the_most_bits_first(tmp_path: Path) -> None:
    broken = replace(RESULT, method="rtn", bits=2, bits_per_weight=2.5, metrics=METRICS | {PPL: float("inf")})
    markdown = comparison(load(write(tmp_path, a=broken, b=RESULT)))
    first, second = cells(markdown)
    assert (first["method"], first["bits"], first["group"], first["sym"]) == ("gptq", "4", "64", "false")
    assert (first["bits/weight"], first["size"], first["reduction"]) == ("4.500", "90.0 MB", "66.7%")
    assert first[PPL] == "22.15"
    assert first[f"Δ {PPL} [95%]"] == "+2.92 [+2.71, +3.12]"
    assert "not distinguishable" in first["Δ lm_eval/lambada/acc [95%]"]
    assert (first["quantize"], first["total"], first["peak memory"]) == ("52.5 s", "74.5 s", "1.24 GB")
    assert (second["method"], second[PPL]) == ("rtn", "inf")
    assert f"Full precision: {PPL} 19.23" in markdown


def other(metrics: dict[str, Any] | None = None, tokens: str | None = None) -> Result:
    manifest = {"tokens": {"eval": {"wikitext2": tokens}}} if tokens else TOKENS
    return replace(RESULT, method="awq", metrics=METRICS if metrics is None else metrics, manifest=manifest)


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (other(metrics={"wikitext2/ppl@512": 25.0}), "ppl@512"),
        (other(metrics={"wikitext2/word_ppl": 60.0}), "word_ppl"),
        (other(metrics={PPL: 22.0}, tokens="ef56" * 16), "ef56ef56ef56 "),
        (replace(other(metrics={PPL: 22.0}), manifest={}), "unknown"),
    ],
    ids=["window", "word or token", "other tokens", "tokens not recorded"],
)
def test_runs_of_different_protocols_are_refused(run: Result, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named) as error:
        comparison(load(write(tmp_path, a=RESULT, b=run)))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "b") in str(error.value)


def test_texts_that_only_some_runs_scored_are_blank_cells_not_a_conflict(tmp_path: Path) -> None:
    more = other(metrics=METRICS | {"c4/ppl@2048": 30.0})
    none = replace(RESULT, method="rtn", metrics={}, manifest={})
    rows = {row["method"]: row for row in cells(comparison(load(write(tmp_path, a=RESULT, b=more, c=none))))}
    assert (rows["awq"]["c4/ppl@2048"], rows["gptq"]["c4/ppl@2048"]) == ("30.00", "")
    assert rows["rtn"][PPL] == ""


def test_models_have_a_table_each(tmp_path: Path) -> None:
    llama = replace(other(metrics={PPL: 9.8}, tokens="ef56" * 16), model="Llama-3.2-1B")
    markdown = comparison(load(write(tmp_path, a=RESULT, b=llama)))
    assert [line for line in markdown.splitlines() if line.startswith("###")] == [
        "### SmolLM2-135M",
        "### Llama-3.2-1B",
    ]


def test_what_else_varies_is_a_column(tmp_path: Path) -> None:
    runs = {f"seed{seed}": replace(RESULT, config={"seed": seed, "dtype": "float32"}) for seed in (0, 1)}
    rows = cells(comparison(load(write(tmp_path, **runs))))
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert "dtype" not in rows[0]


def test_unfinished_runs_are_named_and_left_out(tmp_path: Path) -> None:
    failed = replace(RESULT, status="failed", error="damping gave up", metrics={})
    markdown = comparison(load(write(tmp_path, a=RESULT, b=failed)))
    assert len(cells(markdown)) == 1
    (warning,) = (line for line in markdown.splitlines() if "Warning" in line)
    assert str(tmp_path / "b") in warning
    assert "damping gave up" in warning


def test_the_command_prints_the_table_or_one_line_on_what_to_change(tmp_path: Path, capsys, caplog) -> None:
    write(tmp_path, a=RESULT)
    with caplog.at_level(logging.WARNING):
        assert main([str(tmp_path)]) == 0
    assert len(cells(capsys.readouterr().out)) == 1
    (tmp_path / "empty").mkdir()
    for root in ("empty", "typo"):
        assert main([str(tmp_path / root)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
