"""Laws of the lean import of transformers: less is imported, nothing is lost, and no version can make it fail."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "scipy.optimize")
ANSWERED = """
import torch
from torch.fx.experimental import symbolic_shapes
from gptq_awq.runtime.lean_import import ANSWERS
asked = {"sym_eq": [((2, 3), torch.Size([2, 3])), ((2,), (2, 1)), ((2, 3), (2, 4)), (2, 2), (2, 3)],
         "is_nested_int": [(3,)], "sym_and": [(True, False), (True, True), (True,)],
         "sym_or": [(False, False), (False, True), (True,)]}
numbers = {"guarding_hint_or_throw": [(3,), (True,)], "has_guarding_hint": [(3,), (True,)]}
for name, answer in ANSWERS.items():
    for args in asked.get(name) or numbers.get(name) or [(True,), (False,)]:
        assert answer(*args) == getattr(symbolic_shapes, name)(*args), (name, args)
"""
REPORT = """
import json, sys
%s
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
with torch.no_grad():
    logits = model(torch.arange(8)[None]).logits.flatten().tolist()
with torch.device("meta"):
    LlamaForCausalLM(LlamaConfig(**sizes))
told = {"modules": [name for name in HEAVY if type(sys.modules.get(name)) is type(sys)], "logits": logits}
from torch._dynamo.utils import counters
import scipy.optimize, torch._dynamo, torch.distributed, transformers.models
from torch.fx.experimental import symbolic_shapes
told["symbols"] = [str(symbolic_shapes.sympy.Symbol("n") + 1), type(symbolic_shapes.ShapeEnv()).__name__]
told["models"] = sorted(dir(transformers.models))
told["same"] = counters is torch._dynamo.utils.counters
told["real"] = [torch._dynamo.__file__, scipy.optimize.linear_sum_assignment([[0.0]])[0].tolist(),
                torch.distributed.is_available()]
from transformers.loss.loss_for_object_detection import linear_sum_assignment
told["compiled"] = torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)).tolist()
told["matched"] = linear_sum_assignment([[2.0, 1.0], [1.0, 2.0]])[1].tolist()
print(json.dumps(told))
"""
LEAN = "from gptq_awq.runtime.lean_import import import_transformers\nimport_transformers()"
BROKEN = """
from gptq_awq.runtime import lean_import
lean_import.WANTED += ("transformers.without_such_a_module",)
lean_import.import_transformers()
"""


def told(first: str) -> dict:
    """What a new process tells that begins with the given lines."""
    program = f"HEAVY = {HEAVY!r}\n" + REPORT % first
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain():
    return told("")


def test_lean_import_leaves_out_the_compiler_and_computes_the_same(plain):
    lean = told(LEAN)
    assert set(plain["modules"]) == set(HEAVY)
    assert lean["modules"] == []
    assert {k: v for k, v in lean.items() if k != "modules"} == {k: v for k, v in plain.items() if k != "modules"}


def test_what_cannot_be_imported_leanly_is_imported_as_always(plain):
    assert told(BROKEN) == plain


def test_what_is_answered_about_numbers_is_what_torch_answers():
    subprocess.run([sys.executable, "-c", ANSWERED], check=True)
