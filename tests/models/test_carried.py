"""Tensors that transformers has no place for go into a checkpoint as they are, and no others do."""

import json

import pytest
import torch
from helpers.quantization_runs import SMALL, tokens
from helpers.quantized_weights import NoTokenizer
from helpers.tiny_models import MIXTURES, save_tiny_folder
from safetensors.torch import load_file, save_file

from gptq_awq import quantize_model
from gptq_awq.export.folder import FolderTensors
from gptq_awq.models.carried import carried, carried_names
from gptq_awq.models.load import load_folder
from gptq_awq.models.unfuse import unfuse


def opened(folder):
    return load_folder(folder, "float32", "cpu", "model.path=x")[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", *MIXTURES])
def test_a_models_own_tensors_are_not_carried_whether_its_experts_are_linears_or_not(name, tmp_path):
    model = opened(save_tiny_folder(tmp_path / "m", name))
    assert not carried_names(model)
    unfuse(model)
    assert not carried_names(model)


NEXT = {f"model.layers.2.{name}": torch.randn(4, 8) for name in ("eh_proj.weight", "shared_head.head.weight")}
WITHIN = {"model.layers.1.self_attn.indexer.wk.weight": torch.randn(4, 64)}
BUFFER = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def with_more(folder):
    """The folder of a tiny model whose files hold more than the model has places for."""
    held = load_file(save_tiny_folder(folder) / "model.safetensors")
    save_file(held | NEXT | WITHIN | BUFFER, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_layers_that_predict_further_tokens_are(tmp_path):
    further, found = NEXT | WITHIN, dict(carried(opened(with_more(tmp_path / "m")), torch.bfloat16))
    assert found.keys() == further.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in further.items())


@pytest.mark.parametrize(
    ("method", "expected"), [("gptq", {*NEXT, *WITHIN}), ("awq", {*NEXT}), ("smoothquant", {*NEXT}), ("quarot", set())]
)
def test_none_is_carried_whose_input_a_transform_has_changed(method, expected, tmp_path, caplog):
    model = opened(with_more(tmp_path / "m"))
    done = quantize_model(model, tokens(), method, bits=4, group_size=32, settings=SMALL)
    done.save(tmp_path / "out", "hf", NoTokenizer())
    assert (NEXT | WITHIN).keys() & FolderTensors(tmp_path / "out").keys() == expected
    assert ("a transform changed what they read" in caplog.text) == (expected != {*NEXT, *WITHIN})
