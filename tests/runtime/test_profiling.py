"""Where the time goes: marks, what is read off them, and a run with profile=true."""

import ast
import gzip
import json
import random
import runpy

import pytest
import torch
from helpers.paths import CONFIGS, ROOT
from helpers.quantization_runs import GRID, SMALL, tokens
from helpers.tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from gptq_awq.api import load_method
from gptq_awq.errors import UserError
from gptq_awq.experiment import run as experiment
from gptq_awq.quantization.quantize import quantize
from gptq_awq.results import Result, read_ledger
from gptq_awq.runtime.profiling import PHASES, PREFIX, Event, Recorder, Span, by_phase, page, phase, spans

CPU = torch.device("cpu")
ROOFLINE = runpy.run_path(str(ROOT / "benchmarks" / "roofline.py"))
Costs = ROOFLINE["Costs"]


def recorded(method, name="llama"):
    recorder, model = Recorder(on=True), tiny_model(name)
    with recorder:
        codes = codes_of(quantize(model, tokens(), load_method(method)[0], GRID, SMALL))
    return recorder, model, codes


def codes_of(blocks):
    return [row["codes_sha256"] for block in blocks for row in block.rows]


def random_tree(draw, start, stop, depth, events):
    """Marks that begin and end within start…stop, some inside of others; returns the nanoseconds they cover."""
    at, covered = start, 0
    while depth and stop - at > 20 and draw.random() < 0.8:
        begin = draw.randrange(at, stop - 10)
        end = draw.randrange(begin + 5, stop)
        inner = random_tree(draw, begin + 1, end - 1, depth - 1, events)
        name = draw.choice(list(PHASES))
        events.append((Event(f"{PREFIX}{name} 3 4", begin, end - begin, 1), end - begin - inner))
        covered += end - begin
        at = end + 1
    return covered


# ------------------------------------------------------------------------------------------------ reading marks


def test_own_times_are_those_that_a_tree_was_built_with():
    draw = random.Random(0)
    for _ in range(20):
        events = []
        covered = random_tree(draw, 0, 5000, 4, events)
        draw.shuffle(events)
        expected = sorted((e.start, own) for e, own in events)
        found = spans(e for e, _ in events)
        assert [round(step.own * 1e9) for step in found] == [own for _, own in expected]
        assert round(sum(step.own for step in found) * 1e9) == covered
        assert all(step.size == (3, 4) for step in found)


def test_steps_that_overlap_without_nesting_are_refused():
    events = [Event(f"{PREFIX}forward", 0, 10, 1), Event(f"{PREFIX}moments", 5, 10, 1)]
    with pytest.raises(ValueError, match=r"moments begins inside of .*forward"):
        spans(events)
    assert len(spans([events[0], Event(f"{PREFIX}moments", 5, 10, 2)])) == 2  # other threads are their own


def test_a_phase_inside_of_itself_is_one_call():
    outer = Event(f"{PREFIX}solve", 0, 100, 1)
    inner = Event(f"{PREFIX}solve 8 8", 10, 50, 1)
    (solve, other) = by_phase(spans([outer, inner]), 1.0)
    assert (solve.calls, round(solve.seconds * 1e9)) == (1, 100)
    assert other.seconds == pytest.approx(1 - 100e-9)


# ------------------------------------------------------------------------------------------------ marks in the code


