import json
import logging
import shutil
from pathlib import Path

import pandas
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gptq_awq.data.corpora import HubText, LocalText, WikiText2
from gptq_awq.data.text import make_text, wikitext_articles
from gptq_awq.data.tokens import calibration_tokens, evaluation_windows, make_token_set, within_vocabulary
from gptq_awq.errors import UserError
from gptq_awq.storage import assets
from gptq_awq.storage.assets import ASSETS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, so that every row can be read back; believes in 8 tokens of context."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=8)


@pytest.fixture
def chatty(tokenizer) -> PreTrainedTokenizerFast:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    clone = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    clone.chat_template = template
    return clone


ALPHABET = make_text("abc", ["".join(chr(ord("a") + i % 26) for i in range(1000))], "here")
DOCUMENTS = make_text("docs", ["one", "", "three three", "four", "five five five five"], "here")


# -------------------------------------------------------------------------------------------- calibration


def test_windows_are_pieces_of_the_text(tokenizer):
    tokens = calibration_tokens(ALPHABET, tokenizer, samples=5, seqlen=30, seed=0)
    assert tokens.ids.shape == (5, 30)
    assert tokens.mask is None
    pieces = [tokenizer.decode(row) for row in tokens.ids]
    assert all(piece in ALPHABET.joined for piece in pieces)
    assert len(set(pieces)) > 1


def test_windows_may_start_anywhere_up_to_the_last_that_fits(tokenizer):
    text = make_text("ab", ["ab" * 8], "here")
    rows = [calibration_tokens(text, tokenizer, 1, 15, seed).ids[0].tolist() for seed in range(20)]
    assert len({tuple(row) for row in rows}) == 2


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_equal_seeds_draw_equal_tokens_and_others_do_not(tokenizer, packing):
    text = make_text("docs", [f"{i} " * i for i in range(1, 100)], "here")
    first, again, other = (calibration_tokens(text, tokenizer, 8, 12, seed, packing=packing) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert torch.equal(first.ids, again.ids)


def test_documents_are_drawn_once_each_truncated_and_padded(tokenizer):
    tokens = calibration_tokens(DOCUMENTS, tokenizer, samples=4, seqlen=11, seed=3, packing="documents")
    assert tokens.mask is not None
    rows = [tokenizer.decode(ids[mask]) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
    assert sorted(rows) == sorted(["one", "three three", "four", "five five f"])
    assert (tokens.ids[~tokens.mask] == tokenizer.eos_token_id).all()
    padding_follows = tokens.mask[:, 1:] <= tokens.mask[:, :-1]
    assert padding_follows.all()


def test_bos_begins_each_row_within_its_length(tokenizer):
    for packing in ("windows", "documents"):
        tokens = calibration_tokens(DOCUMENTS, tokenizer, 2, 6, 0, packing=packing, add_bos=True)
        assert tokens.ids.shape == (2, 6)
        assert (tokens.ids[:, 0] == tokenizer.bos_token_id).all()
        assert (tokens.ids == tokenizer.bos_token_id).sum() == 2


def test_a_chat_template_wraps_each_document(chatty):
    tokens = calibration_tokens(DOCUMENTS, chatty, 5, 40, 0, packing="documents", chat_template=True)
    assert tokens.mask is not None
    rows = {chatty.decode(ids[mask]) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)}
    assert rows == {f"<user>{document}</>" for document in DOCUMENTS.documents}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('a system message must come first') }}", "a system message must come first"),
        ("{% for m in messages %}{{ m['content'] }}", "endfor"),
        ("{{ messages[1]['content'] }}", "messages|list|index|element"),
        ("{{ none_such.content }}", "none_such"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_chat_template_that_raises_is_quoted_beside_its_option(chatty, template, words):
    chatty.chat_template = template
    with pytest.raises(UserError, match=rf"^d\.chat_template=true: .*({words})") as error:
        calibration_tokens(DOCUMENTS, chatty, 2, 8, 0, packing="documents", chat_template=True, option="d")
    assert "\n" not in str(error.value)


def test_padding_beyond_the_embedding_becomes_a_token_that_there_is(tokenizer):
    ids, mask = torch.tensor([[5, 6, 300], [7, 300, 300]]), torch.tensor([[True, True, False], [True, False, False]])
    tokens = within_vocabulary(make_token_set("n", ids, mask, "s"), 300, tokenizer)
    assert tokens.ids.tolist() == [[5, 6, 0], [7, 0, 0]]
    assert tokens.sha256 == make_token_set("n", tokens.ids, mask, "s").sha256
    fits = make_token_set("n", ids, mask, "s")
    assert within_vocabulary(fits, 301, tokenizer) is fits


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True, True], [True, False, False]])])
def test_a_real_token_beyond_the_embedding_is_named(tokenizer, mask):
    tokens = make_token_set("essays", torch.tensor([[5, 6, 70], [7, 300, 300]]), mask, "s")
    with pytest.raises(UserError, match=r"^d: the token .*\(70\) of essays is none of the model's 70:"):
        within_vocabulary(tokens, 70, tokenizer, "d")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 34, "seqlen": 30}, r"d\.samples=34.*d\.seqlen=30.*1000 tokens, not 1020"),
        ({"samples": 2, "packing": "documents"}, r"d\.samples=2.*abc has 1\b.*d\.packing=windows"),
        ({"samples": 0}, r"d\.samples=0"),
        ({"seqlen": -1}, r"d\.seqlen=-1"),
        ({"samples": "many"}, r"d\.samples=many"),
        ({"packing": "tetris"}, r"d\.packing=tetris.*windows, documents"),
        ({"chat_template": True}, r"d\.chat_template=true needs d\.packing=documents"),
        ({"chat_template": True, "packing": "documents"}, r"d\.chat_template=true.*no chat template"),
    ],
)
def test_calibration_that_cannot_be_drawn_names_its_option(tokenizer, wrong, message):
    with pytest.raises(UserError, match=message):
        calibration_tokens(ALPHABET, tokenizer, seed=0, **({"samples": 2, "seqlen": 8} | wrong), option="d")


