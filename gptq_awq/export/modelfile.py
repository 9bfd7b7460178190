"""Render an Ollama Modelfile for a GGUF file: template, system message, sampling, and where an answer stops."""

import json
import logging
from typing import Any

from transformers import GenerationConfig

log = logging.getLogger(__name__)

_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
"""Options of generation_config.json → Ollama's parameters, of models that sample by default."""


def modelfile(gguf_name: str, tokenizer: Any, generation: GenerationConfig | None = None) -> str:
    """Render an Ollama Modelfile for a GGUF file in the same folder.

    It has a TEMPLATE where that is certain: without a chat template (the prompt unchanged), or with one that renders
    conversations as ChatML. Otherwise Ollama reads the chat template in the GGUF file itself; also where the default
    system message has three quotes, which a Modelfile can't hold: they end the message, and commands may follow.
    """
    lines = [f"FROM ./{gguf_name}"]
    stops = _stops(tokenizer, generation)
    system = _default_system(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif _is_chatml(tokenizer) and '"""' not in (system or ""):
        lines.append(f'TEMPLATE """{_CHATML}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
        stops = [*dict.fromkeys([*stops, "<|im_end|>"])]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER {name} {value:g}" for name, value in _sampling(generation).items()]
    return "\n".join(lines) + "\n"


def _stops(tokenizer: Any, generation: GenerationConfig | None) -> list[str]:
    """Tokens that end an answer: the tokenizer's, and those of generation_config.json (Llama 3 has three)."""
    ids = getattr(generation, "eos_token_id", None)
    ids = [ids] if isinstance(ids, int) else ids or []
    more = tokenizer.convert_ids_to_tokens([each for each in ids if each < len(tokenizer)])
    return list(dict.fromkeys(stop for stop in (tokenizer.eos_token, *more) if stop))


def _sampling(generation: GenerationConfig | None) -> dict[str, float]:
    """Ollama's parameters of how tokens are drawn, where the model's own settings say so."""
    if generation is None:
        return {}
    own = SAMPLING if generation.do_sample else {}
    found = {theirs: getattr(generation, name) for name, theirs in own.items()}
    penalty = generation.repetition_penalty
    found |= {"repeat_penalty": penalty} if penalty not in (None, 1) else {}
    return {name: value for name, value in found.items() if value is not None}


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
