import copy
import json
import time
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers.scored_models import disturb
from helpers.tiny_models import save_tiny_folder
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy.stats import binomtest

from gptq_awq.errors import UserError
from gptq_awq.evaluation import harness
from gptq_awq.evaluation.evaluate import full_precision, score
from gptq_awq.evaluation.harness import load_tasks, run_tasks
from gptq_awq.evaluation.language_model import LanguageModel

PAIRS = [
    ("THE CAT", " SAT"),
    ("", "A DOG"),
    ("THE CAT ", "RAN"),
    ("A" * 150, " B"),
    ("X", "Y"),
    ("X", "Z"),
    ("X", "YZ"),
]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of 64 characters, and its tokenizer."""
    return load(save_tiny_folder(tmp_path_factory.mktemp("model")))


def load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False), transformers.AutoTokenizer.from_pretrained(folder)


def ask(kind, *questions):
    return [Instance(kind, {}, question, index) for index, question in enumerate(questions)]


def lambada_rows(path, sentences):
    path.write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences))
    return path


SENTENCES = ["THE CAT SAT ON THE MAT", "A DOG RAN", "ONE TWO THREE FOUR", "UP AND DOWN"]


@pytest.fixture
def choices(tmp_path):
    """A folder with a multiple-choice task of its own, `letters`."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    draw = np.random.default_rng(0)
    rows = [{"question": f"Q{i} " + "".join(draw.choice(list("ABCD"), 5)), "answer": i % 3} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}:",
        "doc_to_target": "answer",
        "doc_to_choice": ["X", "Y", "Z"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "letters.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture
def small_index(monkeypatch):
    """lm-eval without most of its own tasks, which take long to index."""
    folder = str(Path(lm_eval.tasks.__file__).parent / "lambada")

    def index(include_path=None, include_defaults=True):
        paths = [folder] * include_defaults + [include_path] * (include_path is not None)
        return TaskManager(include_path=paths, include_defaults=False)

    monkeypatch.setattr(harness, "TaskManager", index)


def compare_with_hflm(model, tokenizer, kind, questions):
    ours = getattr(LanguageModel(model, tokenizer, batch_size=3), kind)(ask(kind, *questions))
    theirs = getattr(HFLM(model, tokenizer=tokenizer, batch_size=1), kind)(ask(kind, *questions), disable_tqdm=True)
    return ours, theirs


def test_loglikelihoods_equal_those_of_lm_evals_own_wrapper(tiny):
    ours, theirs = compare_with_hflm(*tiny, "loglikelihood", PAIRS)
    np.testing.assert_allclose([a for a, _ in ours], [a for a, _ in theirs], atol=1e-4)
    assert [b for _, b in ours] == [b for _, b in theirs]


def test_rolling_loglikelihoods_equal_those_of_lm_evals_own_wrapper(tiny):
    texts = [("THE CAT SAT ON THE MAT",), ("A LONG STORY " * 30,)]
    np.testing.assert_allclose(*compare_with_hflm(*tiny, "loglikelihood_rolling", texts), rtol=1e-5)


def test_generated_text_equals_that_of_lm_evals_own_wrapper(tiny):
    options = [
        {"until": ["A", "Q"], "max_gen_toks": 12},
        {"until": [], "max_gen_toks": 5, "temperature": 0.0},
    ]
    questions = [(text, options[i % 2]) for i, text in enumerate(SENTENCES)]
    ours, theirs = compare_with_hflm(*tiny, "generate_until", questions)
    assert ours == theirs
    assert any(ours)


def test_requests_with_one_input_are_run_once(tiny):
    lm, shapes = LanguageModel(*tiny), []
    block = tiny[0].model.layers[0]
    handle = block.register_forward_pre_hook(lambda _module, args: shapes.append(tuple(args[0].shape[:2])))
    lm.loglikelihood(ask("loglikelihood", ("AB", "C"), ("AB", "D"), ("AB", "E"), ("A", "BC")))
    handle.remove()
    assert shapes == [(1, 2)]


def test_nonfinite_logits_are_refused(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        LanguageModel(model, tokenizer).loglikelihood(ask("loglikelihood", ("A", "B")))


def test_lambada_is_prompted_as_by_lm_eval():
    theirs = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / "lambada/lambada_openai.yaml").read_text())
    ours = yaml.safe_load((harness.TASKS / "lambada_openai.yaml").read_text())
    for key in (
        "task",
        "output_type",
        "test_split",
        "doc_to_text",
        "doc_to_target",
        "metric_list",
        "metadata",
    ):
        assert ours[key] == theirs[key], key


def test_lambada_scores_equal_those_of_lm_evals_own_wrapper(tmp_path, stories15m, shared):
    model, tokenizer = load(stories15m)
    tasks = load_tasks(["lambada_openai"], limit=12, lambada=shared / "data/lambada_openai/lambada_test.jsonl")
    ours = run_tasks(model, tokenizer, tasks)
    theirs = evaluate(HFLM(model, tokenizer=tokenizer), tasks.loaded, limit=12, bootstrap_iters=0)
    for metric in ("acc", "perplexity"):
        value = theirs["results"]["lambada_openai"][f"{metric},none"]
        assert ours.scores[f"lambada_openai/{metric}"].value == pytest.approx(value, rel=1e-4)
    nll = [sample["perplexity"] for sample in theirs["samples"]["lambada_openai"]]
    np.testing.assert_allclose(ours.scores["lambada_openai/perplexity"].items, nll, atol=1e-4)
    assert len(nll) == 12


