"""Laws of rounded activations and key-value caches: where they enter, what they compute, that nothing else changes."""

import json
from typing import Any

import pytest
import torch
from helpers.tiny_models import CONFIGS, tiny_model, tiny_tokens

from gptq_awq.errors import UserError
from gptq_awq.grids.dynamic import DynamicFP8, DynamicGrid, DynamicInt, Unrounded
from gptq_awq.models.activations import check_activations, quantized_activations
from gptq_awq.models.blocks import find_blocks, hooks
from gptq_awq.models.linear import is_linear

NONE: DynamicGrid = Unrounded()
INT8, INT4 = DynamicInt(8), DynamicInt(4)
KV8, KV4 = DynamicInt(8, sym=False), DynamicInt(4, sym=False)
FAMILIES = sorted(CONFIGS)


@torch.no_grad()
def logits(model, tokens, act: DynamicGrid = NONE, kv: DynamicGrid = NONE):
    with quantized_activations(model, act, kv):
        return model(tokens, use_cache=False).logits


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def draws(seed=0):
    """Rows of various sizes, one all zero, one all positive."""
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-4, 4, 24)[:, None]
    x[3], x[5] = 0.0, x[5].abs() + 1.0
    return x


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_symmetric_rows_are_those_of_torch(bits, clip):
    x, top = draws(), 2 ** (bits - 1) - 1
    scale = (clip / top * x.abs().amax(1)).clamp(min=1e-30)
    zeros = torch.zeros(len(x), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zeros, 0, -top - 1, top)
    torch.testing.assert_close(DynamicInt(bits, clip=clip).rounded(x), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_rows_are_those_of_torch(bits):
    x, top = draws(), 2**bits - 1
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = ((high - low) / top).clamp(min=1e-30)
    expected = torch.fake_quantize_per_channel_affine(x, scale, (-low / scale).round().int(), 0, 0, top)
    torch.testing.assert_close(DynamicInt(bits, sym=False).rounded(x), expected, rtol=1e-6, atol=0)


def test_a_row_of_fp8_is_a_multiple_of_e4m3_values():
    x = draws()
    scale = x.abs().amax(1, keepdim=True) / 448
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    found = torch.where(scale > 0, DynamicFP8().rounded(x) / scale, 0)
    nearest = (x / scale.clamp(min=1e-30))[..., None].sub(every).abs().amin(-1)
    assert (found[..., None] - every).abs().amin(-1).max() < 1e-3
    torch.testing.assert_close((x / scale.clamp(min=1e-30) - found).abs(), nearest, atol=1e-3, rtol=0)


@pytest.mark.parametrize("grid", [INT8, KV4, DynamicFP8()], ids=lambda grid: grid.label)
def test_groups_are_rows_of_their_own(grid):
    x = draws()
    grouped = type(grid)(**{**vars(grid), "group_size": 8}).rounded(x)
    expected = torch.cat([grid.rounded(part) for part in x.split(8, 1)], 1)
    assert torch.equal(grouped, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_activations_change_nothing(family):
    model, tokens = tiny_model(family), tiny_tokens()
    found = logits(model, tokens, DynamicInt(16), DynamicInt(16, sym=False))
    assert error(found, logits(model, tokens)) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_cost_less_than_four(family):
    model, tokens = tiny_model(family), tiny_tokens()
    plain = logits(model, tokens)
    for eight, four in (((INT8, NONE), (INT4, NONE)), ((NONE, KV8), (NONE, KV4))):
        assert 0 < error(logits(model, tokens, *eight), plain) < error(logits(model, tokens, *four), plain)


def test_afterwards_the_model_is_as_it_was():
    model, tokens = tiny_model("llama"), tiny_tokens()
    plain = logits(model, tokens)
    logits(model, tokens, INT4, KV4)
    assert torch.equal(logits(model, tokens), plain)
    with pytest.raises(UserError):
        logits(model, tokens, DynamicInt(8, group_size=48))
    assert torch.equal(logits(model, tokens), plain)


def test_every_linear_of_the_blocks_reads_rounded_inputs_and_the_head_does_not():
    """Against a forward whose linears round for themselves."""
    model, tokens = tiny_model("gpt2"), tiny_tokens()
    _, blocks = find_blocks(model)
    found = logits(model, tokens, INT4)
    naive = [
        m.register_forward_pre_hook(lambda _, args: (INT4.rounded(args[0]), *args[1:]))
        for m in blocks.modules()
        if is_linear(m)
    ]
    with hooks(naive):
        expected = logits(model, tokens)
    assert torch.equal(found, expected)


def test_a_site_is_quantized_once(monkeypatch):
    rounds = []
    rounded = DynamicInt.rounded
    monkeypatch.setattr(DynamicInt, "rounded", lambda self, x: rounds.append(x.shape) or rounded(self, x))
    logits(tiny_model("llama"), tiny_tokens(), INT8)
    assert len(rounds) == 2 * 4  # blocks · (qkv, o, gate/up, down)


def test_kv_grid_sees_keys_after_rotation(monkeypatch):
    """And what it sees is what a cache keeps: grouped heads, not yet repeated."""
    model: Any = tiny_model("llama")
    tokens = tiny_tokens()
    kept = model(tokens, use_cache=True).past_key_values
    seen = []
    rounded = DynamicInt.rounded
    monkeypatch.setattr(DynamicInt, "rounded", lambda self, x: seen.append(x) or rounded(self, x))
    logits(model, tokens, kv=DynamicInt(16, sym=False))
    torch.testing.assert_close(seen[0], kept.layers[0].keys)
    torch.testing.assert_close(seen[1], kept.layers[0].values)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_nothing(family):
    """Token by token with a cache, or all at once without: every row is rounded alone, so both read the same."""
    model, tokens = tiny_model(family), tiny_tokens(rows=2, length=12)
    whole, cache, steps = logits(model, tokens, INT8, KV4), None, []
    with quantized_activations(model, INT8, KV4), torch.no_grad():
        for token in tokens.split(1, 1):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=0.02 * float(whole.abs().max()), rtol=0)


def test_greedy_decoding_is_the_same_with_and_without_a_cache():
    model: Any = tiny_model("llama")
    tokens = tiny_tokens(rows=2, length=8)
    with quantized_activations(model, INT8, KV4):
        with_cache, without = (
            model.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=x) for x in (True, False)
        )
    assert torch.equal(with_cache, without)


