"""Token ids: drawn from a text for calibration, cut into windows for evaluation.

`calibration_tokens` draws random windows as the GPTQ code does (arXiv 2210.17323), or documents, padded to one length,
with a mask. `evaluation_windows` is that code's perplexity protocol: the text as one document without special tokens,
cut into contiguous windows.

Every message names the option to change: `option` is its prefix on the command line ("data" for calibration,
"eval.perplexity" for evaluation).
"""

import hashlib
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import tokenizers
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gptq_awq.data.text import Text
from gptq_awq.errors import UserError
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.checksummed import ChecksummedFile, once

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
    check_positive(samples, f"{option}.samples")
    check_positive(seqlen, f"{option}.seqlen")
    check_choice(packing, ("windows", "documents"), f"{option}.packing")
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
        lambda: ChecksummedFile({"ids": torch.tensor(_encode(text, tokenizer), dtype=torch.int32)}),
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


def check_choice(value: str, choices: tuple[str, ...], option: str) -> None:
    """Raise UserError naming `option` unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{option}={value}: choose one of {', '.join(choices)}")


def check_positive(value: int, option: str) -> int:
    """`value`, a whole number of at least 1; otherwise raise UserError naming `option`."""
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{option}={value}: must be a whole number of at least 1")
    return value