def test_a_missing_bos_is_named(chatty):
    with pytest.raises(UserError, match=r"data\.add_bos=true"):
        calibration_tokens(ALPHABET, chatty, 1, 8, 0, add_bos=True)


def test_the_hash_covers_ids_and_mask():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.ones(2, 3, dtype=torch.bool)
    sets = [make_token_set("n", i, m, "s") for i in (ids, ids + 1) for m in (None, mask, ~mask)]
    assert len({tokens.sha256 for tokens in sets}) == 6


# --------------------------------------------------------------------------------------------- evaluation


def test_evaluation_windows_tile_the_text_from_its_start(tokenizer):
    tokens = evaluation_windows(DOCUMENTS, tokenizer, seqlen=7)
    joined = tokenizer.decode(tokens.ids.flatten())
    assert DOCUMENTS.joined.startswith(joined)
    assert 0 <= len(DOCUMENTS.joined) - len(joined) < 7
    fewer = evaluation_windows(DOCUMENTS, tokenizer, seqlen=7, windows=2)
    assert torch.equal(fewer.ids, tokens.ids[:2])


@pytest.mark.parametrize("windows", [None, 1, 12])
def test_too_little_text_for_evaluation_names_windows_and_seqlen(tokenizer, windows):
    with pytest.raises(UserError, match=r"e\.windows=\d+ of e\.seqlen=2000.*has 1000 tokens, 0 windows"):
        evaluation_windows(ALPHABET, tokenizer, seqlen=2000, windows=windows, option="e")


