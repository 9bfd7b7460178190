"""Dequantized folders: transformers loads exactly the weights that were rounded to the dtype."""

import json

import pytest
import torch
from helpers.architectures import tiny_architecture
from helpers.gguf_models import bpe
from helpers.quantized_weights import NoTokenizer, rounded_source, source_specs
from helpers.tiny_models import CONFIGS, tiny_model, tiny_tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from gptq_awq import quantize_model
from gptq_awq.errors import UserError
from gptq_awq.export.awq import AWQFormat
from gptq_awq.export.base import Format, Source
from gptq_awq.export.compressed_tensors import CompressedTensorsFormat
from gptq_awq.export.config import legacy_config, write_config
from gptq_awq.export.folder import FolderTensors
from gptq_awq.export.gptq import GPTQFormat
from gptq_awq.export.hf import HFFormat
from gptq_awq.export.reference import reference_model
from gptq_awq.export.saved import saved_names
from gptq_awq.export.verify import Probe, VerificationRecord, verify
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.grids.ternary import TernaryGrid
from gptq_awq.models.unfuse import unfuse

GRIDS = [
    AffineGrid(4, 32),
    IntGrid(3, 32),
    IntGrid(8, -1, sym=True),
    SignedGrid(4, 32),
    TableGrid("nf4", 32, double_quant=True),
    TernaryGrid(32),
    LlamaMix("q4_0"),
]


def assert_holds(format_, source, folder):
    format_.check(source_specs(source), source.model.config)
    format_.write(source, folder)
    decoded = {each.name: each for each in format_.decode(folder)}
    assert decoded.keys() == source.weights.keys()
    for name, weight in source.weights.items():
        assert decoded[name].codes is None
        assert torch.equal(decoded[name].weight, format_.rounded(weight.dequantize()))


def test_a_format_is_what_exports_expect():
    assert isinstance(HFFormat(), Format)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_folder_holds_every_grid_as_the_dtype_rounds_it(grid, dtype, tmp_path):
    assert_holds(HFFormat(dtype), rounded_source(tiny_model("llama"), grid), tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_gives_the_logits_of_the_model_in_memory(name, tmp_path):
    source = rounded_source(tiny_model(name), IntGrid(4, 32))
    assert_holds(HFFormat("float32"), source, tmp_path)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(model.eval()(tiny_tokens()).logits, source.model(tiny_tokens()).logits)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox",
        "llava",
        "hrm_text",
        "kimi_linear",
        "lfm3",
        "axk2",
        "beam",
        "qwen3_vl_moe",
        "mixtral",
        "gpt2",
        "gemma3",
        "camembert",
    ],
)
def test_tensors_have_the_names_that_save_pretrained_gives_them(name, tmp_path):
    model = tiny_architecture(name)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    done = quantize_model(model, method="rtn", bits=8, group_size=32)
    HFFormat("float32").write(Source(model, NoTokenizer(), "tiny", done.weights), tmp_path / "ours")
    theirs, ours = FolderTensors(tmp_path / "theirs"), FolderTensors(tmp_path / "ours")
    assert set(ours) == set(theirs)
    back = {key for key in ours if name == "qwen3_vl_moe" and ".experts." in key}  # which save_pretrained leaves
    expected = {key: theirs[key].mT.shape if key in back else theirs[key].shape for key in theirs}
    assert {key: ours[key].shape for key in ours} == expected
    assert {each.name for each in HFFormat("float32").decode(tmp_path / "ours")} == set(done.weights)


@pytest.mark.parametrize("format_", [GPTQFormat(), AWQFormat(), CompressedTensorsFormat()], ids=lambda made: made.name)
def test_packed_folders_have_those_names_too(format_, tmp_path):
    model = tiny_architecture("gpt_neox")
    done = quantize_model(model, method="rtn", bits=4, group_size=32, sym=True)
    source = Source(model, NoTokenizer(), "tiny", done.weights)
    format_.write(source, tmp_path)
    assert "embed_out.weight" in FolderTensors(tmp_path)
    record = VerificationRecord.of(format_, source, tmp_path, Probe.of(source.model, tiny_tokens(2, 16), "test"), {})
    record.write(tmp_path)
    verify(tmp_path)
    with torch.no_grad():
        assert torch.allclose(
            reference_model(tmp_path)(tiny_tokens()).logits, source.model(tiny_tokens()).logits, atol=3e-2
        )


def test_a_tied_embedding_that_is_quantized_is_stored_once(tmp_path):
    source = rounded_source(tiny_model("gemma3"), LlamaMix("q8_0"))
    assert_holds(HFFormat("float32"), source, tmp_path)
    assert "lm_head.weight" not in FolderTensors(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(tiny_tokens()).logits, source.model(tiny_tokens()).logits)


