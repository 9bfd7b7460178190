"""Tables say what can be told apart, and never put numbers of two protocols side by side."""

import io
import logging
import math
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from gptq_awq.errors import UserError
from gptq_awq.evaluation.scores import Scores
from gptq_awq.report import comparison, final_table, main
from gptq_awq.results import FAILURE, Result, load

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


def test_one_name_for_two_models_is_two_tables(tmp_path: Path) -> None:
    manifests = [TOKENS | {"model": {"sha256": digit * 64}} for digit in "ab"]
    runs = {f"run{index}": replace(RESULT, manifest=manifest) for index, manifest in enumerate(manifests)}
    markdown = comparison(load(write(tmp_path, **runs)))
    assert "### SmolLM2-135M (aaaaaaaa)" in markdown
    assert "### SmolLM2-135M (bbbbbbbb)" in markdown


def test_what_else_varies_is_a_column(tmp_path: Path) -> None:
    runs = {f"seed{seed}": replace(RESULT, config={"seed": seed, "dtype": "float32"}) for seed in (0, 1)}
    rows = cells(comparison(load(write(tmp_path, **runs))))
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert "dtype" not in rows[0]


def test_the_precision_of_scoring_is_a_column_where_it_differs(tmp_path: Path) -> None:
    before = replace(RESULT, config={"seed": 0})  # there was no choice then
    same, lower = (replace(RESULT, config={"eval": {"compute_dtype": d}, "seed": 0}) for d in ("float32", "bfloat16"))
    assert "compute_dtype" not in comparison(load(write(tmp_path, before=before, same=same)))
    assert "compute_dtype" in comparison(load(write(tmp_path, lower=lower)))


def test_nested_settings_are_columns_where_they_alone_tell_runs_apart(tmp_path: Path) -> None:
    def run(method: str, samples: int, target: str, propagation: bool | None) -> Result:
        solver = {} if propagation is None else {"error_propagation": propagation}
        data = {"_target_": f"gptq_awq.data.corpora.{target}", "samples": samples, "split": f"of {target}"}
        return replace(RESULT, method=method, config={"method": solver, "data": data, "tracking": {"id": samples}})

    runs = {
        "a": run("gptq", 8, "C4", True),
        "b": run("gptq", 16, "C4", True),
        "c": run("gptq", 8, "Pile", True),
        "d": run("awq", 8, "C4", False),  # that AWQ propagates no error follows from the method
        "e": run("rtn", 8, "C4", None),
    }
    rows = cells(comparison(load(write(tmp_path, **runs))))
    assert [(row["method"], row["data"], row["samples"]) for row in rows] == [
        ("awq", "C4", "8"),
        ("gptq", "C4", "8"),
        ("gptq", "C4", "16"),
        ("gptq", "Pile", "8"),
        ("rtn", "C4", "8"),
    ]
    assert not {"split", "id", "error_propagation"} & set(rows[0])


def test_calibration_texts_go_by_the_name_they_have(tmp_path: Path) -> None:
    hub = "gptq_awq.data.corpora.HubText"
    texts = [
        {"_target_": "gptq_awq.data.corpora.WikiText2"},
        {"_target_": hub, "name": "c4", "joiner": " "},
        {"_target_": hub, "name": "pile", "joiner": "\n\n"},
        {"_target_": "gptq_awq.data.corpora.LocalText", "path": "/text/my own.txt", "joiner": "|"},
    ]
    runs = {f"run{index}": replace(RESULT, config={"data": text}) for index, text in enumerate(texts)}
    rows = cells(comparison(load(write(tmp_path, **runs))))
    assert [row["data"] for row in rows] == ["WikiText2", "c4", "pile", "my own.txt"]
    assert "joiner" not in rows[0]
    ends = {f"end{index}": replace(RESULT, config={"data": {"joiner": end}}) for index, end in enumerate("\n ")}
    assert [row["joiner"] for row in cells(comparison(load(write(tmp_path / "ends", **ends))))] == ["\\n", ""]


