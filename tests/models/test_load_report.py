"""A model is what its files say: where files and model differ is refused or named, in memory and on disk alike."""

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import save_tiny_folder, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file

from gptq_awq.errors import UserError
from gptq_awq.models.load import LoadedModel, LocalModel
from gptq_awq.models.offload import offloaded

BOTH = pytest.mark.parametrize("room", [None, 0], ids=["in-memory", "offloaded"])


def edited(folder: Path, change=lambda tensors: tensors, name: str = "llama", **config) -> Path:
    """A random model's folder with its tensors and config changed."""
    save_tiny_folder(folder, name)
    tensors = change(load_file(folder / "model.safetensors"))
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


def load(folder: Path, room: int | None) -> LoadedModel:
    loaded = LocalModel(path=str(folder)).load("float32", "cpu", room)
    assert offloaded(loaded.model) == (room == 0)
    return loaded


def refused(folder: Path, room: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        LocalModel(path=str(folder)).load("float32", "cpu", room)
    assert str(error.value).startswith(f"model.path={folder}: ")
    assert "\n" not in str(error.value)


def logits(model) -> torch.Tensor:
    return model(tiny_tokens()).logits


# ---------------------------------------------------------------------------------------- tensors without a place


@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt-neox", "gemma3", "phi3", "mixtral", "deepseek-v3"])
def test_a_folder_of_transformers_own_is_loaded_without_a_word(name, room, tmp_path, caplog):
    loaded = load(save_tiny_folder(tmp_path / "m", name), room)
    assert loaded.report.row() == {"vocabulary": 64, "context": loaded.report.context}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@BOTH
def test_biases_that_the_config_denies_are_named(room, tmp_path, caplog):
    def biased(tensors):
        return tensors | {f"model.layers.{i}.self_attn.{p}_proj.bias": torch.ones(64) for i in range(2) for p in "qo"}

    found = load(edited(tmp_path / "m", biased), room)
    assert set(found.report.row()["unplaced"]) == {f"model.layers.*.self_attn.{p}_proj.bias (2)" for p in "qo"}
    [warning] = caplog.messages
    assert "no place" in warning
    assert "q_proj.bias (2)" in warning
    assert torch.equal(logits(found.model), logits(tiny_model("llama")))


@BOTH
def test_an_adapter_that_is_not_merged_is_named(room, tmp_path, caplog):
    def with_lora(tensors):
        rank = {"A": (8, 64), "B": (64, 8)}
        names = [key.removesuffix("weight") for key in tensors if "q_proj" in key]
        return tensors | {f"{n}lora_{x}.default.weight": torch.ones(rank[x]) for n in names for x in rank}

    folder = edited(tmp_path / "m", with_lora)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    row = load(folder, room).report.row()
    assert row["adapters"][0] == "adapter_config.json"
    assert {"model.layers.*.self_attn.q_proj.lora_A.default.weight (2)"} < set(row["adapters"])
    assert "unplaced" not in row
    assert any("adapter is not merged" in message for message in caplog.messages)


@BOTH
def test_what_transformers_leaves_out_itself_is_in_the_report_and_no_warning(room, tmp_path, caplog):
    def with_old_buffers(tensors):
        return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}

    report = load(edited(tmp_path / "m", with_old_buffers), room).report
    assert report.left_out == ("model.layers.*.self_attn.rotary_emb.inv_freq",)
    assert not caplog.messages


# ------------------------------------------------------------------------------------------------- layers, shapes


@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "deepseek-v3", "mixtral"])
def test_layers_that_no_config_counts_are_refused(name, room, tmp_path):
    count = {"gpt2": "n_layer"}.get(name, "num_hidden_layers")
    folder = edited(tmp_path / "m", name=name, **{count: 1})
    refused(folder, room, r"holds .*\.[12]\..*config\.json counts 1 such layers")


@BOTH
def test_layers_are_counted_under_their_names_in_the_files(room, tmp_path):
    def without_prefix(tensors):
        return {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}

    folder = edited(tmp_path / "m", without_prefix, "gpt2")
    assert torch.equal(logits(load(folder, room).model), logits(tiny_model("gpt2")))
    refused(edited(tmp_path / "n", without_prefix, "gpt2", n_layer=1), room, r"holds h\.1\..* counts 1 such layers")


@BOTH
def test_layers_that_predict_further_tokens_are_counted_by_the_config(room, tmp_path, caplog):
    def further(tensors):
        last = {key: tensor for key, tensor in tensors.items() if key.startswith("model.layers.1.")}
        return tensors | {key.replace("layers.1", "layers.2"): tensor for key, tensor in last.items()}

    report = load(edited(tmp_path / "m", further, num_nextn_predict_layers=1), room).report
    assert "model.layers.*.self_attn.q_proj.weight" in report.left_out
    assert not report.unplaced
    assert not caplog.messages
    refused(edited(tmp_path / "n", further, num_nextn_predict_layers=0), room, "counts 2 such layers")


@BOTH
def test_places_without_tensors_are_refused(room, tmp_path):
    refused(
        edited(tmp_path / "m", num_hidden_layers=3), room, r"holds no weights for model\.layers\.2\..*\(9 missing\)"
    )
    refused(edited(tmp_path / "n", attention_bias=True), room, r"holds no weights for .*_proj\.bias \(8 missing\)")


@BOTH
def test_shapes_that_the_config_contradicts_are_refused(room, tmp_path):
    refused(edited(tmp_path / "m", intermediate_size=96), room, "shape|size")
    refused(edited(tmp_path / "n", name="mixtral", num_local_experts=3), room, "shape|size")


# ------------------------------------------------------------------------------------------------- codes for weights


