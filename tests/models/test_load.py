import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from helpers.damage import flip
from helpers.fake_hub import COMMIT, fake_hub, run_against
from helpers.tiny_models import tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gptq_awq.errors import UserError
from gptq_awq.models import load
from gptq_awq.models.load import AssetModel, HubModel, LocalModel, folder_sha256
from gptq_awq.storage.assets import Asset

TEXT = "Once upon a time, in 1998, there was a café — and it's  gone.\n\n\tThe end"
MERGES = ["o n", "t h", "th e", "Ġ the", "Ġ t"]
MERGED = [merge.replace(" ", "") for merge in MERGES]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def vocabulary() -> list[str]:
    return ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *MERGED]


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(vocabulary())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split()) for merge in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny random Llama as a transformers folder."""
    llama().save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def edit(folder):
    """Rewrite the tiny folder's weights or config.json by a function of them."""

    def rewrite(weights=lambda w: None, **config):
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        changed = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(changed))
        return str(folder)

    return rewrite


# -------------------------------------------------------------------------------------------------- local


def test_a_local_folder_loads_as_transformers_loads_it(stories15m):
    loaded = LocalModel(path=str(stories15m)).load("float32", "cpu")
    reference = transformers.AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in reference.state_dict().items())
    assert loaded.name == "stories15M"
    assert loaded.source == str(stories15m)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer("Once upon", add_special_tokens=False).input_ids


