"""Text, and the tokens made of it for calibration and evaluation.

A corpus (`WikiText2`, `HubText`, `LocalText`) knows where text comes from and, in the fields of `Corpus`, how
calibration draws from it. `calibration_tokens` draws random windows as the GPTQ code does (arXiv 2210.17323),
or documents, padded to one length, with a mask. `evaluation_windows` is that code's perplexity protocol: the
text as one document without special tokens, cut into contiguous windows.

Every message names the option to change: `option` is its prefix on the command line ("data" for calibration,
"eval.perplexity" for evaluation).
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.storage.assets import ASSETS, HubRows, cache_dir, fetch, hub_asset
from gptq_awq.storage.checksummed import Sealed, once
from gptq_awq.text import READERS, Text, joined_as_gptq, make_text, read_jsonl, wikitext_articles

LONG_TEXT = 200_000
"""Characters from which on tokenizing takes longer than reading the ids from the cache."""
TOKENS_SCHEMA = 1
"""Raised whenever the meaning of what is kept changes."""
Tokenizer = Any  # transformers' tokenizer classes share no useful static type


@dataclass(frozen=True)
class TokenSet:
    """Rows of token ids of one length; `mask` is True on real tokens, None where nothing is padded.

    `sha256` hashes the ids (int64) and the mask, so equal hashes mean equal input to the model.
    """

    name: str
    ids: Int[Tensor, "n seqlen"]
    mask: Bool[Tensor, "n seqlen"] | None
    source: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """A source of text, and how calibration draws `samples` rows of `seqlen` tokens from it.

    packing: "windows" (random windows of the joined text) or "documents" (one row each, padded, masked).
    chat_template: make each document a user's turn of a chat. add_bos: begin each row with the BOS token.
    """

    samples: int = 32
    seqlen: int = 512
    packing: str = "windows"
    chat_template: bool = False
    add_bos: bool = False

    @abstractmethod
    def text(self, option: str = "data") -> Text:
        """The text. Raises UserError naming `option`."""

    def tokens(self, tokenizer: Tokenizer, seed: int, option: str = "data") -> TokenSet:
        """Calibration tokens, drawn with `seed`. Raises UserError naming `option`."""
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


# ---------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True, kw_only=True)
class WikiText2(Corpus):
    """WikiText-2 raw (arXiv 1609.07843); its documents are the articles.

    split: train, valid or test. join "raw": the original file, byte for byte. "gptq": "\\n\\n" between the
    hub's rows, as the GPTQ code has it: another text with another perplexity, hence another name.
    """

    split: str = "test"
    join: str = "raw"

    def text(self, option: str = "data") -> Text:
        """The split; `Text.name` is "wikitext2", with "-gptq" or "-SPLIT" added off the beaten path."""
        _choice(self.split, ("train", "valid", "test"), f"{option}.split")
        _choice(self.join, ("raw", "gptq"), f"{option}.join")
        served = fetch(ASSETS[f"wikitext2-{self.split}"], hint=f"{_own_file(option)} needs no network")
        name = "wikitext2" + ("-gptq" if self.join == "gptq" else "")
        name += "" if self.split == "test" else f"-{self.split}"
        articles = wikitext_articles(served.path.read_bytes().decode())
        if self.join == "raw":
            return make_text(name, articles, served.source, joiner="")
        return make_text(name, map(joined_as_gptq, articles), served.source, joiner="\n\n")


@dataclass(frozen=True, kw_only=True)
class HubText(Corpus):
    """The first `documents` rows of a dataset on the Hugging Face hub, downloaded once and kept in the cache.

    files: for datasets too large to list, the one data file to read for each split.
    """

    name: str
    repo: str
    split: str
    config: str | None = None
    files: dict[str, str] | None = None
    revision: str = "main"
    field: str = "text"
    documents: int = 4000
    joiner: str = "\n\n"

    def text(self, option: str = "data") -> Text:
        """The rows; `Text.name` is "NAME-SPLIT". UserError names offline choices when the hub is away."""
        files = dict(self.files or {})
        if files:
            _choice(self.split, tuple(files), f"{option}.split")
        rows = HubRows(
            self.repo,
            self.config,
            self.split,
            file=files.get(self.split),
            revision=self.revision,
            field=self.field,
            limit=_positive(self.documents, f"{option}.documents"),
        )
        name = f"{self.name}-{self.split}"
        bundled = "data=wikitext2" if option == "data" else f"data@{option}=wikitext2"
        served = fetch(hub_asset(name, rows), hint=f"Choose {bundled} or {_own_file(option)} instead")
        return make_text(name, read_jsonl(served.path, self.field, option), served.source, self.joiner)


@dataclass(frozen=True, kw_only=True)
class LocalText(Corpus):
    """A file of one's own: .txt (one document) or .jsonl/.parquet (a document per row, in `field`)."""

    path: str | None = None
    field: str = "text"
    joiner: str = "\n\n"

    def text(self, option: str = "data") -> Text:
        """The file's documents; `Text.name` is the file's name without its suffix."""
        if self.path is None:
            raise UserError(f"{option}.path is not set: name a .txt, .jsonl or .parquet file")
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"{option}.path={self.path}: there is no such file")
        read = READERS.get(path.suffix.lower())
        if read is None:
            raise UserError(f"{option}.path={self.path}: the suffix must be one of {', '.join(READERS)}")
        text = make_text(path.stem, read(path, self.field, option), str(path), self.joiner)
        if not text.joined.strip():
            raise UserError(f"{option}.path={self.path}: the file holds no text")
        return text


