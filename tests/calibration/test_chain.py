"""The chain check: a model whose blocks can't be calibrated one by one is refused, by the first block that differs."""

import copy
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import CONFIGS, MIXTURES, tiny_model, tiny_tokens
from torch import nn

from gptq_awq import quantize_model
from gptq_awq.api import load_method, observe_moments
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.calibration.chain import check_chain
from gptq_awq.calibration.moments import MomentsSum
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.models.unfuse import unfuse
from gptq_awq.quantization.quantize import quantize
from gptq_awq.storage.journal import Journal

WIDTH = 16


class Block(nn.Module):
    """A residual block of two linears, with one fault or none."""

    def __init__(self, index, fault, memory):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.index, self.fault, self.memory = index, fault, memory

    def forward(self, hidden_states, extra=None):
        x = hidden_states if extra is None or self.fault == "no effect so far" else hidden_states + extra
        out = hidden_states + self.down(torch.relu(self.up(torch.nn.functional.layer_norm(x, (WIDTH,)))))
        if self.fault == "memory":
            out = out + self.memory.get("before", 0)
            self.memory["before"] = out.tanh()
        return hidden_states.copy_(out) if self.fault == "in place" else out


class Model(nn.Module):
    """A language model of three blocks that hands hidden states on in an ordinary way, or with one fault."""

    def __init__(self, fault=None):
        super().__init__()
        torch.manual_seed(0)
        self.fault, self.memory = fault, {}
        self.embed = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block(i, fault, self.memory) for i in range(3))
        self.head = nn.Linear(WIDTH, 64, bias=False)
        self.requires_grad_(False)
        if fault == "one token, beside a massive one":
            self.embed.weight[1] *= 1e6

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        self.memory.clear()
        x = self.embed(input_ids)
        x = x.transpose(0, 1) if self.fault == "windows second" else x
        x = torch.cat([x[:, :4], x], 1) if self.fault == "tokens of its own" else x
        blocks = list(self.blocks)
        blocks = {"reversed": blocks[::-1], "twice": blocks * 2, "left out": blocks[:2]}.get(self.fault, blocks)
        before = None
        for block in blocks:
            if self.fault == "between" and before is not None:
                x = 2 * x
            if self.fault == "one token, beside a massive one" and before is not None:
                x = x + (torch.arange(x.shape[1]) == 5)[:, None]
            extra = before if self.fault in ("arguments", "keywords", "no effect so far") else None
            before = block(x, extra) if self.fault == "arguments" else block(x, extra=extra)
            x = before
        return SimpleNamespace(logits=self.head(x))


FOLLOWED = {
    "between": "block 1 gets other hidden states than the block before returns",
    "one token, beside a massive one": "block 1 gets other hidden states than the block before returns",
    "arguments": "block 1 returns something else by itself",
    "keywords": "block 1 returns something else by itself",
    "no effect so far": "block 1 gets another argument extra than in the model's forward",
    "windows second": r"block 0 gets hidden states of shape \(8, 2, 16\) for \(2, 8\) ids",
    "twice": "calls its 3 blocks 6 times, block 0 as number 3",
    "left out": "calls 2 of its 3 blocks; all of them are needed",
}
"""What blocks, run one by one, get wrong, and blocks within the model's own forward don't."""
REFUSED = {
    "memory": r"block \d returns something else when it is called again",
    "in place": "block 0 overwrites its input",
    "reversed": "in another order than they are listed, block",
}


def tokens(padded=False):
    ids = tiny_tokens()
    ids[:, 0] = 1
    mask = torch.arange(ids.shape[1]).expand(ids.shape) < 6 if padded else None
    return make_token_set("calibration", ids, mask, "memory")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*CONFIGS, *MIXTURES])
