"""llama.cpp's file types: our mixes choose what its own quantizer chooses, tensor by tensor."""

import subprocess

import pytest
from helpers.gguf_models import block_types_in, exported

from gptq_awq.export.engines import find
from gptq_awq.export.gguf import ggml_type
from gptq_awq.export.layout import Layout
from gptq_awq.grids.mix import BASE, LlamaMix
from gptq_awq.models.load import load_folder
from gptq_awq.quantization.targets import assign_grids


@pytest.fixture(scope="module")
def full(stories15m, converter, tmp_path_factory):
    """A float32 GGUF file of a real model and the model itself."""
    model, tokenizer = load_folder(stories15m, "float32", "cpu", "test")
    return exported(tmp_path_factory.mktemp("gguf"), model, tokenizer, plain_dtype="F32", other_ids="allow"), model


@pytest.mark.parametrize("kind", [kind for kind in BASE if not kind.startswith("tq")])
def test_mixes_choose_what_llama_quantize_chooses(full, tmp_path, kind):
    python = find("llamacpp", "gguf")
    if python is None:
        pytest.skip("engine llamacpp is not installed: python scripts/install_engine.py llamacpp")
    path, model = full
    command = [python.parent / "llama-quantize", path, tmp_path / "q.gguf", kind.upper()]
    subprocess.run(command, check=True, capture_output=True)
    read = block_types_in(tmp_path / "q.gguf", Layout.read(path.parent))
    theirs = {name.removesuffix(".weight"): kind for name, kind in read.items()}
    ours = {name: ggml_type(grid) for name, grid in assign_grids(model, LlamaMix(kind)).items()}
    assert ours == {name: theirs[name] for name in ours}
    assert {name for name, dtype in theirs.items() if dtype != "F32"} == set(ours)
