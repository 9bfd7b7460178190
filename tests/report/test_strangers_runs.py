"""Results folders of strangers: reports show what is in them, obey nothing, and read within bounds."""

import csv
import io
import json
import os
import re
import zipfile
from dataclasses import asdict, replace
from html import unescape

import numpy as np
import pytest
from helpers.example_results import AWQ_RESULT, PPL
from helpers.hostile import NAMES, changed, nested, places, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptq_awq.evaluation import scores
from gptq_awq.evaluation.scores import FILE_NAME, Scores
from gptq_awq.report import main, make_report, records
from gptq_awq.report.escape import markdown, one_line, spreadsheet, tex
from gptq_awq.report.profile import profiles
from gptq_awq.results import load, read_ledger

METRICS = dict(AWQ_RESULT.metrics) | {f"{PPL}/baseline": 20.0, f"{PPL}/delta": 2.15, "wikitext2/kl": 0.1}
RESULT = replace(AWQ_RESULT, metrics=METRICS)
FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(root, **rows):
    for name, row in rows.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "results.json").write_text(json.dumps(row))
    return root


def hostile(name):
    """A row with a name wherever a row has room for one."""
    row = asdict(RESULT)
    metrics = {f"{name}/ppl@2048": 22.0, f"{name}/ppl@2048/delta": 1.0, f"{name}/kl": 0.1, name: 0.5}
    config = {"seed": 7, "data": {"path": name}, name: name, "list": [name, name]}
    manifest = {"tokens": {"eval": {name: name}}, "model": {"source": name}, "packages": {name: name}}
    return row | {
        "model": name,
        "method": name,
        "metrics": metrics,
        "config": config,
        "manifest": manifest,
        "grid": name,
    }


def report(root):
    return make_report(records(load(root)))


# ------------------------------------------------------------------------------------------------------- one name


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is_in_every_table(name, tmp_path):
    # Beside it a run that differs in a setting, so that settings are columns; and one that failed, with a warning.
    other = hostile(name) | {"config": {"seed": 8, "data": {"path": f"{name}2"}}}
    failed = hostile(name) | {"status": "failed", "error": f"it failed\n{name}"}
    made = report(write(tmp_path, a=hostile(name), b=other, c=failed))
    rows = [line for line in made.text("md").splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows}) == 1  # cells are where they belong
    assert not re.search(r"(?<!\\)(?:\\\\)*[<`&]", made.text("md"))  # no HTML, code or entity
    assert not re.search(r"(?<!\\)\]\(", made.text("md"))  # no link or picture
    latex = made.text("latex").split("\\begin{document}", 1)[1]
    assert "\\input{secret}" not in "\n".join(line for line in latex.splitlines() if not line.startswith("%"))
    for row in csv.reader(io.StringIO(made.text("csv"))):
        assert not any(cell.lstrip()[:1] in ("=", "+", "@", "＝") for cell in row)
    page = made.text("html")
    assert page.count("<script") == 2  # the data and the program
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["runs"][0]["model"] == name
    assert unescape(re.search("<title>(.*?)</title>", page, re.S)[1]) == f"Quantization report: {name}"
    assert "\x1b" not in made.text("md")  # which a terminal obeys


def test_escaped_text_is_what_markdown_shows():
    for name in NAMES:
        shown = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown(name))  # as CommonMark undoes escapes
        assert shown == one_line(name)


@given(st.text())
def test_escaped_text_is_one_line_of_harmless_characters(text):
    assert len(markdown(text).splitlines()) <= 1
    assert len(tex(text).splitlines()) <= 1
    assert tex(text).isascii()
    assert not re.search(r"(?<!\\)(?:\\\\)*[<`&*|]", markdown(text))
    first = str(spreadsheet(text)).lstrip()[:1]
    assert first not in ("=", "+", "-", "@")


def test_numbers_in_csv_stay_numbers():
    assert [spreadsheet(x) for x in (-1.5, 3, None, True, "gptq")] == [-1.5, 3, None, True, "gptq"]
    assert spreadsheet("-2+3") == "'-2+3"


def test_a_row_of_latex_that_begins_with_a_bracket_is_no_argument_of_the_row_before(tmp_path):
    row = hostile("[1cm]") | {"grid": "int"}
    lines = report(write(tmp_path, a=row)).text("latex").splitlines()
    assert any(line.startswith("{}[1cm] &") for line in lines)


# --------------------------------------------------------------------------------------------------------- ledgers


