"""bitsandbytes checkpoints: exactness, refusals; bitsandbytes and transformers themselves where they are installed."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.quantized_weights import assert_decodes, assert_same, rounded_source
from helpers.tiny_models import CONFIGS, tiny_model, tiny_tokens
from safetensors.torch import save_file

import gptq_awq.export.bnb as bnb_format
from gptq_awq.errors import UserError
from gptq_awq.export.base import Format, LinearSpec
from gptq_awq.export.bnb import BLOCKS, BnbFormat, pack
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.table import FP4, NF4, TableGrid, dynamic_levels
from gptq_awq.solvers.rtn import RTN

LLAMA = SimpleNamespace(model_type="llama")
INT8 = IntGrid(8, -1, sym=True, scale_dtype="float16")
TABLES = [TableGrid(t, size, double_quant=dq) for t in ("nf4", "fp4") for dq in (False, True) for size in (32, 64, 256)]
GRIDS = [*TABLES, INT8, IntGrid(8, -1, sym=True, scale_dtype="bfloat16")]
SMALL = [TableGrid("nf4", 32), TableGrid("fp4", 32, double_quant=True), INT8]


def rounded(grid, rows=48, columns=768):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.02
    weight[0] = 0
    weight[1] = 1e-6 * weight[1].abs()
    weight[2, 3] = 5.0
    return RTN().solve(weight, None, grid).quantized


@pytest.fixture(params=["own reader", "bitsandbytes"])
def reader(request, monkeypatch):
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bnb_format, "_has_bnb", lambda: request.param == "bitsandbytes")


def test_a_format_is_what_exports_expect():
    assert isinstance(BnbFormat(), Format)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packing_then_independent_unpacking_gives_codes_and_weights_bit_for_bit(grid, reader, tmp_path):
    weight = rounded(grid)
    save_file({f"lin.{part}": tensor for part, tensor in pack(weight).items()}, tmp_path / "model.safetensors")
    (decoded,) = BnbFormat().decode(tmp_path)
    assert decoded.name == "lin"
    assert_same(decoded, weight)


def test_the_first_of_two_codes_has_the_high_bits():
    weight = rounded(TableGrid("nf4", 32))
    octets = pack(weight)["weight"]
    assert octets.shape == (48 * 768 // 2, 1)
    assert octets.dtype == torch.uint8
    assert [divmod(octet, 16) for octet in octets[:50, 0].tolist()] == list(
        zip(weight.codes[0, :100:2].tolist(), weight.codes[0, 1:100:2].tolist(), strict=True)
    )


def test_int8_is_codes_less_128_and_127_times_the_scale():
    weight = rounded(INT8)
    tensors = pack(weight)
    assert tensors["weight"].dtype == torch.int8
    assert torch.equal(tensors["weight"].int() + 128, weight.codes.int())
    assert torch.equal(tensors["SCB"].double(), weight.scales[:, 0].double() * 127)


@pytest.mark.parametrize("grid", SMALL, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-post-norm"])
def test_a_folder_decodes_to_what_was_in_memory(name, grid, reader, tmp_path):
    assert_decodes(BnbFormat(), rounded_source(tiny_model(name), grid), tmp_path)


def test_the_config_names_what_stays_as_it_is(tmp_path):
    BnbFormat().write(rounded_source(tiny_model("opt-post-norm"), TableGrid("nf4", 32, double_quant=True)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert (config["load_in_4bit"], config["load_in_8bit"]) == (True, False)
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert config["bnb_4bit_compute_dtype"] == "float16"
    assert sorted(config["llm_int8_skip_modules"]) == [
        "lm_head",
        "model.decoder.project_in",
        "model.decoder.project_out",
    ]


@pytest.mark.parametrize(
    ("grid", "columns", "hint"),
    [
        (TableGrid("nf4", 64), 288, "group_size=32"),
        (TableGrid("nf4", 96), 288, "group_size=32"),
        (TableGrid("nf4", 16), 64, "group_size=32 or 64"),
        (TableGrid("fp4", -1), 64, "group_size=32 or 64"),
        (TableGrid("nf4", 64), 72, "bits=8 group_size=-1"),
        (TableGrid("iq4_nl", 32), 64, "grid=nf4"),
        (AffineGrid(4, 32), 64, "grid=nf4"),
        (IntGrid(4, 64, sym=True), 64, "grid=nf4"),
        (IntGrid(8, -1, scale_dtype="float16"), 64, "sym=true"),
        (IntGrid(8, -1, sym=True), 64, "scale_dtype=float16"),
    ],
)
def test_what_does_not_fit_is_refused_and_what_would_is_named(grid, columns, hint):
    with pytest.raises(UserError, match=hint):
        BnbFormat().check([LinearSpec("layer", 64, columns, grid)], LLAMA)


def test_mixes_scattered_groups_and_unknown_dtypes_are_refused():
    nf4, fp4 = LinearSpec("a", 64, 64, TableGrid("nf4", 64)), LinearSpec("b", 64, 64, TableGrid("fp4", 64))
    BnbFormat().check([nf4], LLAMA)
    with pytest.raises(UserError, match="fp4 and nf4"):
        BnbFormat().check([nf4, fp4], LLAMA)
    with pytest.raises(UserError, match="static_groups=true"):
        BnbFormat().check([LinearSpec("a", 64, 64, TableGrid("nf4", 64), natural_order=False)], LLAMA)
    with pytest.raises(UserError, match=r"BnbFormat\.dtype=int8"):
        BnbFormat("int8")
    with pytest.raises(UserError, match=r"BnbFormat\.compute_dtype=tf32"):
        BnbFormat(compute_dtype="tf32")


# bitsandbytes itself


@pytest.fixture
def functional():
    return pytest.importorskip("bitsandbytes.functional")


def test_tables_are_those_of_bitsandbytes_bit_for_bit(functional):
    assert torch.equal(torch.tensor(NF4), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(torch.tensor(FP4), functional.get_4bit_type("fp4", device="cpu"))
    assert torch.equal(dynamic_levels(), functional.create_dynamic_map())


@pytest.mark.parametrize("size", BLOCKS)
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_plain_rounding_is_that_of_bitsandbytes(table, size, functional):
    weight = torch.randn(8, 4096, generator=torch.Generator().manual_seed(1))
    ours = RTN().solve(weight, None, TableGrid(table, size)).quantized
    octets, state = functional.quantize_4bit(weight, blocksize=size, quant_type=table)
    assert torch.equal(ours.scales.flatten(), state.absmax)
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(octets, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_tensors_are_named_and_shaped_as_bitsandbytes_saves_them(double_quant, functional):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    octets, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant, quant_storage=torch.uint8
    )
    theirs = {"weight": octets} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    ours = pack(RTN().solve(weight, None, TableGrid("nf4", 64, double_quant=double_quant)).quantized, "float32")
    assert {key: (t.shape, t.dtype) for key, t in ours.items() if "quant_state" not in key} == {
        key: (t.shape, t.dtype) for key, t in theirs.items() if "quant_state" not in key
    }
    key = "weight.quant_state.bitsandbytes__nf4"
    ours_state, theirs_state = (json.loads(bytes(tensors[key].tolist())) for tensors in (ours, theirs))
    assert ours_state == theirs_state


@pytest.mark.parametrize(("scale_dtype", "units"), [("bfloat16", 0), ("float16", 1)])
def test_bitsandbytes_own_int8_product_is_off_by_a_unit_in_the_last_place_at_most(scale_dtype, units, functional):
    weight = rounded(IntGrid(8, -1, sym=True, scale_dtype=scale_dtype), 256)
    tensors, ours = pack(weight), weight.dequantize()
    theirs = functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    unit = torch.nextafter(ours.abs(), torch.tensor(torch.inf)) - ours.abs()
    assert ((theirs - ours).abs() <= units * unit).all()


def load(folder, dtype=torch.float32):
    """As transformers loads it, but computing with the weights in the inputs' dtype on every machine."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for module in model.eval().modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else scales become bfloat16 where the CPU multiplies it
        if type(module).__name__ == "Linear8bitLt":
            module.train()  # else inputs are rounded to 8 bits
    return model


@pytest.mark.parametrize("grid", SMALL, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_logits_of_the_model_in_memory(name, grid, tmp_path):
    pytest.importorskip("bitsandbytes")
    source = rounded_source(tiny_model(name), grid)
    BnbFormat("float32").write(source, tmp_path)
    tokens = tiny_tokens(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(tokens).logits, source.model(tokens).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", SMALL, ids=str)
def test_transformers_agrees_on_a_trained_model(grid, stories15m, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32).eval().requires_grad_(False)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    tokens = AutoTokenizer.from_pretrained(stories15m)(text, return_tensors="pt")["input_ids"]
    source = rounded_source(model, grid)
    BnbFormat().write(source, tmp_path)
    with torch.no_grad():
        ours, theirs = (m(tokens).logits.double().log_softmax(-1) for m in (model, load(tmp_path)))
    assert (ours.exp() * (ours - theirs)).sum(-1).max() < 1e-4
