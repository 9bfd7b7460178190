"""Whether llama.cpp splits text into the same tokens as transformers, found out by having both do it.

llama.cpp knows byte-level tokenizers by names of its own (`tokenizer.ggml.pre`). Its converter tells them by a hash of
what they make of one text, which a tokenizer with another vocabulary doesn't have; then llama.cpp itself is asked with
each name that the converter could have given, and the first that gives transformers' ids is taken. SentencePiece's
tokenizers merge by scores in tokenizer.model, those of transformers by a list of merges: where they differ, scores are
made of the list.

llama.cpp puts a space before every text and after every special token of such a tokenizer; most of transformers' put
one before a text only, and none before a text that has one. That much is said; any other difference is refused.
"""

import importlib
import inspect
import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gptq_awq.errors import UserError
from gptq_awq.export.engines import engine_version, find, tokenize
from gptq_awq.export.gguf_converter import Vocabulary, conversion, imported, is_pinned, refusing
from gptq_awq.runtime.fingerprint import vocabulary_sha256
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.notes import note, noted

log = logging.getLogger(__name__)
ENGINE = "xllamacpp"
Wanted = Mapping[str, Sequence[int]]
"""Texts, and the ids that transformers gives them."""

ADDED = 24
"""Added tokens that are tried in texts, at most."""

SPACE = "▁"
"""SentencePiece's sign for a space."""

USUAL = ("gpt-2", "qwen2", "llama-bpe", "smollm", "gpt-4o", "tekken")
"""Pre-tokenizers that are tried first: others that split alike may treat special tokens in ways of their own."""
TEXTS = tuple(
    json.loads(f'"{line}"')
    for line in r"""|
|Hello, world!|
|The quick brown fox jumps over the lazy dog.|
|It's IT'S it'Ll x'RE 'tis ''s we've I'm he'LL|
| leading space|
|trailing space |
|two  spaces|
|three   spaces   each|
|    indented|
|a            b|
|\n|
|\n\n|
|a\nb|
|a\n\nb|
|a\n\n\n\nb|
|line \n next|
|a\r\nb\r\n|
|\ttab|
|a\t\tb|
| \n |
|\n  x|
|x \n\n|
|1|
|12|
|123|
|1234|
|12345678|
|3.14159|
|1,000,000|
|5.5e-7|
|2024-05-17|
|x1y22z333|
|0x1F|
|\uff11\uff12|
|def f(x):\n\treturn x**2  # tab\n|
|for (int i = 0; i < n; ++i) { a[i] += b[i]; }|
|</div>\n  <p class=\"x\">|
|import numpy as np\n\n\nclass A(B):\n    pass\n|
|SELECT * FROM t WHERE a='b';|
|x = {'a': [1, 2, 3]}|
|//comment\n|
|#include <stdio.h>|
|$ ls -la | grep foo > /dev/null 2>&1|
|a_b-c.d/e\\f|
|!@#$%^&*()_+-=[]{}|;':\",./<>?|
|...|
|don't|
|O'Neill's|
|CamelCaseWORDSmixedUP|
|ALLCAPS|
|iPhone|
|e.g. i.e. etc.|
|(parenthesis)|
|[x](y)|
|\u2014dash\u2013|
|café|
|naïve façade|
|Ünïcödé|
|ÀÉÎõü|
|straße|
|œuvre|
|Ελληνικά|
|нещо на Български|
|Привет, мир!|
|שלום|
|مرحبا بالعالم|
|नमस्ते|
|ไทย|
|日本語テキスト|
|東京は夜の七時|
|한국어|
|我想在apple工作1314151天～|
|你好，世界。|
|Việt Nam|
|🚀|
|😶\u200d🌫\ufe0f|
|👨\u200d👩\u200d👧|
|✅ done|
|🦙🦙|
|a🙂b|
|½ ² ³|
|™ © ®|
|\u201cquoted\u201d|
|\u2018single\u2019|
|…|
|\u00a0nbsp|
|\u3000x|
|\u200b|
|http://example.com/a?b=c&d=e#f|
|user@example.com|
|C++|
|F#|
|50%|
|$9.99|
|€5|
|10°C|
|a=b|
|x²|
|#tag|
|@name|
|Once upon a time, there was a little boat.\nIt went out on a grey lake -- and nobody on the shore said a word.|
|""".split("|\n|")[1:-1]  # noqa: SIM905 (one text a line)
)
"""Texts of many kinds, as JSON between bars; composed characters only, as llama.cpp doesn't normalize."""


