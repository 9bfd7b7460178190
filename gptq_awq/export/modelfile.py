"""Render an Ollama Modelfile for a GGUF file: template, system message and where an answer stops."""

import json
import logging
from typing import Any

log = logging.getLogger(__name__)

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