def test_over_a_setting_runs_are_means_with_their_deviation(tmp_path: Path, capsys) -> None:
    for seed, ppl in enumerate((22.0, 22.1, 22.4)):
        metrics = {PPL: ppl, f"{PPL}/baseline": 19.0, f"{PPL}/delta": ppl - 19, f"{PPL}/delta_ci95": [2.0, 4.0]}
        run = replace(RESULT, metrics=metrics, config={"seed": seed, "data": {"samples": 8}})
        write(tmp_path, **{f"a{seed}": run, f"b{seed}": replace(run, config={"seed": seed, "data": {"samples": 16}})})
    assert main([str(tmp_path), "--over", "seed"]) == 0
    rows = cells(capsys.readouterr().out)
    assert [(row["samples"], row["runs"]) for row in rows] == [("8", "3"), ("16", "3")]
    mean, deviation = statistics.fmean((22.0, 22.1, 22.4)), statistics.stdev((22.0, 22.1, 22.4))
    assert rows[0][PPL] == f"{mean:.2f} ± {deviation:.2f}"
    assert rows[0][f"Δ {PPL}"] == f"+{mean - 19:.2f} ± {deviation:.2f}"
    assert main([str(tmp_path), "--over", "typo"]) == 2


def test_marks_say_what_is_best_and_what_cannot_be_told_from_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = rng.normal(400, 60, 64)
    for name, shift in (("best", 0.0), ("near", 0.2), ("far", 40.0)):
        nll = text + 20 + shift + rng.normal(0, 5, 64)
        ppl = float(np.exp(nll.sum() / (64 * 128)))
        write(tmp_path, **{name: replace(RESULT, method=name, metrics={PPL: ppl}, config={})})
        tokens = np.full(64, 128.0)
        Scores({"wikitext2/nll": nll, "wikitext2/nll/baseline": text, "wikitext2/tokens": tokens}).write(
            tmp_path / name
        )
    markdown = comparison(load(tmp_path))
    rows = {row["method"]: row[PPL] for row in cells(markdown)}
    assert sorted(rows["best"].strip("*0123456789.") + rows["near"].strip("*0123456789.")) == [" ", "≈"]
    assert sum("**" in cell for cell in rows.values()) == 1
    assert rows["far"].replace(".", "").isdigit()
    assert "≈: not distinguishable from it" in markdown
    assert "no scores.npz" not in markdown
    untested = comparison(load(write(tmp_path / "old", run=RESULT)))
    assert "1 of 1 run(s) cannot be tested in full (no scores.npz" in untested


