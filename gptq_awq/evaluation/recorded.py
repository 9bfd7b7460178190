"""Cache of lm-eval answers: a language model that looks up each request before it is computed."""

import hashlib
import json
from collections import Counter
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM


class RecordedLM(LM):
    """Answers lm-eval requests from `answers`; missing ones are computed by `lm` and added.

    A request is identified by its content (kind, prompt, continuation or generation options), so a change of a task's
    prompts is a change of its keys, and runs of one task with two limits share their answers.
    """

    def __init__(self, lm: LM, answers: dict[str, Any]) -> None:
        super().__init__()
        self._lm = lm
        self._answers = answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether greedy decoding would produce it."""
        return [(logprob, greedy) for logprob, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log probability of each text."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generated text of each context, up to the first stop string."""
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: list[Instance]) -> list[Any]:
        """Answers to `requests` in their order, with the missing ones computed in one call."""
        # A task may repeat a request to sample several answers, so the repetition is part of the key.
        times: Counter[str] = Counter()
        keys = []
        for request in requests:
            content = request_sha256(kind, request.args)
            keys.append(f"{content}-{times[content]}")
            times[content] += 1
        unknown = {k: request for k, request in zip(keys, requests, strict=True) if k not in self._answers}
        if unknown:
            self._answers.update(zip(unknown, getattr(self._lm, kind)(list(unknown.values())), strict=True))
        return [self._answers[key] for key in keys]


def request_sha256(kind: str, args: tuple) -> str:
    """Content hash of one lm-eval request."""
    return hashlib.sha256(json.dumps([kind, args], sort_keys=True, default=str).encode()).hexdigest()
