"""Checkpoints of strangers: the verifier runs nothing that they name; ours tell nothing of the machine of their run."""

import json
import os
import subprocess

import pytest
import torch
import yaml
from helpers.gguf_models import bpe
from helpers.hostile import NAMES, changed, nested, places, values
from helpers.paths import CONFIGS
from helpers.tiny_models import tiny_model, tiny_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptq_awq import quantize_model
from gptq_awq.errors import UserError
from gptq_awq.export.__main__ import main
from gptq_awq.export.base import Source
from gptq_awq.export.card import model_card
from gptq_awq.export.formats import FORMATS
from gptq_awq.export.gptq import GPTQFormat
from gptq_awq.export.hf import HFFormat
from gptq_awq.export.modelfile import modelfile
from gptq_awq.export.packing import unpack_words
from gptq_awq.export.public import names_only
from gptq_awq.export.reference import reference_model
from gptq_awq.export.verify import RECORD, Probe, verify
from gptq_awq.export.write import Exports
from gptq_awq.report.escape import markdown
from gptq_awq.runtime.progress import no_track

FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
PRIVATE = "/home/somebody/secret place/llama"


class NoTokenizer:
    """Saves nothing."""

    def save_pretrained(self, folder):
        pass


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of a model that came from a private folder."""
    model, out = tiny_model("llama"), tmp_path_factory.mktemp("out")
    model.config._name_or_path = PRIVATE
    done = quantize_model(model, method="rtn", bits=4, group_size=32, sym=True)
    source = Source(model, NoTokenizer(), "llama", done.weights)
    probe = Probe.of(model, tiny_tokens(2, 16), f"text {PRIVATE}/a.txt")
    facts = {"model": {"source": PRIVATE, "sha256": "ab"}, "calibration": {"source": f"{PRIVATE}/b.txt (4 windows)"}}
    exports = Exports((GPTQFormat(), HFFormat(dtype="float32")))
    return {e.format: e.path for e in exports.write(source, out, probe, facts, no_track)}


@pytest.fixture
def copy(written, tmp_path):
    for path in written["gptq"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(folder, capsys):
    """The one line that verifying a folder ends with."""
    assert main(["verify", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def edit(folder, place, value, name=RECORD):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(changed(content, place, value)))


# -------------------------------------------------------------------------------------------------------- formats


def test_the_table_has_the_formats_that_a_run_writes():
    config = yaml.safe_load((CONFIGS / "export" / "checkpoints.yaml").read_text())
    written = [entry.rpartition("@")[2] for entry in map(str, config["defaults"]) if "@" in entry]
    assert set(FORMATS) == set(written)
    assert all(FORMATS[name].name == name for name in FORMATS)


@pytest.mark.parametrize(
    "name", ["subprocess.Popen", "gptq_awq.export.engines.run.subprocess.Popen", "onnx", "", 5, None]
)
def test_a_format_outside_of_the_table_is_refused(name, copy, capsys):
    edit(copy, ("format",), name)
    assert "format" in refused(copy, capsys)


def test_what_a_record_names_as_its_class_is_never_imported(copy, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("ran a command"))
    edit(copy, ("target",), "gptq_awq.export.engines.run.subprocess.Popen")
    assert verify(copy).weights > 0  # as the format it is of is known by its name
    edit(copy, ("options",), {"args": ["touch", "ran"]})
    with pytest.raises(UserError, match="gptq has no option 'args'"):
        verify(copy)


def test_a_format_of_ones_own_is_verified_when_it_is_written(tmp_path):
    class Own(HFFormat):
        pass

    model = tiny_model("llama")
    done = quantize_model(model, method="rtn", bits=4, group_size=32)
    source = Source(model, NoTokenizer(), "llama", done.weights)
    own = Own(dtype="float32", name="own")
    (exported,) = Exports((own,)).write(source, tmp_path, Probe.of(model, tiny_tokens(1, 8), "x"), {}, no_track)
    assert "equal those in memory" in exported.verified
    with pytest.raises(UserError, match="'own' is not one that this version reads"):
        verify(exported.path)


# -------------------------------------------------------------------------------------------------- broken folders


@pytest.mark.parametrize("name", ["../gptq/config.json", "/etc/passwd", "..", "a/b", ""])
def test_files_of_a_record_are_files_of_its_folder(name, copy, capsys):
    edit(copy, ("files", name), "ab")
    assert "no file of this folder" in refused(copy, capsys)


def test_weights_that_were_not_written_are_named(copy, capsys):
    (copy / "model-2.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    assert "model-2.safetensors was not written with the checkpoint" in refused(copy, capsys)


def test_a_record_that_is_a_pipe_endless_missing_or_a_folder_is_one_line(copy, capsys):
    (copy / RECORD).unlink()
    refused(copy, capsys)
    (copy / RECORD).mkdir()
    refused(copy, capsys)
    (copy / RECORD).rmdir()
    os.mkfifo(copy / RECORD)
    assert "no regular file" in refused(copy, capsys)
    (copy / RECORD).unlink()
    (copy / RECORD).symlink_to("/dev/zero")
    assert "no regular file" in refused(copy, capsys)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 5000, '{"a": 1}', "\0", "NaN", "1" * 5000])
def test_a_record_that_is_none_is_one_line(text, copy, capsys):
    (copy / RECORD).write_text(text)
    refused(copy, capsys)


def ends(folder, capsys):
    code = main(["verify", str(folder)])
    said = capsys.readouterr().err
    assert code in (0, 2)
    assert said.count("\n") == (code == 2)


@FUZZ
@given(st.data())
def test_any_record_is_verified_or_one_line(copy, capsys, data):
    path = copy / RECORD
    whole = path.read_text()
    place = data.draw(st.sampled_from([p for p in places(json.loads(whole)) if len(p) < 4]))
    edit(copy, place, data.draw(values | st.just(nested(300))))
    try:
        ends(copy, capsys)
    finally:
        path.write_text(whole)


QUANTIZATION = {"bits": 10**9, "group_size": 10**12, "checkpoint_format": None, "quant_method": {}}


@pytest.mark.parametrize("key", QUANTIZATION)
def test_a_config_that_claims_what_the_files_do_not_hold_is_one_line(key, copy, capsys):
    edit(copy, ("quantization_config", key), QUANTIZATION[key], "config.json")
    edit(copy, ("files",), {})  # a stranger's record fits the stranger's files
    ends(copy, capsys)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**9), ("vocab_size", 10**12), ("model_type", "x")])
def test_no_model_is_built_that_the_files_do_not_hold(key, value, copy):
    edit(copy, (key,), value, "config.json")
    with pytest.raises(UserError):
        reference_model(copy)


def test_codes_that_words_do_not_hold_are_not_allocated():
    for bits, count in ((4, 10**12), (10**9, 1), (0, 1), (8, 5)):
        with pytest.raises(ValueError, match="do not hold"):
            unpack_words(torch.zeros(2, 1, dtype=torch.int32), bits, count)


# ---------------------------------------------------------------------------------------------------------- names


def test_no_file_of_a_checkpoint_names_a_path(written):
    for folder in written.values():
        for path in folder.iterdir():
            assert b"somebody" not in path.read_bytes(), path.name
            assert b"secret place" not in path.read_bytes(), path.name
        assert json.loads((folder / RECORD).read_text())["facts"]["model"] == {"source": "llama", "sha256": "ab"}
        assert "made from | llama (sha256 ab)" in (folder / "README.md").read_text()


TEXTS = {
    "/home/john doe/text.txt": "text.txt",
    "see /home/a/b.txt, and https://x.org/y/z and/or 1/2 a / b": "see b.txt, and https://x.org/y/z and/or 1/2 a / b",
    "file:///home/x/y.txt (3 windows)": "y.txt (3 windows)",
    "C:\\Users\\x\\model": "model",
    "~/m/x": "x",
    "text of /home/john doe/my texts/a.txt (4 windows)": "text of a.txt (4 windows)",
    "run.py model.path=/a/b/c data.path=/d/e.txt": "run.py model.path=c data.path=e.txt",
    "hub org/name@abc": "hub org/name@abc",
    "wikitext2/ppl@2048": "wikitext2/ppl@2048",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_path_is_published_by_its_last_part(text):
    assert names_only(text) == TEXTS[text]


def test_a_card_publishes_no_path_and_no_host_of_its_row():
    config = {"model": {"path": PRIVATE}, "out": "/scratch/somebody/run"}
    manifest = {"model": {"source": f"{PRIVATE} at main"}, "provenance": {"host": "somebodys-laptop", "git": None}}
    card = model_card({"model": "llama", "config": config, "manifest": manifest, "metrics": {}}, "hf", [])
    assert "somebody" not in card
    assert '"source": "llama at main"' in card


@pytest.mark.parametrize("name", NAMES)
def test_a_card_shows_names_and_obeys_none(name):
    row = {"model": name, "method": name, "grid": name, "metrics": {f"{name}/kl": 1.0, name: "inf"}}
    card = model_card(row, "hf", [name], {"model": {"source": name, "sha256": name}})
    text = card.split("## Loading")[0].split("---\n", 2)[2] + card.split("## Notes")[1].split("## The results row")[0]
    assert markdown(name).strip() in text
    assert not any(bad in text.replace("\\<", "") for bad in ("<script", "<img"))
    assert yaml.safe_load(card.split("---\n", 2)[1])["base_model_relation"] == "quantized"
    assert json.loads(card.split("```json\n")[1].split("\n```")[0])["model"] == names_only(name)


# ------------------------------------------------------------------------------------------------------ Modelfile

CHATML = (
    "{{% if messages[0]['role'] != 'system' %}}<|im_start|>system\n{}<|im_end|>\n{{% endif %}}"
    "{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n{{{{ m['content'] }}}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


@pytest.mark.parametrize("system", ['Hi """\nADAPTER ./evil', '"""', 'a """ b'])
def test_a_system_message_that_would_end_its_quotes_is_left_to_the_chat_template(system):
    tokenizer = bpe(["bytes of words"])
    tokenizer.chat_template = CHATML.format(system)
    text = modelfile("m.gguf", tokenizer)
    assert text == 'FROM ./m.gguf\nPARAMETER stop "<|end|>"\n'
    tokenizer.chat_template = CHATML.format('Say "hi".\nFROM here')
    assert 'SYSTEM """Say "hi".\nFROM here"""' in modelfile("m.gguf", tokenizer)
