"""A run whose tokenizer was edited is another run: what the old one encoded never stands for what the new one does."""

import json

import pytest
from helpers.tiny_models import save_tiny_folder
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

TASK = (
    "task: sentences\ndataset_path: json\ndataset_kwargs: {data_files: {test: DATA}}\ntest_split: test\n"
    "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
    "metric_list: [{metric: byte_perplexity}]\n"
)


@pytest.fixture
def model(tmp_path):
    return save_tiny_folder(tmp_path / "model")


@pytest.fixture
def row(cli, tiny, model, tmp_path):
    """A function: stdout and stderr, and the results row, of a run of the model as it is now."""

    def call(*options, **environment):
        done = cli(*tiny, f"model.path={model}", "method=rtn", "out=out", *options, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr, json.loads((tmp_path / "out" / "results.json").read_text())

    return call


@pytest.fixture
def sentences(tmp_path):
    """Options of a task of four sentences, each scored as a whole."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sentences.yaml").write_text(TASK.replace("DATA", str(tmp_path / "rows.jsonl")))
    rows = [{"q": f"the {animal} was happy and ran home"} for animal in ("cat", "dog", "girl", "boy")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "eval=full", "eval.tasks=[sentences]", f"eval.include_path={tmp_path / 'tasks'}"


def edit(folder, template=None, swapped=False):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template:
        tokenizer.chat_template = template
    if swapped:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> a b c $A", special_tokens=[("<s>", 1), ("a", 3), ("b", 4), ("c", 5)]
        )
    tokenizer.save_pretrained(folder)


def test_tasks_are_scored_anew_and_against_a_baseline_of_the_new_tokenizer(row, sentences, model, tmp_path):
    row(*sentences)
    assert "done already" in row(*sentences)[0]
    edit(model, swapped=True)
    told, again = row(*sentences)
    assert "done already" not in told
    fresh = row(*sentences, "resume=false", GPTQ_AWQ_CACHE=str(tmp_path / "fresh"))[1]
    assert again["metrics"] == fresh["metrics"]


def test_a_chat_template_that_nothing_uses_leaves_a_run_what_it_is(row, model):
    row()
    edit(model, template="NEW {{ messages }}")
    assert "done already" in row()[0]


def test_a_checkpoint_holds_the_chat_template_of_now(row, model, tmp_path):
    row("export.formats=[hf]")
    edit(model, template="NEW {{ messages }}")
    assert "done already" not in row("export.formats=[hf]")[0]
    (written,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert "NEW" in AutoTokenizer.from_pretrained(written).chat_template


def test_a_checkpoint_holds_the_generation_config_of_now(row, model, tmp_path):
    row("export.formats=[hf]")
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    assert "done already" not in row("export.formats=[hf]")[0]
    (written,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert json.loads((written / "generation_config.json").read_text())["eos_token_id"] == 7