def test_the_standard_error_is_that_of_a_mean(tiny, choices):
    scores = run_tasks(*tiny, load_tasks(["letters"], include_path=choices)).scores["letters/acc"]
    assert scores.value == scores.items.mean()
    assert scores.stderr == pytest.approx(scores.items.std(ddof=1) / np.sqrt(12))
    assert 0 < scores.value < 1


def test_a_task_of_ones_own_is_scored_item_by_item(tiny, choices):
    model, tokenizer = tiny
    items = (
        run_tasks(model, tokenizer, load_tasks(["letters"], include_path=choices, limit=5)).scores["letters/acc"].items
    )
    rows = [json.loads(line) for line in (choices / "rows.jsonl").read_text().splitlines()]
    for row, item in zip(rows[:5], items, strict=True):
        ids = torch.tensor([tokenizer.encode(row["question"] + ": ")])  # lm-eval puts a space before a choice
        best = model(ids).logits[0, -1][tokenizer.encode("XYZ")].argmax()
        assert item == (best == row["answer"])


def test_both_models_are_shown_the_same_examples(tiny, choices):
    tasks = load_tasks(["letters"], include_path=choices, num_fewshot=2, limit=4)
    first, second = run_tasks(*tiny, tasks), run_tasks(*tiny, tasks)
    assert first.sha256 == second.sha256
    other = load_tasks(["letters"], include_path=choices, num_fewshot=2, limit=4, seed=1)
    assert run_tasks(*tiny, other).sha256 != first.sha256


def test_a_group_pools_its_tasks(tiny, choices, small_index):
    (choices / "twice.yaml").write_text(
        (choices / "letters.yaml").read_text().replace("task: letters", "task: letters2")
    )
    group = {
        "group": "both",
        "task": ["letters", "letters2"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (choices / "both.yaml").write_text(yaml.safe_dump(group))
    scores = run_tasks(*tiny, load_tasks(["both"], include_path=choices, limit=6)).scores
    assert len(scores["both/acc"].items) == 12
    assert scores["both/acc"].value == scores["letters/acc"].value == scores["letters2/acc"].value


def test_a_baselines_answers_are_asked_for_once(tiny, tmp_path, monkeypatch):
    tasks = load_tasks(["lambada_openai"], lambada=lambada_rows(tmp_path / "rows.jsonl", SENTENCES))
    first = full_precision(*tiny, "weights", [], tasks, tmp_path / "cache")
    monkeypatch.setattr(LanguageModel, "_loglikelihood_tokens", None)
    second = full_precision(*tiny, "weights", [], tasks, tmp_path / "cache")
    for name, found in first.results.scores.items():
        assert np.array_equal(found.items, second.results.scores[name].items)
    with pytest.raises(TypeError):
        full_precision(*tiny, "other weights", [], tasks, tmp_path / "cache")


def test_models_are_paired_item_by_item(choices, tmp_path):
    model, tokenizer = load(save_tiny_folder(tmp_path / "model"))
    rows = lambada_rows(tmp_path / "rows.jsonl", SENTENCES * 5)
    tasks = load_tasks(["lambada_openai", "letters"], include_path=choices, lambada=rows)
    baseline = full_precision(model, tokenizer, "weights", [], tasks)
    disturb(model, by=1.0)
    metrics, after = score(model, tokenizer, baseline).metrics, run_tasks(model, tokenizer, tasks)
    before, name = baseline.results.scores["letters/acc"].items, "lm_eval/letters/acc"
    items = after.scores["letters/acc"].items
    assert metrics[name] == items.mean()
    assert metrics[f"{name}/delta"] == pytest.approx(items.mean() - before.mean())
    changed = int((items != before).sum())
    expected = binomtest(int((items < before).sum()), changed).pvalue if changed else 1.0
    assert metrics[f"{name}/p_value"] == pytest.approx(expected)
    assert metrics[f"{name}/test"] == "mcnemar"
    assert metrics["lm_eval/lambada_openai/perplexity/test"] == "paired bootstrap"
    assert "lm_eval/lambada_openai/perplexity/delta_ci95" not in metrics  # its items' mean is not a perplexity
    assert set(baseline.sha256) == {"lm_eval/lambada_openai", "lm_eval/letters"}
    assert json.loads(json.dumps(metrics)) == metrics


def test_tasks_run_in_silence(tiny, tmp_path, capfd):
    run_tasks(*tiny, load_tasks(["lambada_openai"], lambada=lambada_rows(tmp_path / "rows.jsonl", SENTENCES)))
    assert capfd.readouterr() == ("", "")


def test_an_unknown_task_gets_close_matches(small_index):
    with pytest.raises(UserError, match=r"eval\.tasks: .*'lambada_standart': did you mean lambada_standard"):
        load_tasks(["lambada_standart"])


def test_a_task_whose_data_are_out_of_reach_fails_within_seconds(choices, monkeypatch):
    monkeypatch.setattr(harness, "hub_reachable", lambda: False)
    task = yaml.safe_load((choices / "letters.yaml").read_text())
    task |= {"task": "remote", "dataset_path": "nobody/nothing", "dataset_kwargs": None}
    (choices / "remote.yaml").write_text(yaml.safe_dump(task))
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"eval\.tasks: remote .*hub does not answer.*eval\.include_path") as error:
        load_tasks(["remote"], include_path=choices)
    assert time.perf_counter() - start < 5
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"include_path": "/nowhere"}, r"eval\.include_path=/nowhere"), ({"limit": 0}, r"eval\.limit=0")],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        load_tasks(["lambada_openai"], **options)
