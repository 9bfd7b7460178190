"""Token ids of a text: random rows for calibration, contiguous windows for evaluation.

`calibration_tokens` draws random windows as the GPTQ code does (arXiv 2210.17323), or documents, padded to one length,
with a mask. `evaluation_windows` follows that code's perplexity protocol: the text as one document without special
tokens, split into contiguous windows.

Every error message names the option to change: `option` is its prefix on the command line ("data" for calibration,
"eval.perplexity" for evaluation).
"""

import hashlib
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gptq_awq.data.text import Text, without_surrogates
from gptq_awq.errors import UserError
from gptq_awq.runtime.fingerprint import token_ids_sha256
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.checksummed import ChecksummedFile, once

LONG_TEXT = 200_000
"""Number of characters from which tokenizing takes longer than reading the ids from the cache."""
Tokenizer = Any  # transformers' tokenizer classes share no useful static type


@dataclass(frozen=True)
class TokenSet:
    """Rows of token ids of one length, with their padding mask and hash.

    Attributes:
        name: name of the text.
        ids: token ids, int64.
        mask: True on real tokens; None where nothing is padded.
        source: where the text came from.
        sha256: hash of ids, their shape and mask, so that equal hashes mean equal inputs to the model.
    """

    name: str
    ids: Int[Tensor, "n seqlen"]
    mask: Bool[Tensor, "n seqlen"] | None
    source: str
    sha256: str

    def first(self, windows: int | None) -> "TokenSet":
        """Its first rows, or itself where it has no more of them; None: all."""
        if windows is None or windows >= len(self.ids):
            return self
        mask = None if self.mask is None else self.mask[:windows]
        return make_token_set(self.name, self.ids[:windows], mask, self.source)


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
    """Draw `samples` rows of `seqlen` tokens for calibration; the same seed draws the same rows.

    packing "windows": the joined text is tokenized once, without special tokens, and windows start uniformly
    at random (they may overlap). "documents": documents are drawn without replacement, truncated to `seqlen`
    and padded on the right, padding masked.

    Raises:
        UserError: naming `option`, where the text is too short, or the tokenizer has no chat template or BOS token.
    """
    check_positive(samples, f"{option}.samples")
    check_positive(seqlen, f"{option}.seqlen")
    check_choice(packing, ("windows", "documents"), f"{option}.packing")
    if chat_template:
        _check_chat(tokenizer, packing, add_bos, option)
        text = replace(text, documents=tuple(_as_chat(document, tokenizer, option) for document in text.documents))
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
    """Tokenize a text as one document without BOS; return its first `windows` (None: all) contiguous windows.

    The remainder at the end, shorter than `seqlen`, is dropped, as in the GPTQ code.

    Raises:
        UserError: naming `option`, where the text holds fewer windows.
    """
    check_positive(seqlen, f"{option}.seqlen")
    tokens = _encode_long(text.joined, tokenizer)
    there = len(tokens) // seqlen
    wanted = max(there, 1) if windows is None else check_positive(windows, f"{option}.windows")
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
    """Make a `TokenSet` of these ids and mask, with its hash: windows of another length are other windows."""
    digest = hashlib.sha256(f"{ids.dtype} {tuple(ids.shape)}".encode())
    digest.update(ids.contiguous().numpy().tobytes())
    if mask is not None:
        digest.update(mask.contiguous().numpy().tobytes())
    return TokenSet(name, ids, mask, source, digest.hexdigest())


def within_vocabulary(tokens: TokenSet, size: int, tokenizer: Tokenizer, option: str = "data") -> TokenSet:
    """The tokens as a model with an embedding of `size` rows can read them: padding beyond it becomes id 0.

    Raises:
        UserError: naming `option`, where a token that is not padding has no row.
    """
    beyond = (tokens.ids < 0) | (tokens.ids >= size)
    real = beyond if tokens.mask is None else beyond & tokens.mask
    if real.any():
        first = int(tokens.ids[real][0])
        raise UserError(
            f"{option}: the token {_token(first, tokenizer)} of {tokens.name} is none of the model's {size}: its "
            f"embedding was not resized to this tokenizer, or the tokenizer is another model's"
        )
    if not beyond.any():
        return tokens
    return make_token_set(tokens.name, tokens.ids.masked_fill(beyond, 0), tokens.mask, tokens.source)