@pytest.mark.parametrize("ledger", ["/dev/zero", "../secret.jsonl", "/etc/passwd", "link.jsonl", "pipe", ".", "", "\0"])
def test_a_ledger_is_read_in_its_runs_folder_only_and_with_a_bound(ledger, tmp_path):
    line = json.dumps({"name": "secret", "block": 0, "site": "q", "error_after": 0.5})
    (tmp_path / "secret.jsonl").write_text(line)
    write(tmp_path, run=asdict(RESULT) | {"ledger": ledger})
    (tmp_path / "run" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    os.mkfifo(tmp_path / "run" / "pipe")
    assert profiles(records(load(tmp_path))) == [None]
    (tmp_path / "run" / "own.jsonl").write_text(line)
    write(tmp_path, run=asdict(RESULT) | {"ledger": "own.jsonl"})
    assert profiles(records(load(tmp_path))) == [{"output": {"q": [0.5]}}]


def test_a_ledger_that_claims_a_billion_blocks_makes_no_list_of_them(tmp_path):
    write(tmp_path, run=asdict(RESULT))
    row = {"name": "q", "block": 10**12, "site": "q", "error_after": 0.5}
    (tmp_path / "run" / "ledger.jsonl").write_text(json.dumps(row))
    assert profiles(records(load(tmp_path))) == [None]


LEDGER_ROW = {"name": "model.layers.0.q", "block": 0, "site": "q", "error_after": 0.1, "weight_error": 0.2}


@FUZZ
@given(st.lists(values | st.sampled_from(list(places(LEDGER_ROW))).flatmap(
    lambda place: values.map(lambda value: changed(LEDGER_ROW, place, value))), max_size=4))  # fmt: skip
def test_any_ledger_is_read_or_left_out(tmp_path, rows):
    write(tmp_path, run=asdict(RESULT))
    (tmp_path / "run" / "ledger.jsonl").write_text("\n".join(map(json.dumps, [LEDGER_ROW, *rows])))
    report(tmp_path).text("html")
    read_ledger(tmp_path / "run" / "ledger.jsonl")


# ------------------------------------------------------------------------------------------------------------ rows


def survives(root, capsys):
    """The report of a folder that has a good run: it is there whatever lies beside it, or one line says why not."""
    code = main([str(root), "--out", str(root / "report")])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert code in (0, 2)
    if code == 0:
        assert "awq" in said.out
    else:
        assert "different protocols" in said.err


GOOD = asdict(RESULT) | {"metrics": {PPL: 22.15, f"{PPL}/delta": 1.0, f"{PPL}/delta_ci95": [0.5, 1.5]}}


OTHERS = [None, True, -1, 1e308, "text", "nan", [], [1], [1, 2, 3], {}, {"a": [{}]}, nested(500)]


@pytest.mark.parametrize("place", [p for p in places(GOOD) if p], ids=str)
def test_a_field_of_another_type_costs_its_row_and_not_the_report(place, tmp_path, capsys):
    for value in OTHERS:
        write(tmp_path, good=GOOD, other=changed(GOOD, place, value))
        survives(tmp_path, capsys)


@FUZZ
@given(st.sampled_from(list(places(GOOD))), values)
def test_any_row_is_shown_or_named(tmp_path, capsys, place, value):
    write(tmp_path, good=GOOD, other=changed(GOOD, place, value))
    survives(tmp_path, capsys)


@pytest.mark.slow
@settings(FUZZ, max_examples=3000)
@given(st.sampled_from(list(places(GOOD))), values, st.sampled_from(list(places(GOOD))), values)
def test_any_two_changes_are_shown_or_named(tmp_path, capsys, place, value, another, more):
    write(tmp_path, good=GOOD, other=GOOD)
    try:
        row = changed(changed(GOOD, place, value), another, more)
    except (AttributeError, TypeError):  # the second place went with the first change
        return
    write(tmp_path, other=row)
    survives(tmp_path, capsys)


def test_a_metric_can_not_take_the_place_of_a_column(tmp_path, caplog):
    write(tmp_path, good=GOOD, other=changed(GOOD, ("metrics",), {"path": 5}))
    assert list(load(tmp_path)["path"]) == [str(tmp_path / "good")]
    assert "'path' is the name of another column" in caplog.text


def test_a_row_that_is_a_pipe_or_endless_is_left_out(tmp_path, caplog):
    write(tmp_path, good=GOOD)
    for name in ("pipe", "endless"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "results.json")
    (tmp_path / "endless" / "results.json").symlink_to("/dev/zero")
    assert len(load(tmp_path)) == 1
    assert caplog.text.count("it is no regular file") == 2


# ---------------------------------------------------------------------------------------------------------- scores


def npy(claimed, count):
    """An array of `count` numbers whose header claims `claimed`."""
    buffer = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": claimed}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(8 * count)


@pytest.mark.parametrize("claimed", [(10**12,), (2**62,), (-1,), (4, 4), ()], ids=str)
def test_scores_are_no_larger_than_their_bytes(claimed, tmp_path):
    with zipfile.ZipFile(tmp_path / FILE_NAME, "w") as archive:
        archive.writestr("wikitext2/nll.npy", npy(claimed, 16))
    with pytest.raises(ValueError, match="damaged"):
        Scores.read(tmp_path)


def test_scores_that_unpack_to_more_than_the_bound_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "MOST_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / FILE_NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy((10**6,), 10**6))
    assert (tmp_path / FILE_NAME).stat().st_size < 10**5
    with pytest.raises(ValueError, match="more than 1 MB"):
        Scores.read(tmp_path)


@FUZZ
@given(st.dictionaries(st.sampled_from(["wikitext2/nll", "wikitext2/nll/baseline", "wikitext2/tokens"]),
    st.lists(st.floats(width=64), max_size=20)), st.binary(max_size=40), st.integers(0, 400))  # fmt: skip
def test_any_scores_are_used_or_named(tmp_path, capsys, arrays, damage, at):
    write(tmp_path, good=GOOD, other=GOOD | {"method": "gptq"})
    Scores({name: np.array(series, np.float64) for name, series in arrays.items()}).write(tmp_path / "good")
    content = bytearray((tmp_path / "good" / FILE_NAME).read_bytes())
    content[at : at + len(damage)] = damage
    (tmp_path / "other" / FILE_NAME).write_bytes(content)
    with np.errstate(all="ignore"):
        survives(tmp_path, capsys)