def vocabulary_for(root: Path, folder: Path, tokenizer: Any, pre: str | None, allow: bool) -> tuple[Vocabulary, str]:
    """The description of a tokenizer by which llama.cpp gives transformers' ids; a sentence where it doesn't, or "".

    Args:
        root: the converter (converter_root).
        folder: folder with config.json and the tokenizer's files.
        tokenizer: transformers tokenizer.
        pre: name of the pre-tokenizer that the user gave; None for none.
        allow: whether ids may differ in any way.

    Raises:
        UserError: the converter refuses the tokenizer, no name is right, or llama.cpp's ids are others.
    """
    chats = _conversations(tokenizer)
    wanted = {text: list(tokenizer(text)["input_ids"]) for text in (*TEXTS, *_with_added_tokens(tokenizer), *chats)}
    given = Vocabulary(pre, around=_around(tokenizer))
    if find(ENGINE, "gguf") is None:
        return _unasked(root, folder, given), "gguf: token ids were not compared: xllamacpp is not installed"
    best, wrong = _kept(root, folder, given, wanted)
    if not wrong:
        return best, ""
    what = f"llama.cpp gives other token ids than transformers for {len(wrong)} of {len(wanted)} texts, "
    what += f"first for {wrong[0]!r:.80}"
    if ("add_space_prefix", True) in best.around and _by_spaces_alone(wrong, tokenizer, chats):
        return best, f"gguf: {what}: it puts a space before every text and after every special token"
    if not allow:
        raise UserError(
            f"export.formats=gguf: {what}; choose another format, such as hf, or export.gguf.other_ids=allow"
        )
    return best, f"gguf: {what}"


def _kept(root: Path, folder: Path, given: Vocabulary, wanted: Wanted) -> tuple[Vocabulary, list[str]]:
    """The description that differs least and the texts where it does; what the pinned converter says is kept."""
    if not is_pinned(root):
        return _best(root, folder, given, wanted)
    name = vocabulary_sha256(folder, wanted, given, root.name, engine_version(ENGINE))
    path = cache_dir() / "vocabularies" / f"{name}.json"
    with suppress(KeyError, TypeError, ValueError):  # of a damaged note
        kept = noted(path)
        around = tuple((str(option), bool(added)) for option, added in kept["around"])
        return Vocabulary(kept["pre"], kept["by_merges"], around), list(kept["wrong"])
    best, wrong = _best(root, folder, given, wanted)
    with suppress(OSError):  # the next export asks again
        note(path, {**asdict(best), "wrong": wrong})
    return best, wrong


def _best(root: Path, folder: Path, given: Vocabulary, wanted: Wanted) -> tuple[Vocabulary, list[str]]:
    """The description that differs least and the texts where it does. Raises UserError where llama.cpp loads none."""
    different = _different(root, folder, given, wanted)
    if not different:
        raise UserError(
            "export.formats=gguf: llama.cpp does not load this tokenizer; choose another format, such as hf"
        )
    return min(different.items(), key=lambda found: len(found[1]))


def _unasked(root: Path, folder: Path, given: Vocabulary) -> Vocabulary:
    """The description where llama.cpp can't be asked: its converter has to recognize the tokenizer."""
    with tempfile.TemporaryDirectory(prefix="vocab-") as scratch:
        plain, _ = _write_recognized(Path(scratch) / "vocab.gguf", root, folder, given)
    if plain is None:
        raise UserError(
            "export.formats=gguf: llama.cpp's converter does not recognize this tokenizer; install xllamacpp, so that "
            "llama.cpp can be asked, or set export.gguf.pre to llama.cpp's name for it"
        )
    return plain


