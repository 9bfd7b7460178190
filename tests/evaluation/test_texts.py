"""Several evaluation texts in one run: each scored in the same windows, under its own name."""

import json

import pytest

from gptq_awq.data.corpora import LocalText
from gptq_awq.errors import UserError
from gptq_awq.evaluation.protocol import Evaluation, Perplexity


@pytest.fixture
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def two(tiny_text, tmp_path):
    """Two files of text of different names."""
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": "a tree likes the house. " * 20}) for _ in range(20)))
    return str(tiny_text), str(other)


def evaluation(texts, corpora=None, **options):
    perplexity = Perplexity(text=LocalText(), seqlen=32, windows=2, **options)
    return Evaluation(perplexity=perplexity, texts=texts, corpora=corpora or {})


def test_files_and_corpora_are_cut_into_the_same_windows(two, tokenizer):
    corpora = {"mine": LocalText(path=two[1])}
    first, second = evaluation([two[0], "mine"], corpora).token_sets(tokenizer)
    assert (first.name, second.name) == ("tiny", "other")
    assert first.ids.shape == second.ids.shape == (2, 32)
    (alone,) = evaluation([], path=two[0]).token_sets(tokenizer)
    assert alone.sha256 == first.sha256


def test_one_text_needs_no_list(two, tokenizer):
    assert [tokens.name for tokens in evaluation(two[0]).token_sets(tokenizer)] == ["tiny"]


def test_errors_name_the_option(two, tokenizer, tmp_path):
    copy, image, empty, bad = (tmp_path / name for name in ("a/other.txt", "x.png", "empty.txt", "bad.jsonl"))
    copy.parent.mkdir()
    copy.write_text("the cat sees a dog. " * 50)
    image.write_bytes(b"")
    empty.write_text("")
    bad.write_text('{"words": "a"}')
    for texts, message in {
        ("c5",): r"eval\.texts=c5: neither a file nor a corpus; choose among mine",
        (str(image),): r"eval\.texts=\S+x\.png: the suffix must be",
        (str(empty),): r"eval\.texts=\S+empty\.txt: the file holds no text",
        (str(bad),): r"eval\.perplexity\.field=text: is not in line 1",
        ("mine",): r"eval\.corpora\.mine\.field=body: .*line 1",
        (two[1], str(copy)): r"eval\.texts: 2 texts are called other",
    }.items():
        with pytest.raises(UserError, match=message):
            evaluation(texts, {"mine": LocalText(path=two[1], field="body")}).token_sets(tokenizer)
    with pytest.raises(UserError, match=r"eval\.texts and eval\.perplexity\.path"):
        evaluation(two, path=two[0])


def test_a_run_scores_every_text(cli, tiny, two, tmp_path):
    options = [option for option in tiny if not option.startswith("eval.perplexity.path")]
    done = cli("method=rtn", "bits=3", *options, f"eval.texts=[{','.join(two)}]", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {key.partition("/")[0] for key in row["metrics"]} == {"tiny", "other"}
    assert set(row["manifest"]["tokens"]["eval"]) == set(row["manifest"]["sources"]["eval"]) == {"tiny", "other"}
    assert "other/ppl@32" in done.stdout

    single = cli("method=rtn", "bits=3", *tiny, f"out={tmp_path / 'single'}")
    assert single.returncode == 0, single.stderr
    alone = json.loads((tmp_path / "single" / "results.json").read_text())["metrics"]
    assert {key: value for key, value in row["metrics"].items() if key.startswith("tiny/")} == alone


def test_a_corpus_that_cannot_be_fetched_is_named(cli, tiny, tmp_path):
    options = [option for option in tiny if not option.startswith("eval.perplexity.path")]
    done = cli("method=rtn", "bits=3", *options, "eval.texts=[c4]", f"out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "eval.texts=wikitext2 or eval.texts=FILE" in done.stderr