def test_long_texts_are_tokenized_without_a_warning(tokenizer, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        evaluation_windows(ALPHABET, tokenizer, seqlen=100)
    assert not caplog.records
    assert capfd.readouterr().err == ""


# --------------------------------------------------------------------------------------------- WikiText-2


@pytest.fixture
def wikitext(shared, tmp_path, monkeypatch) -> Path:
    """A cache that holds WikiText-2's test and validation splits, as if fetched."""
    folder = tmp_path / "assets"
    folder.mkdir()
    for split in ("valid", "test"):
        target = folder / ASSETS[f"wikitext2-{split}"].filename
        shutil.copyfile(shared / f"data/wikitext-2-raw/wiki.{split}.raw", target)
        target.with_name(target.name + ".json").write_text(json.dumps({"source": "a test", "sha256": ""}))
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path))
    return folder


def test_raw_wikitext_is_the_files_text_in_articles(wikitext):
    text = WikiText2().text()
    raw = (wikitext / "wikitext2-test.raw").read_bytes().decode()
    assert (text.name, text.source, text.sha256) == ("wikitext2", "a test", ASSETS["wikitext2-test"].sha256)
    assert text.joined == raw
    assert len(text.documents) == 60
    assert text.documents[0].startswith(" \n = Robert Boulter = \n")


def test_gptq_joined_wikitext_is_the_hub_rows_with_blank_lines_between(wikitext):
    text = WikiText2(split="valid", join="gptq").text()
    raw = (wikitext / "wikitext2-valid.raw").read_text()
    rows = [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]
    assert text.name == "wikitext2-gptq-valid"
    assert text.joined == "\n\n".join(rows)


def test_articles_join_to_whatever_they_were_cut_from():
    for raw in ("", "no title", " \n = A = \n \n text \n = = B = = \n \n = C = \n \n", " = 2 = \n = 3 = \n"):
        assert "".join(wikitext_articles(raw)) == raw
    assert len(wikitext_articles(" \n = A = \n \n x = 1 \n \n = = B = = \n \n = C = \n \n y \n")) == 2


def test_a_split_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"WikiText2\.split=validation.*train, valid, test"):
        WikiText2(split="validation").text()
    with pytest.raises(UserError, match=r"WikiText2\.join=x"):
        WikiText2(join="x").text("e")


