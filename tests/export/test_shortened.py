"""A model too large to be tried in an engine is tried with its first blocks, and is whole again afterwards."""

import pytest
import torch
from helpers.architectures import tiny_architecture
from helpers.quantized_weights import rounded_source, source_specs
from helpers.tiny_models import tiny_tokens

from gptq_awq.errors import UserError
from gptq_awq.export import engine_check
from gptq_awq.export.alike import kinds_of_blocks
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.mlx import MLXFormat
from gptq_awq.export.shortened import shortened, tried_in_part
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.mix import llama_grid

FORMATS = {"mlx": (MLXFormat(), AffineGrid(4, 32)), "gguf": (GGUFFormat(), llama_grid("q8_0"))}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "deepseek_v3", "granitemoehybrid", "qwen3_5"])
def test_engines_compute_what_the_first_blocks_of_a_large_model_do(name, kind, monkeypatch, request):
    pytest.importorskip({"mlx": "mlx_lm", "gguf": "xllamacpp"}[kind])
    request.getfixturevalue("converter")
    format_, grid = FORMATS[kind]
    source = rounded_source(tiny_architecture(name), grid)
    model, tokens = source.model, tiny_tokens(1, 20)
    before, options = model(tokens).logits, model.config.to_dict()
    answers = iter([True])  # the whole model is, its first blocks aren't
    monkeypatch.setattr(engine_check, "too_large", lambda _: next(answers, False))
    notes = format_.check_model(source_specs(source), model, None)
    assert any("tried before calibration with its first" in note for note in notes), notes
    assert torch.equal(model(tokens).logits, before)
    assert model.config.to_dict() == options


def test_a_shortened_model_has_a_block_of_each_kind_and_says_so_in_its_config():
    model = tiny_architecture("gemma3_text")
    whole = kinds_of_blocks(model)
    with shortened(model) as count:
        assert kinds_of_blocks(model).keys() <= whole.keys()
        assert len(model.model.layers) == count == model.config.num_hidden_layers == len(model.config.layer_types)
        assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
        model(tiny_tokens(1, 8))
    assert len(model.model.layers) == model.config.num_hidden_layers > count - 1


def test_what_an_engine_refuses_of_the_first_blocks_is_said_and_refuses_nothing(monkeypatch):
    model = tiny_architecture("qwen3")
    answers = iter([True, False])
    monkeypatch.setattr(engine_check, "too_large", lambda _: next(answers))

    def tried():
        raise UserError("mlx computes something else")

    (note,) = tried_in_part(model, "mlx: mlx", tried)
    assert note == "mlx: mlx: of its first 1 blocks alone: mlx computes something else"


def test_a_model_whose_first_blocks_are_too_large_is_not_tried(monkeypatch):
    monkeypatch.setattr(engine_check, "LARGEST", 0)
    model = tiny_architecture("qwen3")
    found = engine_check.check_engine("mlx", "mlx", model, None, dict, 1.0)
    assert found == tried_in_part(model, "mlx: mlx", lambda: found)
    assert "too large" in found[0] or "not installed" in found[0]