def _token(index: int, tokenizer: Tokenizer) -> str:
    """A token's text and id, for error messages."""
    try:
        return f"{tokenizer.convert_ids_to_tokens(index)!r} ({index})"
    except Exception:  # of a tokenizer that doesn't know it either
        return str(index)


def _random_windows(
    text: Text, tokenizer: Tokenizer, samples: int, length: int, generator: torch.Generator, option: str
) -> list[list[int]]:
    """Windows of `length` tokens that start uniformly at random in the joined text."""
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
    """Tokens of random documents, without replacement, truncated to `length`."""
    order = torch.randperm(len(text.documents), generator=generator).tolist()
    encoded = (_encode(text.documents[index], tokenizer)[:length] for index in order)
    rows = list(islice(filter(None, encoded), samples))  # empty documents are passed over
    if len(rows) < samples:
        raise UserError(
            f"too little text for {option}.samples={samples} documents: {text.name} has {len(rows)}: "
            f"lower it, give more text or choose {option}.packing=windows"
        )
    return rows


def _pad(
    rows: list[list[int]], seqlen: int, tokenizer: Tokenizer
) -> tuple[Int[Tensor, "n seqlen"], Bool[Tensor, "n seqlen"] | None]:
    """Pad rows on the right to `seqlen`; the mask is None where nothing was padded."""
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    ids = torch.tensor([row + [pad] * (seqlen - len(row)) for row in rows], dtype=torch.int64)
    mask = torch.arange(seqlen) < torch.tensor([[len(row)] for row in rows])
    return ids, None if mask.all() else mask


def _encode_long(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids without special tokens; those of a long text are kept in the cache."""
    if len(text) < LONG_TEXT or getattr(tokenizer, "backend_tokenizer", None) is None:
        return _encode(text, tokenizer)
    kept = once(
        cache_dir() / "tokens" / f"{token_ids_sha256(text, tokenizer)}.safetensors",
        "tokens of a text",
        lambda: ChecksummedFile({"ids": torch.tensor(_encode(text, tokenizer), dtype=torch.int32)}),
    )
    return kept.tensors["ids"].tolist()


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids without special tokens. verbose=False: the text may be longer than the model's context on purpose."""
    only_ids = {"return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(text, add_special_tokens=False, verbose=False, **only_ids).input_ids


def _check_chat(tokenizer: Tokenizer, packing: str, add_bos: bool, option: str) -> None:
    """Raise UserError where a chat template does not exist or conflicts with the other options."""
    if packing != "documents":
        raise UserError(f"{option}.chat_template=true needs {option}.packing=documents")
    if not tokenizer.chat_template:
        raise UserError(f"{option}.chat_template=true: this model's tokenizer has no chat template")
    if add_bos:
        raise UserError(f"{option}.add_bos=true: a chat template brings its own BOS, drop one of the two")


def _as_chat(document: str, tokenizer: Tokenizer, option: str) -> str:
    """A document as the user's turn of a chat, by the tokenizer's chat template.

    Raises:
        UserError: with the template's own words, where it refuses a user's turn alone or doesn't parse.
    """
    try:
        return without_surrogates(
            tokenizer.apply_chat_template([{"role": "user", "content": document}], tokenize=False)
        )
    except Exception as error:  # templates are programs: they may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{option}.chat_template=true: the tokenizer's chat template makes no chat of a user's turn ({reason}); "
            f"leave it out"
        ) from error


def check_choice(value: str, choices: tuple[str, ...], option: str) -> None:
    """Raise UserError naming `option` unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{option}={value}: choose one of {', '.join(choices)}")


def check_positive(value: int, option: str) -> int:
    """Return `value` if it is a whole number of at least 1; otherwise raise UserError naming `option`."""
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{option}={value}: must be a whole number of at least 1")
    return value