# ----------------------------------------------------------------------------------------------------- tokens


def calibration_tokens(
    text: Text,
    tokenizer: Tokenizer,
    samples: int,
    seqlen: int,
    seed: int,
    packing: str = "windows",
    chat_template: bool = False,
    add_bos: bool = False,
    option: str = "data",
) -> TokenSet:
    """Draw `samples` rows of `seqlen` tokens; the same seed draws the same rows.

    packing "windows": the joined text is tokenized once, without special tokens, and windows start uniformly
    at random (they may overlap). "documents": documents are drawn without replacement, truncated to `seqlen`
    and padded on the right, padding masked.

    Raises UserError naming `option` where the text is too short, or the tokenizer lacks what is asked of it.
    """
    _positive(samples, f"{option}.samples")
    _positive(seqlen, f"{option}.seqlen")
    _choice(packing, ("windows", "documents"), f"{option}.packing")
    if chat_template:
        _check_chat(tokenizer, packing, add_bos, option)
        text = replace(text, documents=tuple(_as_chat(document, tokenizer) for document in text.documents))
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError(f"{option}.add_bos=true: this model's tokenizer has no BOS token")
    bos = [tokenizer.bos_token_id] if add_bos else []
    generator = torch.Generator().manual_seed(seed)
    draw = _random_windows if packing == "windows" else _random_documents
    drawn = draw(text, tokenizer, samples, seqlen - len(bos), generator, option)
    ids, mask = _pad([bos + row for row in drawn], seqlen, tokenizer)
    return make_token_set(text.name, ids, mask, text.source)


def evaluation_windows(
    text: Text, tokenizer: Tokenizer, seqlen: int, windows: int | None = None, option: str = "eval.perplexity"
) -> TokenSet:
    """The first `windows` (None: all) contiguous windows of the text, tokenized as one document without BOS.

    What is left at the end, shorter than `seqlen`, is dropped, as in the GPTQ code. Raises UserError naming
    `option` where the text holds fewer windows.
    """
    _positive(seqlen, f"{option}.seqlen")
    tokens = _encode_long(text.joined, tokenizer)
    there = len(tokens) // seqlen
    wanted = max(there, 1) if windows is None else _positive(windows, f"{option}.windows")
    if there < wanted:
        raise UserError(
            f"too little text for {option}.windows={wanted} of {option}.seqlen={seqlen} tokens: "
            f"{text.name} has {len(tokens)} tokens, {there} windows: lower one of them or give more text"
        )
    ids = torch.tensor(tokens[: wanted * seqlen], dtype=torch.int64).view(wanted, seqlen)
    return make_token_set(text.name, ids, None, text.source)


