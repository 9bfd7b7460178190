"""Whether llama.cpp splits text into the same tokens as transformers, found out by having both do it.

llama.cpp knows byte-level tokenizers by names of its own (`tokenizer.ggml.pre`). Its converter tells them by a hash of
what they make of one text, which a tokenizer with another vocabulary doesn't have; then llama.cpp itself is asked with
each name that the converter could have given, and the first that gives transformers' ids is taken.
"""

import importlib
import inspect
import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptq_awq.errors import UserError
from gptq_awq.export.engines import find, tokenize
from gptq_awq.export.gguf_converter import conversion, imported, refusing

log = logging.getLogger(__name__)
ENGINE = "xllamacpp"
ADDED = 24
"""Added tokens that are tried in texts, at most."""

USUAL = ("gpt-2", "llama-bpe", "qwen2", "smollm", "gpt-4o", "tekken")
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


def pre_tokenizer(root: Path, folder: Path, tokenizer: Any, pre: str | None, allow: bool) -> str | None:
    """llama.cpp's name of a tokenizer's pre-tokenizer; None where the converter knows it, or needs none.

    Args:
        root: the converter (converter_root).
        folder: folder with config.json and the tokenizer's files.
        tokenizer: transformers tokenizer.
        pre: name that the user gave; None for none.
        allow: whether ids may differ, which is then logged.

    Raises:
        UserError: the converter refuses the tokenizer, no name is right, or llama.cpp's ids are others.
    """
    texts = [*TEXTS, *_with_added_tokens(tokenizer)]
    with tempfile.TemporaryDirectory(prefix="vocab-") as scratch:
        path = Path(scratch) / "vocab.gguf"
        known, candidates = _write_vocabulary(path, root, folder, pre)
        if find(ENGINE, "gguf") is None:
            if not known:
                raise UserError(
                    "export.formats=gguf: llama.cpp's converter does not recognize this tokenizer; install xllamacpp, "
                    "so that llama.cpp can be asked, or set export.gguf.pre to llama.cpp's name for it"
                )
            log.warning(
                "export.formats: gguf's token ids were not compared with llama.cpp's: xllamacpp is not installed"
            )
            return pre
        names = [None] if known else candidates
        wanted = {text: list(tokenizer(text)["input_ids"]) for text in texts}
        found = tokenize(ENGINE, path, wanted, names)
    different = {name: _differing(wanted, ids) for name, ids in zip(names, found, strict=False) if ids is not None}
    if not different:
        raise UserError(
            "export.formats=gguf: llama.cpp does not load this tokenizer; choose another format, such as hf"
        )
    best = min(different, key=lambda name: len(different[name]))
    if wrong := different[best]:
        what = f"llama.cpp gives other token ids than transformers for {len(wrong)} of {len(texts)} texts, "
        what += f"first for {wrong[0]!r:.80}"
        if not allow:
            raise UserError(
                f"export.formats=gguf: {what}; choose another format, such as hf, or export.gguf.other_ids=allow"
            )
        log.warning("export.formats: %s", what)
    return pre if known else best


def _with_added_tokens(tokenizer: Any) -> list[str]:
    """Texts with each added token between words, with and without spaces; a sample where there are many."""
    added = sorted(tokenizer.get_added_vocab())
    step = -(-len(added) // ADDED) or 1
    return [f"Hi{space}{token}{space}there\n{token}" for token in added[::step] for space in ("", " ", "\n")]


def _differing(wanted: Mapping[str, Sequence[int]], found: Sequence[Sequence[int]]) -> list[str]:
    return [text for (text, ids), theirs in zip(wanted.items(), found, strict=True) if ids != theirs]


def _write_vocabulary(path: Path, root: Path, folder: Path, pre: str | None) -> tuple[bool, list[str]]:
    """Write a GGUF file without tensors; whether its pre-tokenizer is known, and all names that the converter knows."""
    with imported(root) as package:
        source = inspect.getsource(importlib.import_module("conversion.base"))
        names = list(dict.fromkeys([*USUAL, *re.findall(r'res = "([^"]+)"', source)]))
        for known in (pre, "default") if pre is None else (pre,):
            options = {"dtype": "F32", "out": path, "model_name": "vocabulary", "pre": known, "tokenizer": True}
            instance = conversion(package, folder, {}, {}, **options, config=None, exact=())
            try:
                with refusing():
                    instance.prepare_metadata(vocab_only=True)
            except UserError as error:
                if isinstance(error.__cause__, NotImplementedError) and known is None:
                    continue
                raise
            writer = instance.gguf_writer
            writer.write_header_to_file(path=path)
            writer.write_kv_data_to_file()
            writer.close()
            return known != "default" or pre is not None, names
    raise AssertionError("not reached")