def _different(root: Path, folder: Path, given: Vocabulary, wanted: Wanted) -> dict[Vocabulary, list[str]]:
    """Texts whose ids differ in llama.cpp, for each description that was tried until there were none."""
    with tempfile.TemporaryDirectory(prefix="vocab-") as scratch:
        path = Path(scratch) / "vocab.gguf"
        plain, kind = _write_recognized(path, root, folder, given)
        names = _known_names(root) if plain is None else [None]
        different = {
            plain or replace(given, pre=name): _differing(wanted, ids)
            for name, ids in zip(names, tokenize(ENGINE, path, wanted, names), strict=False)
            if ids is not None
        }
        if kind == "llama" and plain and different.get(plain) and _merges(folder):
            by_merges = replace(plain, by_merges=True)
            _write(path, root, folder, by_merges)
            if (ids := tokenize(ENGINE, path, wanted, [None])[0]) is not None:
                different[by_merges] = _differing(wanted, ids)
    return different


def _with_added_tokens(tokenizer: Any) -> list[str]:
    """Texts with each added token between words, with and without spaces; a sample where there are many."""
    added = sorted(tokenizer.get_added_vocab())
    step = -(-len(added) // ADDED) or 1
    return [f"Hi{space}{token}{space}there\n{token}" for token in added[::step] for space in ("", " ", "\n")]


def _conversations(tokenizer: Any) -> list[str]:
    """Chats as the tokenizer's template writes them, if it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [("user", "Hello!"), ("assistant", "Hi there."), ("user", "  Tell me:\n\n1. who you are")]
    messages = [{"role": role, "content": content} for role, content in turns]
    found = []
    for count in (1, len(messages)):
        try:
            found.append(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates are programs of strangers
            log.debug("chat template: %s", error)
    return found


def _by_spaces_alone(wrong: Sequence[str], tokenizer: Any, chats: Sequence[str]) -> bool:
    """Whether all these texts begin with a space or have special tokens inside, and none is a chat."""
    added = tokenizer.added_tokens_decoder.values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    inside = [token.content for token in added]
    return all(text not in chats and (text[:1].isspace() or any(token in text for token in inside)) for text in wrong)


def _differing(wanted: Mapping[str, Sequence[int]], found: Sequence[Sequence[int]]) -> list[str]:
    return [text for (text, ids), theirs in zip(wanted.items(), found, strict=True) if ids != theirs]


def _merges(folder: Path) -> bool:
    """Whether the tokenizer of a folder is one of merges."""
    path = folder / "tokenizer.json"
    return path.is_file() and bool(json.loads(path.read_text())["model"].get("merges"))


def _known_names(root: Path) -> list[str]:
    """All names of pre-tokenizers that the converter knows, the usual ones first."""
    with imported(root):
        source = inspect.getsource(importlib.import_module("conversion.base"))
    return list(dict.fromkeys([*USUAL, *re.findall(r'res = "([^"]+)"', source)]))


def _around(tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """llama.cpp's options for what transformers puts around a text; tokens other than BOS and EOS are left to it."""
    whole, bare = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    found: list[tuple[str, bool]] = []
    if SPACE in tokenizer.get_vocab():
        found = [("add_space_prefix", str(tokenizer.convert_ids_to_tokens(bare[:1])[0]).startswith(SPACE))]
    for bos, eos in ((False, False), (True, False), (False, True), (True, True)):
        if [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos == whole:
            return (*found, ("add_bos_token", bos), ("add_eos_token", eos))
    return tuple(found)


def _write_recognized(path: Path, root: Path, folder: Path, given: Vocabulary) -> tuple[Vocabulary | None, str]:
    """Write the tokenizer as the converter, or the user, says; None where it doesn't know it. With its kind."""
    try:
        return given, _write(path, root, folder, given)
    except UserError as error:
        if given.pre is not None or not isinstance(error.__cause__, NotImplementedError):
            raise
    return None, _write(path, root, folder, replace(given, pre="default"))


def _write(path: Path, root: Path, folder: Path, vocabulary: Vocabulary) -> str:
    """Write a GGUF file without tensors, and return llama.cpp's name for the kind of its tokenizer."""
    with imported(root) as package:
        options = {"dtype": "F32", "out": path, "model_name": "vocabulary", "vocabulary": vocabulary}
        instance = conversion(package, folder, {}, {}, **options, config=None, exact=())
        with refusing():
            instance.prepare_metadata(vocab_only=True)
        writer = instance.gguf_writer
        writer.write_header_to_file(path=path)
        writer.write_kv_data_to_file()
        writer.close()
        return str(writer.kv_data[0]["tokenizer.ggml.model"].value)
