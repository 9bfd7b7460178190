"""Tensors that transformers has no place for go into a checkpoint as they are, and no others do."""

import json

import pytest
import torch
from helpers.tiny_models import MIXTURES, save_tiny_folder
from safetensors.torch import load_file, save_file

from gptq_awq.models.carried import carried, carried_names
from gptq_awq.models.experts import unfuse
from gptq_awq.models.load import load_folder


def opened(folder):
    return load_folder(folder, "float32", "cpu", "model.path=x")[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", *MIXTURES])
def test_a_models_own_tensors_are_not_carried_whether_its_experts_are_linears_or_not(name, tmp_path):
    model = opened(save_tiny_folder(tmp_path / "m", name))
    assert not carried_names(model)
    unfuse(model)
    assert not carried_names(model)


def test_layers_that_predict_further_tokens_are(tmp_path):
    folder = save_tiny_folder(tmp_path / "m")
    held = load_file(folder / "model.safetensors")
    further = {f"model.layers.2.{n}": torch.randn(4, 8) for n in ("eh_proj.weight", "shared_head.head.weight")}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(held | further | buffer, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(content))
    found = dict(carried(opened(folder), torch.bfloat16))
    assert found.keys() == further.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in further.items())
