"""Laws of finding a finished run by the files that go into it: every file and option counts, and no model is loaded."""

import json
import os

import pytest
from helpers.paths import CONFIGS
from hydra import compose, initialize_config_dir

from gptq_awq.experiment import lookup
from gptq_awq.experiment.plan import preflight
from gptq_awq.experiment.registry import Run
from gptq_awq.experiment.run import run
from gptq_awq.models.load import LocalModel


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def inputs(tmp_path):
    """A folder of a model and a text, which nothing reads: keys are made of names, sizes and times."""
    model = tmp_path / "model"
    (model / "part").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "part/model-2.safetensors"):
        (model / name).write_text(name)
    (tmp_path / "text.txt").write_text("text")
    return tmp_path


def composed(folder, *overrides):
    """A run's config."""
    text = folder / "text.txt"
    given = [
        *("method=gptq", "model=local", f"model.path={folder / 'model'}", "data=local", f"data.path={text}"),
        *(f"eval.perplexity.path={text}", f"out={folder / 'out'}", *overrides),
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=given)


def key(folder, *overrides):
    return lookup.key_of(preflight(composed(folder, *overrides)))


@pytest.mark.parametrize(
    "name", ["model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/part/model-2.safetensors"]
)
def test_a_key_changes_with_every_file_of_the_model_even_where_its_size_and_time_are_kept(inputs, name):
    before, path = key(inputs), inputs / name
    assert key(inputs) == before
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert key(inputs) != before


def test_a_key_changes_with_texts_new_files_and_options_and_not_with_what_no_number_depends_on(inputs):
    before = key(inputs)
    assert key(inputs, "resume=false", f"out={inputs / 'elsewhere'}", "cache_gb=3") == before
    assert key(inputs, "bits=3") != before
    assert key(inputs, "seed=1") != before
    (inputs / "text.txt").write_text("another text")
    after = key(inputs)
    assert after != before
    (inputs / "model" / "generation_config.json").write_text("{}")
    assert key(inputs) != after


def test_texts_that_a_method_does_not_read_are_not_in_its_key(inputs):
    (inputs / "calibration.txt").write_text("text")
    overrides = ("method=rtn", f"data.path={inputs / 'calibration.txt'}")
    before = key(inputs, *overrides)
    (inputs / "calibration.txt").write_text("another text")
    assert key(inputs, *overrides) == before


@pytest.mark.parametrize("unknown", [("model=hub", "model.id=a/b"), ("data=c4",), ("eval=full",)])
def test_there_is_no_key_where_files_are_not_known_without_loading(inputs, unknown):
    text = inputs / "text.txt"
    groups = {
        "model": ("model=local", f"model.path={inputs / 'model'}"),
        "data": ("data=local", f"data.path={text}"),
        "eval": ("eval=ppl", f"eval.perplexity.path={text}"),
    }
    groups[unknown[0].partition("=")[0]] = unknown
    overrides = [option for group in groups.values() for option in group]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=["method=gptq", f"out={inputs / 'out'}", *overrides])
    assert lookup.key_of(preflight(cfg)) is None


def test_what_a_key_stands_for_is_remembered_and_damage_forgets_it(inputs):
    name, out = key(inputs), inputs / "out"
    assert lookup.known(name, out) is None
    lookup.remember(name, Run("ab" * 32, out))
    assert lookup.known(name, out) == Run("ab" * 32, out)
    path = next((inputs / "cache" / "runs" / "by-files").iterdir())
    for damaged in ("", "{}", "[]", '{"run": 3}', "\0"):
        path.write_text(damaged)
        assert lookup.known(name, out) is None
    assert lookup.known(None, out) is None
    lookup.remember(None, Run("ab" * 32, out))


def test_a_finished_run_is_found_without_loading_its_model_and_its_log_is_kept(
    tiny_folder, tiny_text, tmp_path, monkeypatch
):
    overrides = [
        *("method=rtn", "bits=3", "group_size=24", "model=local", f"model.path={tiny_folder}"),
        *(f"eval.perplexity.path={tiny_text}", "eval.perplexity.seqlen=32", "eval.perplexity.windows=4"),
    ]

    def configured(out, *more):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose("config", overrides=[*overrides, f"out={tmp_path / out}", *more])

    first = run(configured("a"))
    log = (tmp_path / "a" / "run.log").read_text()
    monkeypatch.setattr(LocalModel, "load", lambda *_, **__: pytest.fail("the model is loaded"))
    for out in ("a", "b"):
        again = run(configured(out))
        assert again.metrics == first.metrics
        assert again.manifest == first.manifest
        assert (tmp_path / out / "run.log").read_text().startswith(log)
        assert json.loads((tmp_path / out / "results.json").read_text())["metrics"] == dict(first.metrics)
    with pytest.raises(pytest.fail.Exception, match="the model is loaded"):
        run(configured("b", "seed=1"))
