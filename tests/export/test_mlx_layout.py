"""Where mlx-lm puts tensors is asked of mlx-lm: experts, fused matrices, what codes can't follow, what it refuses."""

import importlib.util
import json

import pytest
import torch
from helpers.architectures import tiny_architecture
from helpers.mlx_logits import mlx_logits
from helpers.quantized_weights import rounded_source, source_specs
from helpers.tiny_models import tiny_model

from gptq_awq.errors import UserError
from gptq_awq.export import layout, mlx_layout, mlx_options
from gptq_awq.export.base import LinearSpec, Source
from gptq_awq.export.folder import FolderTensors
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.layout import LAYOUT
from gptq_awq.export.mlx import MLXFormat
from gptq_awq.export.mlx_options import options_for_mlx
from gptq_awq.export.reference import reference_model
from gptq_awq.export.verify import Probe, VerificationRecord, verify
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.models.experts import experts_in

GRID = AffineGrid(4, 32)
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 150000.0}
MIXTURES = ("mixtral", "granitemoe", "deepseek_v3", "gpt_oss")
"""Experts apart, in one tensor, beside a matrix that is split, and transposed; benchmarks/readers.py has more."""

pytest.importorskip("mlx_lm")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(layout, "cache_dir", lambda: folder)


def source_of(name, grid=GRID):
    """A tiny mixture, its experts rounded to nearest, with the rope that mlx-lm computes."""
    model = tiny_architecture(name)
    if name == "gpt_oss":
        config = type(model.config)(**model.config.to_dict() | {"rope_parameters": PLAIN_ROPE})
        state, model = model.state_dict(), type(model)(config).eval().requires_grad_(False)
        model.load_state_dict(state)
    source = rounded_source(model, grid)
    assert experts_in(model)
    return source


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_computes_the_same_logits_in_mlx_lm_and_decodes_to_its_codes(name, tmp_path):
    source = source_of(name)
    notes = MLXFormat().check_model(source_specs(source), source.model, None)
    MLXFormat("float32").write(source, tmp_path)
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlx_logits(tmp_path, tokens), source.model(tokens).logits, atol=1e-4, rtol=0)
    decoded = {each.name: each for each in MLXFormat().decode(tmp_path)}
    assert decoded.keys() == source.weights.keys()
    for module, weight in source.weights.items():
        assert torch.equal(decoded[module].weight, weight.dequantize())
        assert decoded[module].codes is None or torch.equal(decoded[module].codes, weight.codes)
    values = [module for module in decoded if decoded[module].codes is None]
    assert bool(values) == bool(notes) == (name == "deepseek_v3"), "kv_b, half of which mlx-lm transposes"
    assert all("kv_b" in module for module in values)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("kind", ["mlx", "gguf"])
