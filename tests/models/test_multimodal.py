"""Models that also see: their language model is quantized, and nothing else of them changes or is lost."""

import json

import pytest
import torch
import transformers as T  # noqa: N812
from helpers.quantization_runs import SMALL, tokens
from helpers.tiny_models import GROUPED, save_tiny_folder, tiny_tokens

from gptq_awq import quantize_model
from gptq_awq.api import load_method, observe_moments
from gptq_awq.errors import UserError
from gptq_awq.evaluation.head import Head
from gptq_awq.models import offloaded_model as offloaded
from gptq_awq.models.blocks import find_blocks, heads_of
from gptq_awq.models.load import load_folder
from gptq_awq.models.topology import relative_error
from gptq_awq.quantization.quantize import quantize
from gptq_awq.storage.journal import Journal

# Larger than the language model, to tempt whoever looks for the largest list of modules.
TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 4}
PATCHES = TOWER | {"image_size": 28, "patch_size": 14}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN_IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
GEMMA = T.Gemma3TextConfig(
    **GROUPED, head_dim=16, layer_types=["sliding_attention", "full_attention"], sliding_window=8
)
CONFIGS = {
    "gemma3": lambda: T.Gemma3Config(
        text_config=GEMMA.to_dict(),
        vision_config=T.SiglipVisionConfig(**PATCHES).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=60,
    ),
    "llava": lambda: T.LlavaConfig(
        text_config=T.LlamaConfig(**GROUPED).to_dict(),
        vision_config=T.CLIPVisionConfig(**PATCHES).to_dict(),
        image_token_index=60,
    ),
    "qwen2-vl": lambda: T.Qwen2VLConfig(
        text_config=GROUPED | {"rope_parameters": MROPE},
        vision_config={"depth": 4, "embed_dim": 128, "num_heads": 2, "hidden_size": 64, "patch_size": 14},
        **QWEN_IDS,
    ),
    "idefics3": lambda: T.Idefics3Config(
        text_config=T.LlamaConfig(**GROUPED).to_dict(), vision_config=PATCHES, image_token_id=60, scale_factor=2
    ),
}


def wrapper(name):
    """A random model that also sees."""
    torch.manual_seed(0)
    return T.AutoModelForImageTextToText.from_config(CONFIGS[name]()).eval().requires_grad_(False)


def folder_of(name, folder):
    """A random model that also sees, with a tokenizer and the settings of its image processor."""
    save_tiny_folder(folder)
    (folder / "model.safetensors").unlink()
    wrapper(name).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_the_blocks_are_the_language_models_though_the_tower_is_larger(name):
    model = wrapper(name)
    prefix, blocks = find_blocks(model)
    assert blocks is model.get_decoder().layers
    assert len(blocks) == 2
    assert "visual" not in prefix
    assert "vision" not in prefix
    assert heads_of(model) == 4
    assert Head.of(model).vocab == 64


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("name", CONFIGS)
def test_8_bits_change_text_little_and_what_sees_not_at_all(name, method):
    model = wrapper(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(tokens().ids % 60).logits
    done = quantize_model(model, tiny_tokens(6) % 60, method, bits=8, group_size=16, settings=SMALL)
    assert len(done.weights) == 14
    assert relative_error(model(tokens().ids % 60).logits, expected) < 0.02
    prefix, _ = find_blocks(model)
    for key, value in model.state_dict().items():
        assert key.startswith(prefix) or torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_are_those_that_hooks_see_in_the_whole_model(name):
    model, ids = wrapper(name), tiny_tokens(4) % 60
    for site in observe_moments(model, ids):
        seen = []
        hook = model.get_submodule(site.linears[0]).register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        model(ids)
        hook.remove()
        torch.testing.assert_close(site.moments.hessian, seen[0].T @ seen[0] / len(seen[0]), rtol=1e-4, atol=1e-5)


def test_a_rotation_of_the_residual_stream_is_refused_as_images_enter_it_too():
    with pytest.raises(UserError, match="LlavaForConditionalGeneration sees enters its residual stream"):
        quantize_model(wrapper("llava"), tokens(), "quarot")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_loaded_whole(name, tmp_path):
    model, _ = load_folder(folder_of(name, tmp_path / name), "float32", "cpu", "model.path=here")
    assert type(model) is type(wrapper(name))
    for key, value in wrapper(name).state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_streamed_one_gets_the_codes_and_logits_of_one_in_memory(name, tmp_path, monkeypatch):
    monkeypatch.setattr(offloaded, "SMALL", 100)
    whole, ids = wrapper(name), tiny_tokens() % 60
    model, _ = load_folder(folder_of(name, tmp_path / name), "float32", "cpu", "model.path=here", room=0)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    (method, grid), journal = load_method("gptq", group_size=16), Journal(tmp_path / "j", "key")
    ours, theirs = (
        {key: weight.sha256() for block in steps for key, weight in block.weights.items()}
        for steps in (
            quantize(model, tokens(), method, grid, SMALL, progress=journal),
            quantize(whole, tokens(), method, grid, SMALL),
        )
    )
    assert ours == theirs
    assert torch.equal(model(ids).logits, whole(ids).logits)
    large = {name: p for name, p in model.named_parameters() if p.numel() > 1000}
    assert any("vis" in name for name in large)
    assert all(p.untyped_storage().nbytes() < p.numel() for p in large.values())


@pytest.mark.parametrize(("form", "stream"), [("hf", "true"), ("compressed_tensors", "false")])
def test_a_run_scores_text_and_its_checkpoint_is_the_whole_model(form, stream, tmp_path, cli, tiny):
    folder = folder_of("llava", tmp_path / "llava")
    own = [argument for argument in tiny if not argument.startswith(("model.path", "group_size"))]
    own += [f"model.path={folder}", "group_size=32", "method=gptq", "head=solve", f"stream={stream}"]
    done = cli(*own, f"export.formats=[{form}]", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["tiny/kl"] > 0
    assert "its language model alone is quantized" in (tmp_path / "out" / "run.log").read_text()
    checkpoint = tmp_path / "out" / "checkpoints" / form
    assert (checkpoint / "preprocessor_config.json").is_file()
    read, info = T.AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    plain = wrapper("llava").to(read.dtype).state_dict()
    tower = {key: value for key, value in read.state_dict().items() if "vision_tower" in key or "projector" in key}
    assert tower
    assert all(torch.equal(value, plain[key]) for key, value in tower.items())


def test_other_formats_refuse_before_calibration(tmp_path, cli, tiny):
    folder = folder_of("llava", tmp_path / "llava")
    own = [argument for argument in tiny if not argument.startswith("model.path")] + [f"model.path={folder}"]
    for form in ("gptq", "awq"):  # GGUF and MLX take the text part
        done = cli(*own, "method=gptq", f"export.formats=[{form}]", f"out={tmp_path / form}")
        assert done.returncode != 0
        assert f"export.formats={form}: its readers want a language model" in done.stderr
        assert not (tmp_path / form / "results.json").exists()
