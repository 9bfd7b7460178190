"""Laws of checkpoints: what is written is what was scored, or nothing is written."""

import json
import os
from collections import Counter

import pytest
import torch
from helpers.forked import call
from helpers.paths import ROOT
from helpers.quantized_weights import int_grid
from helpers.tiny_models import tiny_model, tiny_tokens

from gptq_awq import quantize_model
from gptq_awq.errors import UserError
from gptq_awq.export import write as write_module
from gptq_awq.export.awq import AWQFormat
from gptq_awq.export.base import Source, linear_specs
from gptq_awq.export.bnb import BnbFormat
from gptq_awq.export.compressed_tensors import CompressedTensorsFormat
from gptq_awq.export.folder import FolderTensors
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.gptq import GPTQFormat
from gptq_awq.export.hf import HFFormat
from gptq_awq.export.mlx import MLXFormat
from gptq_awq.export.overflow import check_overflow
from gptq_awq.export.reference import reference_model
from gptq_awq.export.verify import Probe, VerificationRecord, verify
from gptq_awq.export.write import Exports, make_exports
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.runtime.progress import no_track


class NoTokenizer:
    """Saves nothing."""

    def save_pretrained(self, folder):
        pass


@pytest.fixture
def source():
    model = tiny_model("llama")
    done = quantize_model(model, method="rtn", bits=4, group_size=32, sym=True)
    return Source(model, NoTokenizer(), "tiny", done.weights)


def probe(source):
    return Probe.of(source.model, tiny_tokens(2, 16), "test")


def export(source, out, *formats, **options):
    return Exports(formats, **options).write(source, out, probe(source), {}, no_track)


def test_a_checkpoint_decodes_to_what_was_in_memory(source, tmp_path):
    (done,) = export(source, tmp_path, MLXFormat(dtype="float32"))
    assert done.path == tmp_path / "checkpoints" / "mlx"
    found = verify(done.path)
    assert found.weights == len(source.weights)
    assert found.with_codes
    assert (done.path / "README.md").is_file()


def test_the_reference_model_computes_what_the_model_in_memory_computes(source, tmp_path):
    (done,) = export(source, tmp_path, MLXFormat(dtype="float32"))
    tokens = tiny_tokens(2, 16)
    with torch.no_grad():
        ours, theirs = (m(input_ids=tokens).logits for m in (source.model, reference_model(done.path)))
    assert torch.allclose(ours, theirs, atol=1e-5)
    record = VerificationRecord.read(done.path)
    assert torch.tensor(record.nll) == pytest.approx(probe(source).nll, abs=1e-5)


def test_one_other_code_in_memory_is_found(source, tmp_path):
    (done,) = export(source, tmp_path, MLXFormat(dtype="float32"))
    name, weight = next(iter(source.weights.items()))
    weight.codes[0, 0] ^= 1
    VerificationRecord.of(MLXFormat(dtype="float32"), source, done.path, probe(source), {}).write(done.path)
    with pytest.raises(UserError, match=rf"codes of {name}"):
        verify(done.path)


def test_one_other_byte_on_disk_is_found(source, tmp_path):
    (done,) = export(source, tmp_path, HFFormat(dtype="float32"))
    path = next(done.path.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="sha256 differs"):
        verify(done.path)


