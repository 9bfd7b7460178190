"""Convert a transformers tokenizer to a GGUF file's `tokenizer.*` fields and to an Ollama Modelfile.

llama.cpp implements two tokenizers that cover the fast tokenizers of most language models:

    gpt2    byte-level BPE; `tokenizer.ggml.pre` names the regex that splits text into words first
    llama   SentencePiece's BPE with byte fallback: merges the adjacent pair whose union has the highest score

The kind of tokenizer and its regex are recognized by the content of its `tokenizer.json`. Tokenizers that llama.cpp
can't reproduce are refused, as a file that tokenizes differently from the scored model would be worse than none.
Known differences in llama.cpp remain: it never normalizes (NFC in Qwen2); its gpt-4o and tekken split words at
combining marks; its `llama` always inserts a space before the text and after special tokens, where transformers'
newer Metaspace leaves a text that starts with a special token unchanged.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from gptq_awq.errors import UserError

log = logging.getLogger(__name__)

SPACE = "▁"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
_GPT4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
    rf"\p{{N}}{{1,3}}|{_REST_SLASH}"
)
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}"

PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes of words",), False): "gpt-2",
    (("digits", "bytes of words"), False): "smollm",
    ((f"split {_LLAMA3}", "bytes"), True): "llama-bpe",
    ((f"split {_LLAMA3}", "bytes"), False): "smaug-bpe",
    ((f"split {_QWEN2}", "bytes"), False): "qwen2",
    ((f"split {_QWEN35}", "bytes"), False): "qwen35",
    ((f"split {_GPT4O}", "bytes"), False): "gpt-4o",
    ((f"split {_TEKKEN}", "bytes"), True): "tekken",
}
"""(pre-tokenizer steps, whether known whole words skip merging) → name for `tokenizer.ggml.pre`."""


@dataclass(frozen=True)
class Vocabulary:
    """Content of the `tokenizer.*` fields of a GGUF file.

    Attributes:
        model: kind of tokenizer, "gpt2" or "llama".
        pre: name of the pre-tokenizer, "default" for llama.
        tokens, types: text and type per row of the embedding; rows without a token are [PAD…] of type UNUSED.
        merges: merges of gpt2 as "left right", in order of priority; empty for llama.
        scores: score per token of llama; empty for gpt2.
        special: bos, eos, unknown, padding → token id, for those that the tokenizer has.
        add_bos, add_eos: whether bos is put before a text, and eos after it.
        add_space_prefix: whether a space is put before a text; None for gpt2, which has no such option.
        chat_template: Jinja chat template, or name → template; None for none.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str | dict[str, str] | None

    def write(self, writer: GGUFWriter) -> None:
        """Add the `tokenizer.*` fields to a GGUF file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
        else:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if isinstance(self.chat_template, dict):
            named = [{"name": name, "template": template} for name, template in self.chat_template.items()]
            writer.add_chat_template(named)
        elif self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: Any, rows: int | None = None, pre: str | None = None) -> Vocabulary:
    """Convert a fast tokenizer to GGUF's fields; export also calls it early, to check that llama.cpp can reproduce it.

    Args:
        tokenizer: transformers fast tokenizer.
        rows: number of rows of the embedding; None for the number of tokens.
        pre: llama.cpp's name of the pre-tokenizer of a byte-level BPE; None recognizes it by its content.

    Raises:
        UserError: a tokenizer that llama.cpp can't reproduce, or one with more tokens than `rows`.
    """
    content = _content(tokenizer)
    model = content["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"a {model['type']} tokenizer")
    ids = model["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    size = 1 + max(ids.values())
    if rows is not None and size > rows:
        raise _unsupported(f"a tokenizer of {size} tokens for an embedding of {rows} rows")
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    is_llama = bool(model.get("byte_fallback"))
    tokens, types = _tokens(content, ids, rows or size)
    if is_llama and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    add_bos, add_eos = _added_bos_eos(tokenizer)
    return Vocabulary(
        model="llama" if is_llama else "gpt2",
        pre="default" if is_llama else pre or _pre_tokenizer(content),
        tokens=tokens,
        types=types,
        merges=[] if is_llama else [" ".join(merge) for merge in merges],
        scores=_scores(tokens, types, merges) if is_llama else [],
        special=_special(tokenizer),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=_space_prefix(content) if is_llama else None,
        chat_template=getattr(tokenizer, "chat_template", None),
    )


def _unsupported(what: str, hint: str = "") -> UserError:
    return UserError(f"export.formats: gguf cannot hold {what}{hint or '; choose another format, such as hf'}")


def _content(tokenizer: Any) -> dict[str, Any]:
    """Parse the tokenizer.json that the tokenizer holds in memory. Raises UserError for slow tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported(f"{type(tokenizer).__name__}, which is not a fast tokenizer (one with a tokenizer.json)")
    return json.loads(backend.to_str())