def test_a_mixture_is_verified_and_opened_from_its_folder(name, kind, tmp_path, request):
    if kind == "gguf":
        request.getfixturevalue("converter")
    format_ = {"mlx": MLXFormat("float32"), "gguf": GGUFFormat(plain_dtype="F32")}[kind]
    source = source_of(name, {"mlx": GRID, "gguf": SignedGrid(8, 32)}[kind])
    source = Source(source.model, None, name, source.weights)
    format_.write(source, tmp_path)
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    VerificationRecord.of(format_, source, tmp_path, Probe.of(source.model, tokens, "random"), {}).write(tmp_path)
    assert verify(tmp_path).weights == len(source.weights)
    torch.testing.assert_close(reference_model(tmp_path)(tokens).logits, source.model(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", "qwen3_5_moe", "qwen2_vl", "qwen3_vl_moe"])
def test_the_language_model_of_one_that_sees_is_computed_by_mlx_lm_and_opened_again(name, tmp_path):
    source = rounded_source(tiny_architecture(name), GRID)
    source = Source(source.model, None, name, source.weights)
    MLXFormat().check_model(source_specs(source), source.model, None)
    MLXFormat("float32").write(source, tmp_path)
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    ours = source.model(tokens).logits
    torch.testing.assert_close(mlx_logits(tmp_path, tokens), ours, atol=1e-4, rtol=0)
    assert not any("vis" in tensor for tensor in FolderTensors(tmp_path))
    VerificationRecord.of(MLXFormat(), source, tmp_path, Probe.of(source.model, tokens, "random"), {}).write(tmp_path)
    assert verify(tmp_path).weights == len(source.weights)
    torch.testing.assert_close(reference_model(tmp_path)(tokens).logits, ours, atol=1e-4, rtol=0)


def test_options_that_mlx_lms_class_insists_on_are_stated_from_the_models_own():
    config = tiny_architecture("llama4").config
    written = config.to_dict()
    del written["text_config"]["rms_norm_eps"]
    found = options_for_mlx(config, written)["text_config"]
    assert found["rms_norm_eps"] == config.text_config.rms_norm_eps
    assert found["tie_word_embeddings"] == config.tie_word_embeddings


def test_a_library_that_ends_the_program_is_a_refusal(monkeypatch):
    source = rounded_source(tiny_model("llama"), GRID)

    def ends(*_):
        raise SystemExit(1)  # as mlx-lm's module of OLMo does where a package is missing

    monkeypatch.setattr(mlx_options, "classes", ends)
    with pytest.raises(UserError, match=r"mlx refuses this LlamaForCausalLM .SystemExit: 1."):
        MLXFormat().check_model(source_specs(source), source.model, None)


def test_experts_have_the_names_that_mlx_lm_converts_to(tmp_path):
    MLXFormat().write(source_of("mixtral"), tmp_path)
    tensors = FolderTensors(tmp_path)
    prefix = "model.layers.0.block_sparse_moe.switch_mlp"
    assert tensors[f"{prefix}.down_proj.weight"].shape == (4, 64, 128 * 4 // 32)
    assert {"gate_proj", "up_proj", "down_proj"} == {n.split(".")[5] for n in tensors if n.startswith(prefix)}


def test_experts_of_one_tensor_want_one_grid():
    source = source_of("mixtral")
    odd = next(name for name in source.weights if "experts" in name)
    specs = [LinearSpec(n, *w.codes.shape, AffineGrid(8, 32) if n == odd else GRID) for n, w in source.weights.items()]
    with pytest.raises(UserError, match=r"mlx-lm has one type for .*choose one grid"):
        MLXFormat().check_model(specs, source.model, None)


def test_what_mlx_lm_takes_for_granted_and_a_config_does_otherwise_is_refused():
    source = rounded_source(tiny_model("gpt-neox"), GRID)  # mlx-lm has no other MLP than four times as wide
    with pytest.raises(UserError, match=r"mlx refuses this GPTNeoXForCausalLM .*shape"):
        MLXFormat().check_model(source_specs(source), source.model, None)


def test_a_layout_is_observed_once_for_a_config(monkeypatch, tmp_path):
    seen, observed = [], mlx_layout.Conversion._observed
    monkeypatch.setattr(mlx_layout.Conversion, "_observed", lambda self: seen.append(1) or observed(self))
    source = rounded_source(tiny_model("llama"), GRID)
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
        MLXFormat().write(source, tmp_path / name)
    assert len(seen) == 1
    assert (tmp_path / "first" / LAYOUT).is_file()
    assert content(tmp_path / "first") == content(tmp_path / "again")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}


def test_a_tensor_that_is_computed_from_several_blocks_is_refused(monkeypatch):
    import mlx.core as mx
    from mlx_lm.models import llama

    def mixed(_self, weights):
        first, second = (f"model.layers.{layer}.input_layernorm.weight" for layer in range(2))
        return weights | {first: mx.add(weights[first], weights[second])}

    monkeypatch.setattr(llama.Model, "sanitize", mixed)
    with pytest.raises(UserError, match="from several blocks"):
        mlx_layout.Conversion.of(tiny_model("llama")).layout()


def test_without_mlx_lm_a_line_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "mlx_lm" else find(name))
    with pytest.raises(UserError, match=r"pip install mlx-lm"):
        mlx_layout.Conversion.of(tiny_model("llama"))


def test_options_that_published_configs_state_are_stated(tmp_path):
    model = source_of("qwen3_moe")
    MLXFormat().write(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_experts"], config["head_dim"]) == (4, 16)
