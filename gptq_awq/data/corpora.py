"""Corpora: sources of text, from which calibration draws token ids.

A corpus (`WikiText2`, `HubText`, `LocalText`) provides its text and, in the fields of `Corpus`, how many rows of how
many tokens calibration draws. Adding a dataset takes one class with a `text` method, or one yaml that names a hub
dataset.
"""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

from gptq_awq.data.text import READERS, Text, joined_as_gptq, make_text, read_jsonl, wikitext_articles
from gptq_awq.data.tokens import Tokenizer, TokenSet, calibration_tokens, check_choice
from gptq_awq.errors import UserError
from gptq_awq.runtime.options import InputPath, PositiveInt, checked_keywords
from gptq_awq.storage.assets import ASSETS, HubRows, fetch, hub_asset

_VISIBLE = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\ufeff\ufffd]")


@checked_keywords
class Corpus(ABC):
    """A source of text, with the options by which calibration draws token ids from it.

    Attributes:
        samples: number of rows.
        seqlen: number of tokens in a row.
        packing: "windows" (random windows of the joined text) or "documents" (one row each, padded, masked).
        chat_template: whether to make each document a user's turn of a chat.
        add_bos: whether to begin each row with the BOS token.
        imatrix: llama.cpp's importance matrix, read instead of any text by grid.search=hessian; None: none.
    """

    samples: PositiveInt = 32
    seqlen: PositiveInt = 512
    packing: Literal["windows", "documents"] = "windows"
    chat_template: bool = False
    add_bos: bool = False
    imatrix: InputPath | None = None

    @abstractmethod
    def text(self, option: str = "data") -> Text:
        """Load the corpus' text. Raises UserError naming `option`."""

    def tokens(self, tokenizer: Tokenizer, seed: int, option: str = "data") -> TokenSet:
        """Draw calibration tokens with `seed` (see `calibration_tokens`). Raises UserError naming `option`."""
        return calibration_tokens(
            self.text(option),
            tokenizer,
            self.samples,
            self.seqlen,
            seed,
            packing=self.packing,
            chat_template=self.chat_template,
            add_bos=self.add_bos,
            option=option,
        )


@checked_keywords
class WikiText2(Corpus):
    """WikiText-2 raw (arXiv 1609.07843); its documents are the articles.

    Attributes:
        split: train, valid or test.
        join: "raw" for the original file, byte for byte; "gptq" for the hub's rows joined by "\\n\\n", as in the GPTQ
            code: a different text with a different perplexity, hence a name of its own.
    """

    split: Literal["train", "valid", "test"] = "test"
    join: Literal["raw", "gptq"] = "raw"

    def text(self, option: str = "data") -> Text:
        """Load the split; `Text.name` is "wikitext2", with "-gptq" or "-SPLIT" added where not the default."""
        served = fetch(ASSETS[f"wikitext2-{self.split}"], hint=f"{_own_file(option)} needs no network")
        name = "wikitext2" + ("-gptq" if self.join == "gptq" else "")
        name += "" if self.split == "test" else f"-{self.split}"
        articles = wikitext_articles(served.path.read_bytes().decode())
        if self.join == "raw":
            return make_text(name, articles, served.source, joiner="")
        return make_text(name, map(joined_as_gptq, articles), served.source, joiner="\n\n")


@checked_keywords
class HubText(Corpus):
    """The first `documents` rows of a dataset on the Hugging Face hub, downloaded once and kept in the cache.

    Attributes:
        name: name of the corpus; `Text.name` is "NAME-SPLIT".
        repo: id of the dataset on the hub.
        split: split of the dataset.
        config: configuration (subset) of the dataset.
        files: split → the one data file to read, for datasets too large to list.
        revision: branch, tag or commit.
        field: field of a row that holds its text.
        documents: number of rows.
        joiner: string between documents where they are read as one text.
    """

    name: str
    repo: str
    split: str
    config: str | None = None
    files: dict[str, str] | None = None
    revision: str = "main"
    field: str = "text"
    documents: PositiveInt = 4000
    joiner: str = "\n\n"

    def text(self, option: str = "data") -> Text:
        """Load the rows; `Text.name` is "NAME-SPLIT".

        Raises:
            UserError: naming offline choices, where the hub does not answer.
        """
        files = dict(self.files or {})
        if files:
            check_choice(self.split, tuple(files), f"{option}.split")
        rows = HubRows(
            self.repo,
            self.config,
            self.split,
            file=files.get(self.split),
            revision=self.revision,
            field=self.field,
            limit=self.documents,
        )
        name = f"{self.name}-{self.split}"
        bundled = "data=wikitext2" if option == "data" else f"data@{option}=wikitext2"
        served = fetch(hub_asset(name, rows), hint=f"Choose {bundled} or {_own_file(option)} instead")
        return make_text(name, read_jsonl(served.path, self.field, option), served.source, self.joiner)


@checked_keywords
class LocalText(Corpus):
    """A local file of text: .txt (one document) or .jsonl/.parquet (a document per row, in `field`)."""

    path: InputPath | None = None
    field: str = "text"
    joiner: str = "\n\n"

    def text(self, option: str = "data") -> Text:
        """Read the file's documents; `Text.name` is the file's name without its suffix."""
        if self.path is None:
            raise UserError(f"{option}.path is not set: name a .txt, .jsonl or .parquet file")
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"{option}.path={self.path}: there is no such file")
        read = READERS.get(path.suffix.lower())
        if read is None:
            raise UserError(f"{option}.path={self.path}: the suffix must be one of {', '.join(READERS)}")
        text = make_text(path.stem, read(path, self.field, option), str(path), self.joiner)
        if _VISIBLE.search(text.joined) is None:
            raise UserError(f"{option}.path={self.path}: the file holds no text")
        return text


def _own_file(option: str) -> str:
    """The options that choose a local file, for error messages."""
    return "data=local data.path=FILE" if option == "data" else f"{option.removesuffix('.text')}.path=FILE"
