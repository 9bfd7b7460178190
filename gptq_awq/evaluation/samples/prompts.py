"""Prompts: texts to go on from, read from a file, and spoken in the model's chat template where it has one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from gptq_awq.data.text import read_jsonl, read_plain, without_surrogates
from gptq_awq.errors import UserError

FIELD = "prompt"
"""Field of a JSON lines file that holds the prompts."""


@dataclass(frozen=True)
class Prompt:
    """A text to go on from.

    Attributes:
        text: as the user wrote it.
        chat: whether it is a user's turn, which a tokenizer's chat template wraps; without a template it is plain text.
    """

    text: str
    chat: bool = True

    def encode(self, tokenizer: Any) -> Int[Tensor, "1 tokens"]:
        """Token ids, in the chat template where there is one and it is wanted.

        Raises:
            UserError: the template refuses the turn, or there is no token to go on from.
        """
        if self.chat and getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": self.text}]
            try:
                text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # templates are programs of their own
                why = " ".join(str(error).split())
                raise UserError(f"the tokenizer's chat template makes no chat of the prompt ({why:.200})") from error
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(self.text)["input_ids"]
        if not ids:
            raise UserError(f"the prompt {self.text!r:.60} has no tokens")
        return torch.tensor([ids])


def read_prompts(path: Path, option: str, chat: bool = True) -> tuple[Prompt, ...]:
    """Read prompts from a file: .jsonl with a field `prompt`, or else a prompt per line; blank lines are left out.

    Args:
        path: of the file.
        option: that named it, for errors.
        chat: whether prompts are a user's turns of a chat.

    Raises:
        UserError: naming the option and the line, where the file can't be read or holds none.
    """
    try:
        if path.suffix.lower() == ".jsonl":
            texts: Sequence[str] = read_jsonl(path, FIELD, option)
        else:
            texts = read_plain(path, FIELD, option)[0].splitlines()
    except OSError as error:
        raise UserError(f"{option}={path}: cannot be read ({error.strerror})") from error
    prompts = tuple(Prompt(without_surrogates(text.strip()), chat) for text in texts if text.strip())
    if not prompts:
        raise UserError(f"{option}={path}: holds no prompt; write one a line, or rows of JSON with a field {FIELD}")
    return prompts