def make_token_set(
    name: str, ids: Int[Tensor, "n seqlen"], mask: Bool[Tensor, "n seqlen"] | None, source: str
) -> TokenSet:
    """A `TokenSet`, hashed."""
    digest = hashlib.sha256(ids.contiguous().numpy().tobytes())
    if mask is not None:
        digest.update(mask.numpy().tobytes())
    return TokenSet(name, ids, mask, source, digest.hexdigest())


def _random_windows(
    text: Text, tokenizer: Tokenizer, samples: int, length: int, generator: torch.Generator, option: str
) -> list[list[int]]:
    ids = _encode_long(text.joined, tokenizer)
    if len(ids) < samples * length:
        raise UserError(
            f"too little text for {option}.samples={samples} windows of {option}.seqlen={length} tokens: "
            f"{text.name} has {len(ids)} tokens, not {samples * length}: lower one of them or give more text"
        )
    starts = torch.randint(0, len(ids) - length + 1, (samples,), generator=generator).tolist()
    return [ids[start : start + length] for start in starts]


def _random_documents(
    text: Text, tokenizer: Tokenizer, samples: int, length: int, generator: torch.Generator, option: str
) -> list[list[int]]:
    order = torch.randperm(len(text.documents), generator=generator).tolist()
    encoded = (_encode(text.documents[index], tokenizer)[:length] for index in order)
    rows = list(islice(filter(None, encoded), samples))  # an empty document says nothing: take the next one
    if len(rows) < samples:
        raise UserError(
            f"too little text for {option}.samples={samples} documents: {text.name} has {len(rows)}: "
            f"lower it, give more text or choose {option}.packing=windows"
        )
    return rows


def _pad(
    rows: list[list[int]], seqlen: int, tokenizer: Tokenizer
) -> tuple[Int[Tensor, "n seqlen"], Bool[Tensor, "n seqlen"] | None]:
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    ids = torch.tensor([row + [pad] * (seqlen - len(row)) for row in rows], dtype=torch.int64)
    mask = torch.arange(seqlen) < torch.tensor([[len(row)] for row in rows])
    return ids, None if mask.all() else mask


def _encode_long(text: str, tokenizer: Tokenizer) -> list[int]:
    """As `_encode`; the ids of a long text are kept in the cache."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if len(text) < LONG_TEXT or backend is None:
        return _encode(text, tokenizer)
    digest = hashlib.sha256(f"{TOKENS_SCHEMA} {tokenizers.__version__} {backend.to_str()}".encode())
    digest.update(hashlib.sha256(text.encode()).digest())
    kept = once(
        cache_dir() / "tokens" / f"{digest.hexdigest()}.safetensors",
        "tokens of a text",
        lambda: Sealed({"ids": torch.tensor(_encode(text, tokenizer), dtype=torch.int32)}),
    )
    return kept.tensors["ids"].tolist()


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids without special tokens. verbose=False: a long text is meant, and needs no warning."""
    only_ids = {"return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(text, add_special_tokens=False, verbose=False, **only_ids).input_ids


def _check_chat(tokenizer: Tokenizer, packing: str, add_bos: bool, option: str) -> None:
    if packing != "documents":
        raise UserError(f"{option}.chat_template=true needs {option}.packing=documents")
    if not tokenizer.chat_template:
        raise UserError(f"{option}.chat_template=true: this model's tokenizer has no chat template")
    if add_bos:
        raise UserError(f"{option}.add_bos=true: a chat template brings its own BOS, drop one of the two")


def _as_chat(document: str, tokenizer: Tokenizer) -> str:
    return tokenizer.apply_chat_template([{"role": "user", "content": document}], tokenize=False)


def _own_file(option: str) -> str:
    return "data=local data.path=FILE" if option == "data" else f"{option.removesuffix('.text')}.path=FILE"


def _choice(value: str, choices: tuple[str, ...], option: str) -> None:
    if value not in choices:
        raise UserError(f"{option}={value}: choose one of {', '.join(choices)}")


def _positive(value: int, option: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{option}={value}: must be a whole number of at least 1")
    return value
