"""A transformers tokenizer as a GGUF file's `tokenizer.*` fields, and as an Ollama Modelfile.

llama.cpp carries two tokenizers that fast tokenizers of language models are instances of:

    gpt2    byte-level BPE; which regex splits the text first is named by `tokenizer.ggml.pre`
    llama   SentencePiece's BPE with byte fallback: merge the adjacent pair whose union scores highest

Which of them a tokenizer is, and which regex, is read off its `tokenizer.json`. What llama.cpp has no name for
is refused: a file that tokenizes differently from the model that was scored would be worse than none.
Differences that remain, all llama.cpp's: it never normalizes (NFC in Qwen2); its gpt-4o and tekken cut words at
combining marks; its `llama` always puts a space before the text, and after a special token, where transformers'
newer Metaspace leaves a text alone that begins with one.
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
"""What a tokenizer.json does before it merges, and whether whole words skip merging → `tokenizer.ggml.pre`."""


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF stores of a tokenizer.

    Attributes:
        model: "gpt2" or "llama".
        pre: the pre-tokenizer's name, "default" for llama.
        tokens, types: one for each row of the embedding; rows without a token are [PAD…], unused.
        merges: of gpt2, "left right", best first.
        scores: of llama, one for each token.
        special: bos, eos, unknown, padding → id, those that exist.
        add_bos, add_eos: whether a text is wrapped in them.
        add_space_prefix: whether a space goes before the text; None for gpt2, which has no choice.
        chat_template: Jinja, or several by name.
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
        """Add the `tokenizer.*` fields."""
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
    """The GGUF fields of a fast tokenizer; called early, the check that there are such fields.

    Args:
        tokenizer: a transformers fast tokenizer.
        rows: of the embedding; None: as many as there are tokens.
        pre: name of llama.cpp's pre-tokenizer, for a byte-level BPE that is not recognized.

    Raises:
        UserError: a tokenizer that llama.cpp cannot reproduce, or with more tokens than `rows`.
    """
    content = _content(tokenizer)
    model = content["model"]
    if model["type"] != "BPE":
        raise _unfit(f"a {model['type']} tokenizer")
    ids = model["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    size = 1 + max(ids.values())
    if rows is not None and size > rows:
        raise _unfit(f"a tokenizer of {size} tokens for an embedding of {rows} rows")
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    is_llama = bool(model.get("byte_fallback"))
    tokens, types = _tokens(content, ids, rows or size)
    if is_llama and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    add_bos, add_eos = _wrapped(tokenizer)
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


def _unfit(what: str, hint: str = "") -> UserError:
    return UserError(f"export.formats: gguf cannot hold {what}{hint or '; choose another format, such as hf'}")


def _content(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json, as it is in memory."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unfit(f"{type(tokenizer).__name__}, which is not a fast tokenizer (one with a tokenizer.json)")
    return json.loads(backend.to_str())


def _tokens(content: dict[str, Any], ids: dict[str, int], rows: int) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [TokenType.UNUSED] * rows
    for text, i in ids.items():
        tokens[i], types[i] = text, TokenType.NORMAL
    if content["model"].get("byte_fallback"):
        for byte in range(256):
            if (i := ids.get(f"<0x{byte:02X}>")) is None:
                raise _unfit("a SentencePiece tokenizer without a token for each byte")
            types[i] = TokenType.BYTE
    for token in content["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return tokens, types


def _special(tokenizer: Any) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {name: getattr(tokenizer, f"{short}_token_id") for name, short in names.items()}
    return {name: token for name, token in found.items() if token is not None}


def _wrapped(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets bos before and eos after it; seen on one."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    full = tokenizer("a")["input_ids"]
    for before in ([], bos):
        for after in ([], eos):
            if full == [*before, *plain, *after]:
                return bool(before), bool(after)
    raise _unfit("a tokenizer that adds other special tokens than bos and eos to a text")


def _pre_tokenizer(content: dict[str, Any]) -> str:
    normalizer = content["normalizer"]
    if normalizer and normalizer["type"] != "NFC":
        raise _unfit(f"a byte-level tokenizer with a {normalizer['type']} normalizer")
    steps = tuple(_steps(content["pre_tokenizer"]))
    name = PRE_TOKENIZERS.get((steps, bool(content["model"].get("ignore_merges"))))
    if name is None:
        names = ", ".join(sorted(set(PRE_TOKENIZERS.values())))
        log.debug("no tokenizer.ggml.pre for %s", steps)
        raise _unfit(
            "this tokenizer's way of splitting text into words",
            f": recognized are {names}; set export.gguf.pre to llama.cpp's name for it if you know it",
        )
    return name


def _steps(pre: dict[str, Any] | None) -> Iterator[str]:
    """A pre-tokenizer, as the steps that matter for where text is split."""
    match pre:
        case {"type": "Sequence", "pretokenizers": parts}:
            for part in parts:
                yield from _steps(part)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            yield "bytes of words" if pre.get("use_regex", True) else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            yield "digits"
        # Both cut out each match, where the regex matches everything.
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            yield f"split {regex}"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
            yield f"split {regex}"
        case _:
            yield f"unknown {json.dumps(pre)}"


def _space_prefix(content: dict[str, Any]) -> bool:
    """Whether SentencePiece's dummy prefix is on; in either of the two ways tokenizer.json spells it."""
    normalizer, pre = content["normalizer"], content["pre_tokenizer"]
    steps = (normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]) if normalizer else []
    replaces = [s for s in steps if s["type"] == "Replace" and (s["pattern"], s["content"]) == ({"String": " "}, SPACE)]
    prepends = [s for s in steps if s["type"] == "Prepend" and s["prepend"] == SPACE]
    if len(replaces) + len(prepends) == len(steps):
        # Gemma splits at spaces too, but none are left.
        if replaces and (pre is None or (pre["type"] == "Split" and pre["pattern"] == {"String": " "})):
            return bool(prepends)
        if not steps and pre and pre["type"] == "Metaspace" and pre["replacement"] == SPACE and not pre["split"]:
            return pre["prepend_scheme"] != "never"
    raise _unfit("a SentencePiece tokenizer that treats spaces in a way of its own")