def test_a_missing_file_is_found(source, tmp_path):
    (done,) = export(source, tmp_path, HFFormat(dtype="float32"))
    (done.path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        verify(done.path)


def test_a_crash_while_writing_leaves_the_earlier_checkpoint(source, tmp_path, monkeypatch):
    (done,) = export(source, tmp_path, HFFormat(dtype="float32"))
    before = {path.name: path.read_bytes() for path in done.path.iterdir()}
    monkeypatch.setattr(write_module, "verify", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(source, tmp_path, HFFormat(dtype="bfloat16"))
    assert {path.name: path.read_bytes() for path in done.path.iterdir()} == before
    assert [path.name for path in done.path.parent.iterdir()] == ["hf"]


def test_a_second_export_replaces_the_first(source, tmp_path):
    export(source, tmp_path, HFFormat(dtype="float32"))
    (done,) = export(source, tmp_path, HFFormat(dtype="bfloat16"))
    assert json.loads((done.path / "config.json").read_text())["dtype"] == "bfloat16"
    assert [path.name for path in done.path.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("format_", "choice"),
    [
        (HFFormat("float16"), r"export\.hf\.dtype=bfloat16 or export\.hf\.dtype=float32"),
        (GPTQFormat(), r"export\.gptq\.dtype=bfloat16 with grid\.scale_dtype=bfloat16"),
        (CompressedTensorsFormat(), r"export\.compressed_tensors\.dtype=float32"),
        (BnbFormat(), r"export\.bnb\.dtype=bfloat16 or export\.bnb\.dtype=float32"),
        (MLXFormat(), r"export\.mlx\.dtype=float32"),
        (GGUFFormat(), r"export\.gguf\.plain_dtype=BF16 or export\.gguf\.plain_dtype=F32"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_weight_that_float16_does_not_hold_is_refused_before_calibration(format_, choice):
    grid = {"bnb": TableGrid("nf4", 32), "gguf": SignedGrid(4, 32)}.get(format_.name, int_grid(4, 32, sym=True))
    model = tiny_model("llama")
    linears = linear_specs(model, {"model.layers.0.mlp.up_proj": grid}, True)
    check_overflow(format_, linears, model)
    model.get_input_embeddings().weight[5, 3] = 1e5
    with pytest.raises(UserError, match=rf"embed_tokens.* holds 1e\+05, .* choose {choice}"):
        check_overflow(format_, linears, model)
    check_overflow(HFFormat("bfloat16"), linears, model)


@pytest.mark.parametrize(
    ("format_", "grid"),
    [
        (GPTQFormat(), int_grid(sym=True)),
        (AWQFormat(), int_grid()),
        (CompressedTensorsFormat(), int_grid()),
        (MLXFormat(), int_grid(sym=True)),
        (BnbFormat(), TableGrid("nf4", 32, double_quant=True)),
        (BnbFormat(), int_grid(8, -1, sym=True)),
    ],
    ids=["gptq", "awq", "compressed_tensors", "mlx", "bnb-nf4", "bnb-int8"],
)
def test_verifying_reads_each_tensor_once_or_twice_however_many_there_are(format_, grid, tmp_path, monkeypatch):
    model = tiny_model("llama")
    source = Source(model, NoTokenizer(), "tiny", quantize_model(model, method="rtn", grid=grid).weights)
    (done,) = export(source, tmp_path, format_)
    read, own = Counter(), FolderTensors.__getitem__
    monkeypatch.setattr(FolderTensors, "__getitem__", lambda self, name: read.update([name]) or own(self, name))
    verify(done.path)
    assert max(read.values()) <= 2, "reading all for each of them takes days of a large model"


def test_large_models_are_sharded_with_an_index(source, tmp_path):
    (done,) = export(source, tmp_path, HFFormat(dtype="float32", shard="100KB"))
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert verify(done.path).weights == len(source.weights)


def test_an_unknown_format_is_refused_by_name():
    with pytest.raises(UserError, match=r"export\.formats=onnx: choose among hf"):
        make_exports(["onnx"], hf=HFFormat())


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no verification\.json"):
        verify(tmp_path)


def verify_command(folder, *options):
    return call("gptq_awq.export", ["verify", folder, *options], os.environ, ROOT)


def test_a_run_exports_and_the_command_verifies(cli, tiny, tmp_path):
    arguments = [*(a for a in tiny if not a.startswith(("group_size", "sym"))), "group_size=32", "sym=true"]
    formats = ["gptq", "compressed_tensors", "mlx", "hf"]
    done = cli("method=gptq", "bits=4", *arguments, f"export.formats=[{','.join(formats)}]", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(row["manifest"]["checkpoints"]) == set(formats)
    assert row["seconds"]["export"] > 0
    for name in formats:
        folder = tmp_path / "out" / "checkpoints" / name
        assert verify_command(folder).returncode == 0
        card = (folder / "README.md").read_text()
        assert "tiny/ppl@32" in card  # rewritten once the model was scored
        assert {"config.json", "tokenizer.json", "verification.json"} <= {p.name for p in folder.iterdir()}
    weights = tmp_path / "out" / "checkpoints" / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    failed = verify_command(weights.parent)
    assert failed.returncode == 2
    assert "sha256 differs" in failed.stderr


REFUSED = {
    "[awq] bits=3": "4",
    "[awq] group_size=32 method.solver.static_groups=false": "static_groups=true",
    "[gguf] group_size=64": "grid=q4_0",
    "[mlx] group_size=24": "32",
    "[bnb] bits=4": "nf4",
    "[gptq] grid=nf4": "grid",
    "[nonsense] bits=4": "give one of gptq, awq",
    "[hf] bits=3 grid=q8_0": "leave bits out",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused_before_calibration(cli, tiny, tmp_path, case):
    formats, *options = case.split()
    kept = [a for a in tiny if not a.startswith(("group_size", "sym"))]
    done = cli("method=gptq", *kept, *options, f"export.formats={formats}", f"out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert REFUSED[case] in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "results.json").exists()
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("grid", ["q4_0", "q4_k_m"])
def test_a_gguf_file_of_a_real_model_decodes_to_what_was_scored(cli, tiny, stories15m, tmp_path, grid):
    arguments = [a for a in tiny if not a.startswith(("group_size", "sym", "model", "eval"))]
    done = cli(
        *("method=rtn", f"grid={grid}", "model=local", f"model.path={stories15m}", *arguments),
        *("eval=none", "export.formats=[gguf]", "export.gguf.other_ids=allow", f"out={tmp_path / 'out'}"),
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "checkpoints" / "gguf"
    assert {"model.gguf", "Modelfile", "README.md"} <= {p.name for p in folder.iterdir()}
    assert verify_command(folder).returncode == 0