def test_a_model_that_was_not_quantized_is_written_as_it_is(tmp_path):
    model = tiny_model("llama")
    HFFormat("float32").check([], model.config)
    HFFormat("float32").write(Source(model, NoTokenizer(), "tiny", {}), tmp_path)
    assert list(HFFormat("float32").decode(tmp_path)) == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_the_config_says_the_dtype_and_nothing_of_quantization(tmp_path):
    HFFormat().write(rounded_source(tiny_model("llama"), IntGrid(4, 32)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


PUBLISHED = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "llama": {"torch_dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_options_keep_the_spelling_of_the_folder_that_a_model_came_from(name, tmp_path):
    tiny_architecture(name).save_pretrained(tmp_path / "published")
    file = tmp_path / "published" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | PUBLISHED[name]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.float32)
    (tmp_path / "written").mkdir()
    HFFormat("float32").write(Source(model, NoTokenizer(), "tiny", {}), tmp_path / "written")
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    expected = PUBLISHED[name] | ({"torch_dtype": "float32"} if name == "llama" else {})
    assert {key: written[key] for key in expected} == expected
    assert written["dtype"] == "float32"


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3_text", "falcon", "gpt_neox", "lfm3", "llama"])
def test_options_for_older_readers_change_nothing_that_transformers_reads(name, tmp_path):
    model = tiny_architecture(name)
    if name == "llama":
        model.config.rope_parameters = {
            **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        }
    HFFormat("float32").write(Source(model, NoTokenizer(), "tiny", {}), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    read, own = AutoConfig.from_pretrained(tmp_path).to_dict()["rope_parameters"], model.config.rope_parameters
    assert {key: read[key] for key in own or {}} == (own or {})
    assert (written.get("rope_scaling") or {}).get("rope_type") == ("llama3" if name == "llama" else None)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tiny_tokens()).logits
        expected = type(model)(model.config).eval()
        expected.load_state_dict(model.state_dict())
        torch.testing.assert_close(again, expected(tiny_tokens()).logits, rtol=1e-5, atol=1e-5)


def test_parts_of_a_config_have_earlier_names_too(tmp_path):
    write_config(tiny_architecture("step3p7"), tmp_path, torch.float32, None)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["num_attention_groups"] == text["num_key_value_heads"]


@pytest.mark.parametrize("kinds", [["dense", "sparse"], ["dense", "dense", "dense", "sparse"], ["sparse"]], ids=len)
def test_dense_layers_are_counted_by_their_kinds_whatever_else_a_config_says(kinds):
    found = legacy_config({"mlp_layer_types": kinds, "first_k_dense_replace": 2})
    assert found["first_k_dense_replace"] == kinds.count("dense")
    assert legacy_config({"first_k_dense_replace": 2})["first_k_dense_replace"] == 2


@pytest.mark.parametrize(("name", "option"), [("granitemoehybrid", "layer_types"), ("zamba2", "layers_block_type")])
def test_layers_of_mambas_models_are_called_what_they_were_before_transformers_5(name, option, tmp_path):
    model = tiny_architecture(name)
    write_config(model, tmp_path, torch.float32, None)
    written = json.loads((tmp_path / "config.json").read_text())[option]
    assert "mamba" in written
    assert not {"linear_attention", "full_attention"} & set(written)
    assert getattr(AutoConfig.from_pretrained(tmp_path), option) == getattr(model.config, option)
    assert legacy_config({"layer_types": ["linear_attention"]})["layer_types"] == ["linear_attention"], "Qwen3-Next's"


def test_parts_of_a_config_say_only_what_is_theirs(tmp_path):
    model = tiny_architecture("dbrx")  # whose parts transformers 4 refuses with any other option
    write_config(model, tmp_path, torch.float32, None)
    part = json.loads((tmp_path / "config.json").read_text())["attn_config"]
    assert not {"architectures", "id2label", "return_dict"} & part.keys()
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.attn_config.to_dict() == model.config.attn_config.to_dict() | {"dtype": "float32"}


def test_experts_that_transformers_transposes_as_it_loads_them_are_stored_as_published(tmp_path):
    model = tiny_architecture("qwen3_vl_moe")
    HFFormat("float32").write(Source(model, NoTokenizer(), "tiny", {}), tmp_path)
    own, tensors = model.state_dict(), FolderTensors(tmp_path)
    names = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert names
    for name in names:
        assert torch.equal(tensors[name], own[name].mT), "(experts, in, out), which only transformers 5 reads otherwise"
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(tiny_tokens()).logits, model(tiny_tokens()).logits)


def test_tensors_that_a_checkpoint_joins_with_others_have_no_names_of_their_own():
    model = tiny_architecture("ernie4_5_vl_moe")  # experts for text and for images are joined
    unfuse(model)
    experts = [name for name in model.state_dict() if ".experts.gate_up_proj." in name]
    assert experts
    assert not saved_names(model).keys() & set(experts)


@pytest.mark.parametrize(("name", "tied"), [("internvl", True), ("qwen3_vl_moe", False)])
def test_every_part_of_a_config_says_whether_the_head_is_tied(name, tied, tmp_path):
    model = tiny_architecture(name)
    assert model.config.text_config.tie_word_embeddings != tied, "which transformers doesn't ask, and others do"
    HFFormat("float32").write(Source(model, NoTokenizer(), "tiny", {}), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == tied


def test_a_tokenizer_is_spelled_as_transformers_4_reads_it_and_5_too(tmp_path):
    tokenizer = bpe(["bytes of words"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|a|>"]})
    HFFormat("float32").write(Source(tiny_model("llama"), tokenizer, "tiny", {}), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|a|>"]
    assert "extra_special_tokens" not in config
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    assert loaded("the cat<|a|>sees")["input_ids"] == tokenizer("the cat<|a|>sees")["input_ids"]


def test_rounding_is_named_where_there_is_some():
    assert "bfloat16" in HFFormat().notes[0]
    assert HFFormat("float32").notes == ()


def test_what_overflows_or_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"HFFormat\.dtype=int8"):
        HFFormat("int8")
    source = rounded_source(tiny_model("llama"), IntGrid(4, 32))
    next(iter(source.weights.values())).scales[0, 0] = 1e5
    with pytest.raises(UserError, match="choose bfloat16 or float32"):
        HFFormat("float16").write(source, tmp_path)