def _scores(tokens: list[str], types: list[TokenType], merges: list[tuple[str, ...]]) -> list[float]:
    """Minus the rank of the first merge that makes a token, as SentencePiece numbers its pieces.

    By scores, pairs with the same union rank equal and *all* pairs of tokens whose union is a token may merge.
    A tokenizer.json that came from SentencePiece has just those merges; a warning tells of one that doesn't.
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
    missing = sum(pair not in known for token in normal for pair in _halves(token, normal))
    if out_of_order or missing:
        log.warning(
            "export.formats: gguf ranks merges by token; %d merges out of that order, %d not in the tokenizer: "
            "llama.cpp may tokenize rare words differently",
            out_of_order,
            missing,
        )
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _halves(token: str, known: set[str]) -> Iterator[tuple[str, str]]:
    for i in range(1, len(token)):
        if token[:i] in known and token[i:] in known:
            yield token[:i], token[i:]


_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile(gguf_name: str, tokenizer: Any) -> str:
    """An Ollama Modelfile for a GGUF file in the same folder.

    The TEMPLATE is written where it is certain: no chat template (the prompt as it is), or one that renders
    conversations as ChatML. Otherwise Ollama reads the chat template in the GGUF file itself.
    """
    lines = [f"FROM ./{gguf_name}"]
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    if not getattr(tokenizer, "chat_template", None):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif _is_chatml(tokenizer):
        lines.append(f'TEMPLATE """{_CHATML}"""')
        if system := _default_system(tokenizer):
            lines.append(f'SYSTEM """{system}"""')
        stops = [*dict.fromkeys([*stops, "<|im_end|>"])]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _is_chatml(tokenizer: Any) -> bool:
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Why?")]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return _rendered(tokenizer, turns) == text + "<|im_start|>assistant\n"


def _default_system(tokenizer: Any) -> str | None:
    """The system message that the template supplies where the conversation has none."""
    text = _rendered(tokenizer, [("user", "Hi")])
    before, after = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    if text and text.startswith(before) and text.endswith(after):
        return text.removeprefix(before).removesuffix(after)
    return None


def _rendered(tokenizer: Any, turns: list[tuple[str, str]]) -> str | None:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it may raise anything, on system messages for one
        log.debug("the chat template does not render: %s", error)
        return None
