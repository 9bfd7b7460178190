"""`gptq-awq push`: the hub, a stand-in on this machine, gets the bytes of a verified folder, and nothing else."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.fake_hub import fake_hub, run_against
from helpers.quantized_weights import tiny_source
from helpers.tiny_models import tiny_model, tiny_tokens
from huggingface_hub import constants

from gptq_awq.export import push
from gptq_awq.export.base import Source
from gptq_awq.export.mlx import MLXFormat
from gptq_awq.export.verify import Probe, VerificationRecord
from gptq_awq.export.write import Exports
from gptq_awq.storage.assets import hub_reachable

NOWHERE = "http://127.0.0.1:9"
FACTS = {"method": "gptq", "model": {"source": "/home/someone/models/tiny", "sha256": "0123"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint as a run leaves it."""
    return written(tmp_path_factory.mktemp("out"))


@pytest.fixture
def folder(made, tmp_path):
    """A copy of a checkpoint."""
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def written(out, shard="4GB"):
    source = tiny_source(sym=True)
    probe = Probe.of(source.model, tiny_tokens(1, 16), "/home/someone/text.txt")
    exports = Exports((MLXFormat(shard=shard),))
    return exports.write(source, out, probe, FACTS, lambda each, *_: each)[0].path


@pytest.fixture
def pushed(monkeypatch, tmp_path, capsys):
    """A function: pushes a folder to a hub, and returns exit code, stdout and stderr."""

    def call(folder, *arguments, endpoint=NOWHERE, token="a token", offline=False):
        hub_reachable.cache_clear()
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        code = push.main([str(folder), *arguments])
        return code, *capsys.readouterr()

    yield call
    hub_reachable.cache_clear()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_hub_gets_the_folders_bytes_in_one_commit(folder, tmp_path):
    """In a process of its own, with the settings of huggingface_hub that users have."""
    repos, stored, messages = {}, {}, {}
    command = ["gptq-awq", "push", str(folder), "org/tiny", "--message", "first"]
    with fake_hub(repos, stored=stored, messages=messages) as endpoint:
        script = f"import sys; from gptq_awq.__main__ import main; sys.argv = {command}; main()"
        out = run_against(endpoint, script, tmp_path, HF_TOKEN="a token", HF_HUB_DISABLE_XET="1")
    assert repos == {"org/tiny": content(folder)}
    assert messages == {"org/tiny": "first"}
    assert content(folder)["model.safetensors"] in stored.values(), "weights go to large storage"
    assert f"{endpoint}/org/tiny/commit/1" in out
    assert all(name in out for name in repos["org/tiny"])


def test_what_was_not_written_with_the_checkpoint_stays_here_and_is_named(folder, pushed):
    (folder / "notes.txt").write_text("private")
    repos, private = {}, set()
    with fake_hub(repos, private=private) as endpoint:
        code, out, err = pushed(folder, "tiny", "--private", "--revision", "four", endpoint=endpoint)
    assert (code, err) == (0, "")
    assert repos == {"me/tiny": {}, "me/tiny@four": {k: v for k, v in content(folder).items() if k != "notes.txt"}}
    assert private == {"me/tiny"}
    assert "notes.txt (it was not written with the checkpoint)" in out


def test_a_dry_run_shows_files_sizes_and_card_and_asks_nobody(folder, capsys):
    assert push.main([str(folder), "org/tiny", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for name, data in content(folder).items():
        assert f"{len(data):15,d}  {name}" in shown
    assert (folder / "README.md").read_text() in shown
    assert "dry run: nothing was uploaded" in shown


@pytest.mark.parametrize(
    ("offline", "why"), [(True, "HF_HUB_OFFLINE is set"), (False, f"{NOWHERE} does not answer")], ids=["told", "found"]
)
def test_offline_it_is_a_dry_run_that_says_why(folder, pushed, offline, why):
    code, out, err = pushed(folder, "org/tiny", offline=offline)
    assert (code, err) == (1, "")
    assert out.splitlines()[-1] == f"nothing was uploaded: {why}"
    assert "model.safetensors" in out


@pytest.mark.parametrize("damage", ["no record", "altered", "missing"])
def test_what_is_no_verified_export_is_refused_with_one_line(folder, damage, capsys):
    {
        "no record": lambda: (folder / "verification.json").unlink(),
        "altered": lambda: (folder / "config.json").write_text("{}"),
        "missing": lambda: (folder / "model.safetensors").unlink(),
    }[damage]()
    assert push.main([str(folder), "org/tiny", "--dry-run"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "token", "line"),
    [
        (("org/tiny",), "", "there is no token of the hub; run `hf auth login`, or set HF_TOKEN"),
        (("org/tiny",), "another", "push org/tiny: 403"),
        (("a/b/c",), "a token", "push a/b/c: Repo id"),
        (("org/public", "--private"), "a token", "it exists and is public"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_nothing_is_uploaded(folder, pushed, arguments, token, line):
    repos = {"org/public": {}}
    with fake_hub(repos) as endpoint:
        code, _, err = pushed(folder, *arguments, endpoint=endpoint, token=token)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert line in err
    assert not any(repos.values())


def test_weights_that_the_repository_has_of_before_are_not_left_beside_the_new_ones(folder, pushed, tmp_path):
    repos = {}
    shards = written(tmp_path / "shards", "20KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    with fake_hub(repos) as endpoint:
        assert pushed(shards, "org/tiny", endpoint=endpoint)[0] == 0
        repos["org/tiny"]["LICENSE"] = b"of the model"
        code, _, err = pushed(folder, "org/tiny", endpoint=endpoint)
        assert (code, "--replace deletes it" in err) == (2, True)
        assert pushed(folder, "org/tiny", "--replace", endpoint=endpoint)[0] == 0
    assert repos == {"org/tiny": content(folder) | {"LICENSE": b"of the model"}}


def test_nothing_that_is_uploaded_says_where_it_lay(folder):
    for name, data in content(folder).items():
        for path in (b"/home/someone", str(folder.parent).encode(), f"{Path.home()}/".encode()):
            assert path not in data, name


@dataclass(frozen=True)
class WithAPath:
    """A format with an option that is a path, as GGUF's `converter` is."""

    name: str = "gguf"
    converter: str = "/home/someone/llama.cpp"


def test_a_record_names_options_without_where_they_lie(folder):
    source, probe = Source(tiny_model("llama"), None, "tiny", {}), Probe(tiny_tokens(1, 8), torch.zeros(1, 7), "text")
    assert VerificationRecord.of(WithAPath(), source, folder, probe, {}).options["converter"] == "llama.cpp"