def test_folders_of_runs_without_a_row_are_warned_of_and_copies_counted_once(tmp_path: Path, capsys) -> None:
    same = replace(RESULT, manifest=TOKENS | {"run": "ab" * 32})
    write(tmp_path, a=same, b=same)
    for name, file in (("killed", "ledger.partial.jsonl"), ("waiting", "run.log"), ("notes", "notes.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    assert main([str(tmp_path), str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert len(cells(out)) == 1
    assert "2 unfinished" in out
    assert "killed (no results.json" in out
    assert "notes" not in out


def test_results_older_than_a_failure_are_shown_with_a_warning(tmp_path: Path, capsys) -> None:
    write(tmp_path, a=RESULT)
    replace(RESULT, status="failed", error="disk full").write(tmp_path / "a", FAILURE)
    (tmp_path / "b").mkdir()
    replace(RESULT, status="failed", error="disk full").write(tmp_path / "b", FAILURE)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert len(cells(out)) == 1
    assert f"1 run(s) failed when run again (failed.json); their earlier results are shown: {tmp_path / 'a'}" in out
    assert f"1 unfinished run(s) left out: {tmp_path / 'b'}" in out


def test_one_metric_or_model_may_be_chosen(tmp_path: Path, capsys) -> None:
    write(tmp_path, a=RESULT, b=replace(RESULT, model="other"))
    assert main([str(tmp_path), "--metric", "wikitext2/kl", "--model", "other"]) == 0
    out = capsys.readouterr().out
    (row,) = cells(out)
    assert "wikitext2/kl" in row
    assert PPL not in row
    assert "### other" in out
    for options, named in (
        (["--metric", "typo"], PPL),
        (["--model", "typo"], "SmolLM2-135M"),
        (["--format", "pdf"], "latex"),
    ):
        assert main([str(tmp_path), *options]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert named in error


def test_csv_has_a_row_per_run_and_numbers_as_they_are(tmp_path: Path) -> None:
    runs = write(tmp_path / "runs", a=RESULT, b=replace(RESULT, method="rtn", metrics={PPL: math.inf}, manifest=TOKENS))
    assert main([str(runs), "--out", str(tmp_path / "out"), "--format", "csv"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.csv"]
    table = pd.read_csv(tmp_path / "out" / "report.csv", float_precision="round_trip").set_index("method")
    assert table.loc["gptq", PPL] == METRICS[PPL]
    assert table.loc["gptq", f"{PPL}/delta_ci95/low"] == 2.71
    assert table.loc["rtn", PPL] == math.inf
    assert {f"{PPL}/p", f"{PPL}/p_holm", f"{PPL}/p_best_holm", "config/seed", "seconds/quantize"} <= set(table.columns)


@pytest.mark.parametrize("way", ["as it is", "input"])
def test_latex_compiles_alone_and_in_a_document(tmp_path: Path, way: str) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    if subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).returncode:
        pytest.skip("LaTeX's booktabs is not installed")
    awkward = replace(RESULT, method="rtn_50%", model="A_b & c#^~\\{}$", config={"note": "<é≤"})
    runs = write(tmp_path / "runs", a=replace(RESULT, model=awkward.model, config={"note": "x"}), b=awkward)
    assert main([str(runs), "--out", str(tmp_path), "--format", "latex"]) == 0
    text = (tmp_path / "report.tex").read_text()
    assert r"\toprule" in text
    assert r"rtn\_50\%" in text
    document = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{report}Text.\end{document}"
    (tmp_path / "paper.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report" if way == "as it is" else "paper"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


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


def test_what_was_rounded_beside_weights_is_a_column_only_where_something_was(tmp_path: Path) -> None:
    plain = replace(RESULT, config={"act": {"bits": 16}, "kv": {"bits": 16}})
    w4a8 = replace(RESULT, act="int8", config={"act": {"bits": 8}, "kv": {"bits": 16}})
    assert "act" not in cells(comparison(load(write(tmp_path / "one", a=plain))))[0]
    rows = cells(comparison(load(write(tmp_path / "two", a=plain, b=w4a8))))
    assert sorted(row["act"] for row in rows) == ["", "int8"]
    assert all("kv" not in row and row["bits"] == "4" for row in rows)
    assert "activations int8" in rendered(w4a8)[next(iter(rendered(w4a8)))]


def test_runs_are_the_best_among_those_whose_activations_are_rounded_alike(tmp_path: Path) -> None:
    better, worse = METRICS | {PPL: 21.0}, METRICS | {PPL: 30.0}
    runs = {
        **{"a": replace(RESULT, metrics=better), "b": replace(RESULT, method="awq")},
        **{
            "c": replace(RESULT, metrics=worse, act="int4"),
            "d": replace(RESULT, method="awq", metrics=worse, kv="int4"),
        },
        "e": replace(RESULT, method="awq", metrics=METRICS | {PPL: 40.0}, act="int4"),
    }
    markdown = comparison(load(write(tmp_path, **runs)))
    found = {(row["method"], row.get("act"), row.get("kv")): row[PPL].startswith("**") for row in cells(markdown)}
    assert {key for key, best in found.items() if best} == {("gptq", "", ""), ("gptq", "int4", "")}
    assert "Bold: the best at its number of bits, activations, cache." in markdown


def test_full_precision_with_rounded_activations_is_a_run_like_others(tmp_path: Path) -> None:
    full = replace(RESULT, method="fp", bits=16, group_size=None, sym=None)
    for act, untested in ((None, False), ("int8", True)):
        markdown = comparison(load(write(tmp_path / str(act), a=replace(full, act=act))))
        assert ("cannot be tested in full" in markdown) is untested