def test_lower_precision_of_scoring_sees_the_rounded_cache():
    from gptq_awq.evaluation.precision import lowered

    model, tokens = tiny_model("llama"), tiny_tokens()
    with lowered(torch.bfloat16):
        plain, rounded = logits(model, tokens), logits(model, tokens, kv=DynamicInt(2, sym=False))
    assert error(rounded, plain) > 0.02


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"bits": 1}, r"DynamicInt\.bits=1"),
        ({"clip": 0.0}, r"DynamicInt\.clip=0"),
        ({"group_size": 0}, r"DynamicInt\.group_size=0"),
    ],
)
def test_what_a_user_can_get_wrong_names_its_option(options, line):
    with pytest.raises(UserError, match=line):
        DynamicInt(**options)


def test_what_does_not_fit_the_model_is_found_before_it_is_scored():
    model: Any = tiny_model("llama")
    with pytest.raises(UserError, match=r"act.group_size=48: does not divide 64 channels"):
        check_activations(model, DynamicInt(8, group_size=48), NONE)
    with pytest.raises(UserError, match=r"kv.group_size=48: does not divide 16 channels"):
        check_activations(model, NONE, DynamicInt(8, group_size=48))
    for block in model.model.layers:  # a block that attends without a cache, as a recurrent one would
        attend = block.self_attn.forward
        block.self_attn.forward = lambda *args, attend=attend, **kw: attend(*args, **kw | {"past_key_values": None})
    with pytest.raises(UserError, match=r"kv=int4 asym: a LlamaDecoderLayer keeps no keys"):
        check_activations(model, NONE, KV4)


def test_a_run_with_rounded_activations_is_another_run(cli, tiny, tmp_path):
    """Neither taken from a run without, nor scored against a rounded baseline; the row says what was rounded."""
    rows = {}
    for name, options in {
        "plain": (),
        "a8": ("act=int8",),
        "kv4": ("kv=int4",),
        "a8g": ("act=int8", "act.clip=0.9"),
    }.items():
        done = cli("method=fp", *tiny, *options, f"out={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert "done already" not in done.stderr
        rows[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert len({row["manifest"]["run"] for row in rows.values()}) == 4
    labels = {name: (row["act"], row["kv"]) for name, row in rows.items()}
    assert labels == {
        "plain": (None, None),
        "a8": ("int8", None),
        "kv4": (None, "int4 asym"),
        "a8g": ("int8 clip 0.9", None),
    }
    assert rows["plain"]["metrics"]["tiny/kl"] == 0
    for name in ("a8", "kv4", "a8g"):
        metrics = rows[name]["metrics"]
        assert metrics["tiny/kl"] > 0
        assert metrics["tiny/ppl@32/baseline"] == rows["plain"]["metrics"]["tiny/ppl@32"]