def test_every_mark_in_the_code_is_a_phase_with_a_description():
    used = set()
    for path in (ROOT / "gptq_awq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "phase":
                used |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    assert used == set(PHASES)


@pytest.mark.parametrize("method", ["gptq", "awq", "awq_gptq"])
def test_marks_nest_add_up_to_the_run_and_change_no_code(method):
    recorder, _, codes = recorded(method)
    steps = recorder.spans  # raises where they don't nest
    rows = by_phase(steps, recorder.seconds)
    assert sum(row.seconds for row in rows) == pytest.approx(recorder.seconds)
    assert all(row.seconds >= 0 for row in rows), rows
    assert {"embed", "forward", "moments", "solve", "ledger"} <= {row.name for row in rows}
    assert codes == codes_of(quantize(tiny_model("llama"), tokens(), load_method(method)[0], GRID, SMALL))


@pytest.mark.parametrize(("method", "passes"), [("gptq", 1), ("awq", 1), ("awq_gptq", 2)])
def test_forwards_and_moments_are_counted_once_per_token_block_and_site(method, passes):
    recorder, model, _ = recorded(method)
    steps = recorder.spans
    rows, length = tokens().ids.shape
    forwards = [step.size for step in steps if step.phase == "forward" and step.size]
    assert sum(n * t for n, t in forwards) == passes * len(model.model.layers) * rows * length
    sites = [step.size for step in steps if step.phase == "moments" and step.size]
    for width, per_block in ((64, 3), (160, 1)):
        assert sum(n for n, w in sites if w == width) == passes * per_block * len(model.model.layers) * rows * length


def test_forwards_take_the_operations_that_torch_counts():
    model, (rows, length) = tiny_model("llama"), (2, 16)
    model.set_attn_implementation("eager")
    costs = Costs.of(model, torch.bfloat16)
    counter = FlopCounterMode(display=False)
    with counter:
        model.model(torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    n, width = rows * length, model.config.hidden_size
    beyond_causal = len(model.model.layers) * 2 * n * length * width  # eager attention multiplies what it masks
    rotary = 2 * rows * length * (width // model.config.num_attention_heads // 2)  # angles: positions x frequencies
    block = costs(Span("forward", (rows, length), 1.0))
    counted = block.flops * len(model.model.layers) + beyond_causal
    assert counted == pytest.approx(counter.get_total_flops() - rotary, rel=0.01)
    assert block.rate == "bfloat16"


def test_moments_and_candidates_take_half_of_the_full_products():
    x, delta = torch.randn(50, 64), torch.randn(30, 64)
    costs = Costs.of(tiny_model("llama"), torch.float32)
    with FlopCounterMode(display=False) as counter:
        x.T @ x
    moments = costs(Span("moments", (50, 64), 1.0))
    assert moments.flops == counter.get_total_flops() * (1 + 1 / 64) / 2  # with the diagonal
    with FlopCounterMode(display=False) as counter:
        delta @ (x.T @ x)[:64]
    product = counter.get_total_flops() - 2 * 50 * 64 * 64
    candidate = costs(Span("search", (30, 64), 1.0))
    assert candidate.flops == product * (1 + 2 / 64) / 2  # and the rows' products with it


def test_steps_without_a_size_cost_nothing_known():
    costs = Costs.of(tiny_model("gpt2"), torch.float32)
    assert costs(Span("forward", (), 1.0)) == costs(Span("ledger", (3, 4), 1.0)) == ROOFLINE["Cost"]()


def test_rates_are_positive_and_finite():
    assert 1e6 < ROOFLINE["matmul_rate"](torch.float32, 64, 64, 64, CPU, seconds=0.01) < 1e18
    assert 1e6 < ROOFLINE["copy_rate"](CPU, megabytes=1, seconds=0.01) < 1e18


def test_a_power_law_has_its_exponent():
    scaling = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
    assert scaling["exponent"]([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)


# ------------------------------------------------------------------------------------------------ the recorder


def test_a_recorder_that_is_off_records_nothing():
    with (recorder := Recorder(on=False)), phase("moments", 1, 2):
        pass
    assert (recorder.spans, recorder.seconds) == ([], 0.0)


def test_marks_are_recorded_with_their_size_and_ops_are_not(tmp_path):
    with (recorder := Recorder(on=True)), phase("moments", 3, 2):
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert [(step.phase, step.size) for step in recorder.spans] == [("moments", (3, 2))]
    recorder.write(tmp_path, "run", CPU)
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = [e["name"] for e in trace["traceEvents"] if e["ph"] == "X"]
    assert f"{PREFIX}moments 3 2" in names
    assert not any(name.startswith("aten::") for name in names)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["profile.md", "trace.json.gz"]


def test_a_recording_without_marks_is_fine():
    with (recorder := Recorder(on=True)):
        pass
    assert [row.name for row in recorder.phases] == ["other"]
    assert "| all |" in page(recorder.phases, "run", CPU)


def test_an_error_ends_the_recording():
    with pytest.raises(KeyError), Recorder(on=True):
        raise KeyError
    with Recorder(on=True) as again, phase("load"):  # would fail if the first still recorded
        pass
    assert [step.phase for step in again.spans] == ["load"]


# ------------------------------------------------------------------------------------------------ the command line


def outcome(folder):
    """Results that must not depend on profiling."""
    row = Result.read(folder / "results.json")
    codes = read_ledger(folder / "ledger.jsonl")["codes_sha256"].tolist()
    return row.manifest["run"], row.manifest["config"], row.metrics, codes


def test_a_profiled_run_is_computed_and_gives_the_same_numbers_and_hash(cli, tiny, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "profiled"
    assert cli("method=gptq", *tiny, f"out={plain}").returncode == 0
    assert not (plain / "profile.md").exists()
    done = cli("method=gptq", *tiny, "profile=true", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert "done already" not in done.stderr
    assert "Where the time went" in done.stdout
    assert "profiler_start" not in done.stderr
    assert outcome(out) == outcome(plain)
    text = (out / "profile.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    head, _, *phases = rows[: next(i for i, row in enumerate(rows) if row[0] == "all") + 1]
    assert head[:2] == ["phase", "seconds"]
    *parts, (_, whole, *_) = phases
    assert sum(float(row[1]) for row in parts) == pytest.approx(float(whole), abs=0.005 * len(parts) + 0.005)
    assert {"load", "forward", "moments", "factor", "solve", "score/forward", "other"} <= {row[0] for row in parts}
    trace = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))
    assert {f"{PREFIX}load", f"{PREFIX}disk"} <= {e["name"] for e in trace["traceEvents"]}


def test_a_killed_profiled_run_goes_on_and_serves_plain_runs(tiny, tmp_path, monkeypatch):
    from hydra import compose, initialize_config_dir

    class KilledError(Exception):
        """Stands for kill -9."""

    def die(*_arguments):
        raise KilledError

    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path / "cache"))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        options = ["method=gptq", *tiny]
        cfg = compose("config", overrides=[*options, "profile=true", f"out={tmp_path / 'out'}"])
        plain = compose("config", overrides=[*options, f"out={tmp_path / 'plain'}"])
    with monkeypatch.context() as patched:
        patched.setattr(experiment.Ledger, "append", die)
        with pytest.raises(KilledError):
            experiment.run(cfg)
    assert not (tmp_path / "out" / "profile.md").exists()
    result = experiment.run(cfg)
    assert result.manifest["resumed"] == [1]
    assert (tmp_path / "out" / "profile.md").is_file()
    assert (tmp_path / "out" / "trace.json.gz").is_file()
    experiment.run(plain)
    assert (tmp_path / "plain" / "results.json").samefile(tmp_path / "out" / "results.json")


def test_profile_takes_true_or_false(tiny, tmp_path):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=["method=rtn", *tiny, "profile=maybe", f"out={tmp_path / 'out'}"])
    with pytest.raises(UserError, match="profile=maybe"):
        experiment.run(cfg)