def _tokens(content: dict[str, Any], ids: dict[str, int], rows: int) -> tuple[list[str], list[TokenType]]:
    """Text and type of the token of each embedding row; rows without a token are unused padding."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [TokenType.UNUSED] * rows
    for text, i in ids.items():
        tokens[i], types[i] = text, TokenType.NORMAL
    if content["model"].get("byte_fallback"):
        for byte in range(256):
            if (i := ids.get(f"<0x{byte:02X}>")) is None:
                raise _unsupported("a SentencePiece tokenizer without a token for each byte")
            types[i] = TokenType.BYTE
    for token in content["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return tokens, types


def _special(tokenizer: Any) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {name: getattr(tokenizer, f"{short}_token_id") for name, short in names.items()}
    return {name: token for name, token in found.items() if token is not None}


def _added_bos_eos(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text and eos after it, as observed on an example."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    full = tokenizer("a")["input_ids"]
    for before in ([], bos):
        for after in ([], eos):
            if full == [*before, *plain, *after]:
                return bool(before), bool(after)
    raise _unsupported("a tokenizer that adds other special tokens than bos and eos to a text")


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level BPE's pre-tokenizer. Raises UserError if it has none."""
    normalizer = content["normalizer"]
    if normalizer and normalizer["type"] != "NFC":
        raise _unsupported(f"a byte-level tokenizer with a {normalizer['type']} normalizer")
    steps = tuple(_steps(content["pre_tokenizer"]))
    name = PRE_TOKENIZERS.get((steps, bool(content["model"].get("ignore_merges"))))
    if name is None:
        names = ", ".join(sorted(set(PRE_TOKENIZERS.values())))
        log.debug("no tokenizer.ggml.pre for %s", steps)
        raise _unsupported(
            "this tokenizer's way of splitting text into words",
            f": recognized are {names}; set export.gguf.pre to llama.cpp's name for it if you know it",
        )
    return name


def _steps(pre: dict[str, Any] | None) -> Iterator[str]:
    """Steps of a pre-tokenizer, reduced to what decides where text is split."""
    match pre:
        case {"type": "Sequence", "pretokenizers": parts}:
            for part in parts:
                yield from _steps(part)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            yield "bytes of words" if pre.get("use_regex", True) else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            yield "digits"
        # Both behaviors split off each match, given a regex that matches all of a text.
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            yield f"split {regex}"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
            yield f"split {regex}"
        case _:
            yield f"unknown {json.dumps(pre)}"


def _space_prefix(content: dict[str, Any]) -> bool:
    """Whether SentencePiece's dummy prefix is on, in either of its two encodings in tokenizer.json."""
    normalizer, pre = content["normalizer"], content["pre_tokenizer"]
    steps = (normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]) if normalizer else []
    replaces = [s for s in steps if s["type"] == "Replace" and (s["pattern"], s["content"]) == ({"String": " "}, SPACE)]
    prepends = [s for s in steps if s["type"] == "Prepend" and s["prepend"] == SPACE]
    if len(replaces) + len(prepends) == len(steps):
        # Gemma also splits at spaces, but the normalizer has replaced them all.
        if replaces and (pre is None or (pre["type"] == "Split" and pre["pattern"] == {"String": " "})):
            return bool(prepends)
        if not steps and pre and pre["type"] == "Metaspace" and pre["replacement"] == SPACE and not pre["split"]:
            return pre["prepend_scheme"] != "never"
    raise _unsupported("a SentencePiece tokenizer that treats spaces in a way of its own")


def _scores(tokens: list[str], types: list[TokenType], merges: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece scores of all tokens: minus the rank of the first merge that produces a token.

    With scores, pairs with the same union have equal priority, and *every* pair of tokens whose union is a token may
    merge. A tokenizer.json converted from SentencePiece has exactly these merges; a warning reports any deviation.
    """
    rank: dict[str, int] = {}
    out_of_order = 0
    previous = ""
    for i, (left, right) in enumerate(merges):
        union = left + right
        out_of_order += union in rank and union != previous
        rank.setdefault(union, i)
        previous = union
    known, normal = set(merges), {t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    missing = sum(pair not in known for token in normal for pair in _splits(token, normal))
    if out_of_order or missing:
        log.warning(
            "export.formats: gguf ranks merges by token; %d merges out of that order, %d not in the tokenizer: "
            "llama.cpp may tokenize rare words differently",
            out_of_order,
            missing,
        )
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _splits(token: str, known: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs of known tokens that concatenate to `token`."""
    for i in range(1, len(token)):
        if token[:i] in known and token[i:] in known:
            yield token[:i], token[i:]


_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile(gguf_name: str, tokenizer: Any) -> str:
    """Render an Ollama Modelfile for a GGUF file in the same folder.

    It has a TEMPLATE where that is certain: without a chat template (the prompt unchanged), or with one that renders
    conversations as ChatML. Otherwise Ollama reads the chat template in the GGUF file itself; also where the default
    system message has three quotes, which a Modelfile can't hold: they end the message, and commands may follow.
    """
    lines = [f"FROM ./{gguf_name}"]
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    system = _default_system(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif _is_chatml(tokenizer) and '"""' not in (system or ""):
        lines.append(f'TEMPLATE """{_CHATML}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
        stops = [*dict.fromkeys([*stops, "<|im_end|>"])]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _is_chatml(tokenizer: Any) -> bool:
    """Whether the chat template renders an example conversation as ChatML."""
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Why?")]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return _rendered(tokenizer, turns) == text + "<|im_start|>assistant\n"


def _default_system(tokenizer: Any) -> str | None:
    """System message that the chat template supplies for a conversation without one; None if it adds none."""
    text = _rendered(tokenizer, [("user", "Hi")])
    before, after = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    if text and text.startswith(before) and text.endswith(after):
        return text.removeprefix(before).removesuffix(after)
    return None


def _rendered(tokenizer: Any, turns: list[tuple[str, str]]) -> str | None:
    """Conversation of (role, content) turns as the chat template renders it; None where it fails."""
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs and may raise anything, for example on system messages
        log.debug("the chat template does not render: %s", error)
        return None