def test_the_hash_is_sha256sums_output_hashed(folder):
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    ]
    assert folder_sha256(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert LocalModel(path=str(folder)).load("float32", "cpu").sha256 == folder_sha256(folder)


def test_the_hash_changes_with_a_weight_and_with_the_config(folder, edit):
    hashes = {folder_sha256(folder)}
    edit(lambda weights: weights["lm_head.weight"].view(-1)[:1].add_(1e-3))
    hashes.add(folder_sha256(folder))
    edit(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    hashes.add(folder_sha256(folder))
    assert len(hashes) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_come_in_the_dtype_asked_for(folder, dtype):
    loaded = LocalModel(path=str(folder), name="mine").load(dtype, "cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.name == "mine"


def test_loading_is_silent_and_leaves_transformers_as_talkative_as_it_was(folder, capfd, caplog):
    before = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    with caplog.at_level(logging.WARNING):
        LocalModel(path=str(folder)).load("float32", "cpu")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    after = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    assert before == after


def raises(message: str, model, dtype: str = "float32", device: str = "cpu") -> None:
    with pytest.raises(UserError, match=message) as error:
        model.load(dtype, device)
    assert "\n" not in str(error.value)


def test_paths_that_hold_no_model_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    raises(r"model\.path is not set", LocalModel())
    raises(r"model\.path=/no/where: there is no such", LocalModel(path="/no/where"))
    raises(r"model\.path=.*config\.json", LocalModel(path=str(tmp_path)))
    raises(r"model\.path=.*neither a \.gguf", LocalModel(path=str(tmp_path / "notes.txt")))
    raises(r"model\.path=.*broken\.gguf: cannot be loaded", LocalModel(path=str(tmp_path / "broken.gguf")))


def test_dtypes_and_devices_that_are_not_there_are_named(folder):
    raises(r"dtype=int7: choose one of float32, bfloat16, float16", LocalModel(path=str(folder)), "int7")
    raises(r"device=abacus", LocalModel(path=str(folder)), device="abacus")
    raises(r"device=cuda:99", LocalModel(path=str(folder)), device="cuda:99")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(edit, value):
    name = "model.layers.1.mlp.up_proj.weight"
    path = edit(lambda weights: weights[name][3, 4].fill_(value))
    raises(rf"model\.path=.*{name} is not finite with dtype=float32", LocalModel(path=path))


def test_a_weight_that_only_overflows_the_dtype_is_named_with_it(edit):
    path = edit(lambda weights: weights["lm_head.weight"][0, 0].fill_(1e30))
    raises(r"lm_head\.weight is not finite with dtype=float16", LocalModel(path=path), "float16")
    LocalModel(path=path).load("float32", "cpu")


def test_a_model_of_zeros_is_refused_and_single_zero_matrices_are_counted(edit, caplog):
    path = edit(lambda weights: weights["model.layers.1.mlp.up_proj.weight"].zero_())
    LocalModel(path=path).load("float32", "cpu")
    assert re.search(r"1 of \d+ weight matrices are zero, .*layers\.1\.mlp\.up_proj", caplog.text)
    path = edit(lambda weights: [weight.zero_() for weight in weights.values() if weight.dim() > 1])
    raises(r"model\.path=.*every weight matrix is zero", LocalModel(path=path))


def test_weights_that_are_missing_are_not_made_up(edit):
    path = edit(lambda weights: weights.pop("model.layers.0.self_attn.q_proj.weight"))
    raises(r"model\.path=.*no weights for model\.layers\.0\.self_attn\.q_proj\.weight", LocalModel(path=path))


def test_a_missing_tokenizer_is_named(folder):
    for path in folder.glob("token*"):
        path.unlink()
    raises(r"model\.path=.*cannot be loaded", LocalModel(path=str(folder)))


def test_a_truncated_weight_file_is_named(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    raises(r"model\.path=.*cannot be loaded", LocalModel(path=str(folder)))


def test_a_model_quantized_already_is_refused(edit):
    path = edit(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    raises(r"model\.path=.*quantized already", LocalModel(path=path))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_models_that_are_not_causal_are_refused(tmp_path, kind):
    small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "bert":
        config = transformers.BertConfig(**small, intermediate_size=32)
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "m")
    else:
        config = transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    raises(r"model\.path=", LocalModel(path=str(tmp_path / "m")))


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt-neox", "gemma3"])
def test_other_architectures_load_too(tmp_path, architecture):
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    loaded = LocalModel(path=str(tmp_path / "m")).load("float32", "cpu")
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)


# --------------------------------------------------------------------------------------------------- GGUF


def as_gguf_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp pairs rotary dimensions (0,1), (2,3)…, transformers (0,d/2), (1,d/2+1)…: reorder the rows."""
    out, columns = weight.shape
    return weight.view(heads, 2, out // heads // 2, columns).transpose(1, 2).reshape(out, columns)


def write_gguf(model: transformers.LlamaForCausalLM, path: Path) -> dict[str, torch.Tensor]:
    """Write a Llama, one weight in Q8_0 and the rest in F32; returns what weights the file stands for."""
    config, weights = model.config, {k: v.detach().clone() for k, v in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = heads.get(name.split(".")[-2])
        data = (as_gguf_rows(weight, heads) if heads else weight).numpy()
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target
        if name.endswith("layers.0.mlp.up_proj.weight"):
            q8 = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quants.quantize(data, q8)
            writer.add_tensor(target, blocks, raw_dtype=q8)
            weights[name] = torch.from_numpy(gguf.quants.dequantize(blocks, q8))
        else:
            writer.add_tensor(target, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def gguf_file(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path / "tiny.Q8_0.gguf"
    return path, write_gguf(llama(), path)


def test_a_gguf_file_loads_dequantized_as_a_plain_model(gguf_file):
    path, expected = gguf_file
    loaded = LocalModel(path=str(path)).load("float32", "cpu")
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.name == "tiny.Q8_0"
    assert getattr(loaded.model.config, "quantization_config", None) is None


def test_a_gguf_files_tokenizer_survives_the_cache(gguf_file):
    path, _ = gguf_file
    direct = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for _ in range(2):  # the second time out of the cache
        cached = LocalModel(path=str(path)).load("float32", "cpu").tokenizer
        ids = cached(TEXT, add_special_tokens=False).input_ids
        assert ids == direct(TEXT, add_special_tokens=False).input_ids
        assert ids == byte_tokenizer()(TEXT, add_special_tokens=False).input_ids
        assert cached.decode(ids) == TEXT
        assert (cached.bos_token_id, cached.eos_token_id) == (0, 1)


def test_a_gguf_file_is_dequantized_once(gguf_file, cache, monkeypatch):
    path, _ = gguf_file
    LocalModel(path=str(path)).load("float32", "cpu")
    assert len(list((cache / "models").iterdir())) == 1
    monkeypatch.setattr(load, "scratch_folder", None)  # which a second dequantization would need
    LocalModel(path=str(path)).load("bfloat16", "cpu")


def test_a_dequantized_model_that_changed_on_disk_is_made_again(gguf_file, cache):
    path, expected = gguf_file
    LocalModel(path=str(path)).load("float32", "cpu")
    folder = next((cache / "models").iterdir())
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        flip(folder / name, (folder / name).stat().st_size - 2)
        weights = LocalModel(path=str(path)).load("float32", "cpu").model.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert len(list((cache / "models").iterdir())) == 1, "what was damaged is gone"


def test_a_gguf_file_that_cannot_be_read_leaves_nothing_in_the_cache(tmp_path, cache):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    raises("cannot be loaded", LocalModel(path=str(tmp_path / "broken.gguf")))
    assert list((cache / "models").iterdir()) == []


def test_an_asset_is_loaded_from_the_gguf_file_it_carries(gguf_file, monkeypatch):
    path, _ = gguf_file

    class FromDisk:
        def deliver(self, target: Path) -> str:
            shutil.copyfile(path, target)
            return "disk"

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(load.ASSETS, "tiny", Asset("tiny", "tiny.gguf", sha256, (FromDisk(),)))
    loaded = AssetModel(name="tiny-model", asset="tiny").load("float32", "cpu")
    assert (loaded.name, loaded.source, loaded.sha256) == ("tiny-model", "disk", sha256)


# ---------------------------------------------------------------------------------------------------- hub

LOAD = """
import json
from huggingface_hub import constants
from gptq_awq.errors import UserError
from gptq_awq.models.load import HubModel, hub_reachable
for constants.HF_HUB_OFFLINE in (False, True):
    hub_reachable.cache_clear()
    for name in ("org/tiny", "org/pickled", "org/none"):
        try:
            loaded = HubModel(id=name).load("float32", "cpu")
            print(json.dumps([loaded.name, loaded.source, loaded.sha256]))
        except UserError as error:
            print(json.dumps(str(error)))
"""


def test_a_hub_model_loads_and_loads_again_without_the_hub(folder, tmp_path):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    torch.save(llama().state_dict(), tmp_path / "weights.bin")
    pickled = files | {"pytorch_model.bin": (tmp_path / "weights.bin").read_bytes(), "onnx/model.onnx": b"x"}
    pickled.pop("model.safetensors")
    with fake_hub({"org/tiny": files, "org/pickled": pickled}) as endpoint:
        printed = run_against(endpoint, LOAD, tmp_path).splitlines()
    tiny, pickle, missing, *offline = map(json.loads, printed)
    assert tiny == ["tiny", f"hub org/tiny@{COMMIT}", folder_sha256(folder)]
    assert pickle[:2] == ["pickled", f"hub org/pickled@{COMMIT}"]
    assert re.match("model.id=org/none: .*Not Found", missing)
    assert offline[:2] == [tiny, pickle]
    assert re.match("model.id=org/none: .*does not answer", offline[2])


def test_without_the_hub_the_offline_choices_are_named(monkeypatch):
    monkeypatch.setattr(load, "hub_reachable", lambda: False)
    message = r"model\.id=org/none.*does not answer.*model=smollm2-135m or model=local model\.path=DIR"
    raises(message, HubModel(id="org/none"))


def test_hub_ids_that_cannot_be_are_named():
    raises(r"model\.id is not set", HubModel())
    raises(r"model\.id=a/b/c", HubModel(id="a/b/c"))
