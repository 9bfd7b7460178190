"""`generate` and `compare` show the text of the very run that is named, whether it left a checkpoint or not."""

import json

import pytest

from gptq_awq.evaluation.samples.difference import read_samples
from gptq_awq.playground import compare, generate
from gptq_awq.results import load

TOKENS = "8"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("the cat\na small house\n")
    return path


@pytest.fixture
def sweep(cli, tiny, prompts, tmp_path):
    """Two runs, one with a checkpoint, that stored what they write."""
    stored = (f"eval.samples={prompts}", f"eval.sample_tokens={TOKENS}")
    done = cli("-m", "method=rtn", "bits=2,8", *tiny, *stored, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 0, done.stderr
    done = cli(
        "method=gptq", "bits=3", "sym=true", "group_size=32", *tiny[2:], *stored, "export.formats=gptq", "out=exported"
    )
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_texts_of_a_run_are_those_it_stored(sweep, prompts, cache, monkeypatch, capsys):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(cache))
    runs = [*sorted((sweep / "sweep").glob("*rtn*")), sweep / "exported"]
    assert all(len(read_samples(run)) == 2 for run in runs)
    out = sweep / "texts"
    arguments = [*map(str, runs), "--prompts", str(prompts), "--tokens", TOKENS, "--out", str(out)]
    assert compare.main(arguments) == 0
    page = (out / "report.html").read_text()
    shown = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["samples"]
    assert [texts["prompt"] for texts in shown] == ["the cat", "a small house"]
    for number, run in enumerate(runs):
        # A checkpoint holds what isn't quantized in float16, so of its text the beginning is compared.
        for texts, sample in zip(shown, read_samples(run), strict=True):
            own = [each[1] for each in texts["runs"]]
            assert sample.own in own if "exported" not in str(run) else sample.own[:2] in {text[:2] for text in own}, (
                number
            )
    assert "other codes" not in capsys.readouterr().err
    assert load(sweep)["status"].eq("done").all()
    assert "full precision" in (out / "samples.md").read_text()


def test_generate_opens_runs_checkpoints_and_models(sweep, tiny_folder, cache, monkeypatch, capsys):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(cache))
    run = next((sweep / "sweep").glob("*rtn*2bit"))
    greedy = {}
    for name, path in {"run": run, "checkpoint": sweep / "exported/checkpoints/gptq", "model": tiny_folder}.items():
        assert generate.main([str(path), "--prompt", "the cat", "--tokens", TOKENS]) == 0
        greedy[name] = capsys.readouterr().out.strip()
    sample = read_samples(run)[0]
    assert greedy["run"] == sample.own.strip()
    assert greedy["model"] == sample.full.strip()
    assert generate.main([str(run), "--full", "--prompt", "the cat", "--tokens", TOKENS]) == 0
    assert capsys.readouterr().out.strip() == sample.full.strip()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "--prompt", "a"], "there is no such folder"),
        (["tests", "--prompt", "a"], "holds no run"),
        (["tests", "--prompt", "a", "--top-p", "2"], "top-p"),
    ],
)
def test_mistakes_are_one_line(arguments, told, capsys, monkeypatch):
    from helpers.paths import ROOT

    monkeypatch.chdir(ROOT)
    assert generate.main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