def coded(dtype, top: float, scale_name: str):
    """Change of every linear's weight into codes of `dtype` with a scale beside them."""

    def change(tensors):
        for key in [key for key in tensors if "proj" in key]:
            scale = tensors[key].abs().amax() / top
            codes = tensors[key] / scale
            tensors[key] = (
                codes.to(dtype) if dtype.is_floating_point and dtype.itemsize == 1 else codes.round().to(dtype)
            )
            tensors[scale_name.format(key.removesuffix(".weight"))] = scale.reshape(1)
        return tensors

    return change


@BOTH
@pytest.mark.parametrize(
    ("dtype", "top", "scale"),
    [
        (torch.float8_e4m3fn, 448, "{}.weight_scale_inv"),
        (torch.float8_e4m3fn, 448, "{}.scale_weight"),
        (torch.float8_e5m2, 448, "{}.weight_scale"),
        (torch.int8, 127, "{}.weight_scale"),
        (torch.int8, 127, "{}.SCB"),
        (torch.uint8, 127, "{}.weight.absmax"),
        (torch.bfloat16, 127, "{}.weight_scale"),
    ],
)
def test_codes_with_scales_and_no_quantization_config_are_refused(dtype, top, scale, room, tmp_path):
    refused(edited(tmp_path / "m", coded(dtype, top, scale)), room, r"quantized already.*codes in .*_proj\.weight")


@BOTH
def test_packed_codes_in_place_of_weights_are_refused_as_such(room, tmp_path):
    def packed(tensors):
        key = "model.layers.0.self_attn.q_proj."
        tensors.pop(f"{key}weight")
        return tensors | {f"{key}qweight": torch.ones(8, 64, dtype=torch.int32), f"{key}scales": torch.ones(1, 64)}

    refused(edited(tmp_path / "m", packed), room, r"quantized already.*q_proj\.qweight \(I32\) and no weights for")


@BOTH
def test_float8_without_scales_is_taken_as_it_is_and_named(room, tmp_path, caplog):
    def small(tensors):
        return {key: t.to(torch.float8_e4m3fn) if "proj" in key else t for key, t in tensors.items()}

    loaded = load(edited(tmp_path / "m", small), room)
    assert "model.layers.*.mlp.up_proj.weight (2)" in loaded.report.small_floats
    assert any("8 bits without scales" in message for message in caplog.messages)


@BOTH
def test_weights_beside_which_scales_are_left_over_are_weights(room, tmp_path, caplog):
    def dequantized(tensors):
        key = "model.layers.0.self_attn.q_proj.weight"
        return tensors | {f"{key}_scale": torch.ones(1)}

    loaded = load(edited(tmp_path / "m", dequantized), room)
    assert loaded.report.unplaced == ("model.layers.*.self_attn.q_proj.weight_scale",)
    assert torch.equal(logits(loaded.model), logits(tiny_model("llama")))


@BOTH
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_config_of_quantization_is_refused_wherever_it_stands(key, room, tmp_path):
    refused(edited(tmp_path / "m", **{key: {"quant_method": "gptq", "bits": 4}}), room, "quantized already")


# ------------------------------------------------------------------------------------------------------- the head


def another_head(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)}


@BOTH
def test_a_head_that_is_not_tied_after_all_is_loaded_untied(room, tmp_path, caplog):
    folder = edited(tmp_path / "m", another_head, tie_word_embeddings=True)
    expected = tiny_model("llama")
    expected.lm_head.weight.copy_(expected.get_input_embeddings().weight.flip(0))
    loaded = load(folder, room)
    assert torch.equal(logits(loaded.model), logits(expected))
    assert loaded.model.config.tie_word_embeddings is False
    assert loaded.report.untied == "lm_head.weight"
    assert any("loaded untied" in message for message in caplog.messages)


@BOTH
def test_a_tied_head_that_the_files_repeat_is_tied(room, tmp_path, caplog):
    def repeated(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    loaded = load(edited(tmp_path / "m", repeated, tie_word_embeddings=True), room)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    assert loaded.model.config.tie_word_embeddings is True
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


# ------------------------------------------------------------------------------------------------- tokens, names, files


@BOTH
def test_tokens_beyond_the_embedding_are_named(room, tmp_path, caplog):
    folder = save_tiny_folder(tmp_path / "m")
    loaded = load(folder, room)
    loaded.tokenizer.add_tokens([f"[{i}]" for i in range(5)])
    size = len(loaded.tokenizer)
    loaded.tokenizer.save_pretrained(folder)
    caplog.clear()
    report = load(folder, room).report
    assert report.tokens_beyond == tuple(f"[{i}]" for i in range(64 - (size - 5), 5))
    assert any("none of the embedding's 64" in message for message in caplog.messages)


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "v1.0", "model.gguf", "plain"])
def test_a_folder_keeps_its_whole_name(name, tmp_path):
    assert load(save_tiny_folder(tmp_path / name), None).name == name


@BOTH
def test_a_whole_file_counts_before_an_index_as_in_transformers(room, tmp_path):
    folder = save_tiny_folder(tmp_path / "m")
    other = tiny_model("llama", seed=1)
    other.save_pretrained(tmp_path / "other", max_shard_size="100KB")
    for path in (tmp_path / "other").glob("model*"):
        path.rename(folder / path.name)
    assert torch.equal(logits(load(folder, room).model), logits(tiny_model("llama")))


@BOTH
@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "\x00"])
def test_a_damaged_index_is_named(content, room, tmp_path):
    folder = save_tiny_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, room, "model.safetensors.index.json")


@BOTH
def test_a_part_that_is_not_there_is_named(room, tmp_path):
    folder = save_tiny_folder(tmp_path / "m")
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    refused(folder, room, r"names model-00002-of-\d+\.safetensors, which isn't there")