def test_blocks_that_are_the_model_pass(name, padded):
    model = tiny_model(name)
    unfuse(model)
    check_chain(model, tokens(padded), calibrates=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_puts_tokens_of_its_own_first_passes_where_nothing_is_padded():
    model = Model("tokens of its own")
    check_chain(model, tokens(), calibrates=True)
    with pytest.raises(UserError, match=r"block 0 gets hidden states of shape \(2, 12, 16\) for \(2, 8\) ids"):
        check_chain(model, tokens(padded=True), calibrates=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(dtype):
    check_chain(tiny_model("llama").to(dtype), tokens(), calibrates=True)
    check_chain(Model().to(dtype), tokens(), calibrates=True)


@pytest.mark.parametrize("fault", REFUSED)
def test_blocks_that_change_or_remember_are_refused_before_anything_is_rounded(fault):
    model = Model(fault)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=REFUSED[fault]) as refused:
        quantize_model(model, tokens(), "gptq", grid=None, bits=4, group_size=16)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def inputs_in_the_own_forward(model, data, site):
    """Rows that a linear is called with, in all its calls in a forward of the whole model."""
    seen = []
    hook = model.get_submodule(site).register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    model(data.ids)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


@pytest.mark.parametrize("fault", FOLLOWED)
def test_blocks_are_run_within_the_models_own_forward_where_alone_they_would_get_something_else(fault, caplog):
    caplog.set_level(logging.INFO, "gptq_awq")
    data, model = tokens(), Model(fault)
    sites = list(observe_moments(model, data))
    assert len(sites) == (4 if fault == "left out" else 6)
    for site in sites:
        x = inputs_in_the_own_forward(model, data, site.linears[0])
        torch.testing.assert_close(
            site.moments.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5 * float(x.square().max())
        )
    assert any(re.search(FOLLOWED[fault], r.message) and "own forward" in r.message for r in caplog.records)


@pytest.mark.parametrize("method", ["gptq", "qronos"])
@pytest.mark.parametrize("fault", [None, "between", "keywords"])
def test_sites_are_calibrated_on_the_quantized_models_own_forward(fault, method, monkeypatch):
    """The last site of the last block is solved on what a forward of the whole model shows there."""
    model, data, given = Model(fault), tokens(), []
    full = copy.deepcopy(model)
    solve = MomentsSum.finish
    monkeypatch.setattr(MomentsSum, "finish", lambda self, *args: given.append(solve(self, *args)) or given[-1])
    quantize_model(model, data, method, bits=4, group_size=16, settings=Settings(compute_dtype="float32"))
    x, y = (inputs_in_the_own_forward(m, data, "blocks.2.up") for m in (model, full))
    seen = given[-2]
    torch.testing.assert_close(seen.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    if method == "qronos":
        torch.testing.assert_close(seen.cross, x.T @ y / len(x), rtol=1e-4, atol=1e-5)


def test_what_breaks_while_blocks_are_probed_is_one_line(monkeypatch):
    model = Model()

    def forward(self, *_args, **_kwargs):
        return {"hidden": torch.zeros(2, 16, WIDTH)}

    monkeypatch.setattr(Block, "forward", forward)
    with pytest.raises(UserError, match=r"blocks of Model can't be run one by one \(\w+Error: .*rtn needs no data"):
        check_chain(model, tokens(), calibrates=True)


@pytest.mark.parametrize("fault", REFUSED)
def test_rounding_to_nearest_needs_no_chain(fault, caplog):
    caplog.set_level(logging.INFO, "gptq_awq")
    result = quantize_model(Model(fault), None, "rtn", bits=4, group_size=16)
    assert len(result.ledger) == 6
    said = [r for r in caplog.records if "rounds them all the same" in r.message]
    assert len(said) == 1
    not_on_the_way = fault == "reversed"
    assert (said[0].levelname == "WARNING") == not_on_the_way


@pytest.mark.parametrize("method", ["gptq", "qronos"])
@pytest.mark.parametrize("fault", ["between", "keywords"])
def test_an_interrupted_walk_goes_on_with_the_same_codes(fault, method, tmp_path):
    (preset, grid), small = load_method(method, 4, 16), Settings(compute_dtype="float32")

    def steps(journal):
        return quantize(Model(fault), tokens(), preset, grid, small, progress=journal)

    whole = {name: w.sha256() for block in steps(None) for name, w in block.weights.items()}
    interrupted = steps(Journal(tmp_path / "progress", "walk"))
    next(interrupted)
    interrupted.close()
    rest = steps(Journal(tmp_path / "progress", "walk"))
    assert {name: w.sha256() for block in rest for name, w in block.weights.items()} == whole