def test_a_corpus_draws_its_calibration_as_its_fields_say(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(ALPHABET.joined)
    corpus = LocalText(path=str(tmp_path / "a.txt"), samples=3, seqlen=20, add_bos=True)
    drawn = corpus.tokens(tokenizer, seed=4)
    assert drawn.sha256 == calibration_tokens(ALPHABET, tokenizer, 3, 20, 4, add_bos=True).sha256


# ----------------------------------------------------------------------------------------------- own files


@pytest.fixture
def files(tmp_path) -> Path:
    rows = ["first", "sécond\nline", ""]
    (tmp_path / "a.txt").write_bytes(b"line\r\nline\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row, "n": 1}) + "\n\n" for row in rows))
    pandas.DataFrame({"text": rows, "n": 1}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "a.csv").write_text("x")
    return tmp_path


def test_a_text_file_is_one_document_byte_for_byte(files):
    text = LocalText(path=str(files / "a.txt")).text()
    assert (text.name, text.documents, text.source) == ("a", ("line\r\nline\n",), str(files / "a.txt"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_are_documents(files, name):
    text = LocalText(path=str(files / name), joiner="|").text()
    assert text.documents == ("first", "sécond\nline", "")
    assert text.joined == "first|sécond\nline|"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": None}, r"data\.path is not set"),
        ({"path": "none.txt"}, r"data\.path=.*none\.txt: there is no such file"),
        ({"path": "."}, r"data\.path=.*no such file"),
        ({"path": "a.csv"}, r"data\.path=.*suffix.*\.txt.*\.jsonl.*\.parquet"),
        ({"path": "empty.txt"}, r"data\.path=.*no text"),
        ({"path": "empty.jsonl"}, r"data\.path=.*no text"),
        ({"path": "bad.txt"}, r"data\.path=.*utf-8"),
        ({"path": "bad.jsonl"}, r"data\.path=.*line 2 is not JSON"),
        ({"path": "bad.parquet"}, r"data\.path=.*not a parquet file"),
        ({"path": "a.jsonl", "field": "content"}, r"data\.field=content: is not in line 1 of .* fields are text, n"),
        ({"path": "a.jsonl", "field": "n"}, r"data\.field=n: is no string in line 1"),
        ({"path": "a.parquet", "field": "content"}, r"data\.field=content: .*fields text, n"),
        ({"path": "a.parquet", "field": "n"}, r"data\.field=n: is no string in row 1"),
    ],
)
def test_a_file_that_cannot_be_read_names_its_option_in_one_line(files, fields, message):
    if fields["path"]:
        fields = fields | {"path": str(files / fields["path"])}
    with pytest.raises(UserError, match=message) as error:
        LocalText(**fields).text()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("letters", ["\0", "\0\n ", "\ufeff\t", "\x1b\x07", "\x85\ufffd"])
def test_a_file_without_a_visible_letter_holds_no_text(tmp_path, letters):
    (tmp_path / "odd.txt").write_text(letters * 5000)
    with pytest.raises(UserError, match=r"data\.path=.*no text"):
        LocalText(path=str(tmp_path / "odd.txt")).text()
    (tmp_path / "odd.txt").write_text(letters * 5000 + "a")
    LocalText(path=str(tmp_path / "odd.txt")).text()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{"text": null, "id": 7}',
            r"data\.field=text: is null in line 23 of .*rows\.jsonl, whose fields are text, id",
        ),
        ('{"body": "x"}', r"data\.field=text: is not in line 23 of .*, whose fields are body"),
        ("{}", r"line 23 of .*, whose fields are none"),
        ('["text"]', r"data\.path=.*: line 23 is not an object"),
        ("{", r"line 23 is not JSON"),
        ("[" * 100_000, r"line 23 is not JSON"),
        ("9" * 5_000, r"line 23 is not JSON"),
    ],
)
def test_a_row_without_text_is_named_by_its_line_in_the_file(tmp_path, row, message):
    blank_between = "\n\n".join(['{"text": "good"}'] * 11)
    (tmp_path / "rows.jsonl").write_text(f"{blank_between}\n\n{row}\n")
    with pytest.raises(UserError, match=message) as error:
        LocalText(path=str(tmp_path / "rows.jsonl")).text()
    assert "\n" not in str(error.value)


def test_halves_of_a_surrogate_pair_are_replacement_characters(tmp_path):
    rows = [r'{"text": "half \ud83d"}', r'{"text": "\ude00 other"}', r'{"text": "whole \ud83d\ude00"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    text = LocalText(path=str(tmp_path / "rows.jsonl"), joiner="").text()
    assert text.documents == ("half \ufffd", "\ufffd other", "whole \U0001f600")  # joined, no pair arises of two halves
    assert text == make_text("rows", text.documents, text.source, "")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\r\n{"text": "second"}\r\n')
    assert LocalText(path=str(tmp_path / "rows.jsonl")).text().documents == ("first", "second")


def test_a_parquet_file_with_a_damaged_page_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pandas.DataFrame({"text": [f"row {i}" for i in range(1000)]}).to_parquet(path)
    damaged = bytearray(path.read_bytes())
    damaged[4:200] = bytes(196)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"data\.path=.*is not a parquet file that can be read") as error:
        LocalText(path=str(path)).text()
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- hub


def test_without_the_hub_its_datasets_name_the_offline_choices(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "hub_reachable", lambda: False)
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path))
    c4 = HubText(name="c4", repo="allenai/c4", split="train", files={"train": "en/x.json.gz"})
    with pytest.raises(UserError, match=r"data=wikitext2 or data=local data\.path=FILE"):
        c4.text()
    with pytest.raises(UserError, match=r"data@eval\.ppl\.text=wikitext2 or eval\.ppl\.path=FILE"):
        c4.text("eval.ppl.text")


def test_a_split_without_a_file_is_named():
    with pytest.raises(UserError, match=r"data\.split=test: choose one of train"):
        HubText(name="c4", repo="allenai/c4", split="test", files={"train": "x"}).text()
