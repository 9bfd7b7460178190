"""A language model that does not answer the same question twice: how lm-eval's baseline is cached."""

import hashlib
import json
from collections import Counter
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM


class RecordedLM(LM):
    """Answers each request of lm-eval from `answers` where it is there, else asks `lm` and adds the answer.

    Requests are known by their content (kind, prompt, continuation or generation options), so whatever
    changes the prompts of a task changes what is looked up, and two limits of one task share their answers.
    """

    def __init__(self, lm: LM, answers: dict[str, Any]) -> None:
        super().__init__()
        self._lm = lm
        self._answers = answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """See `LM`."""
        return [(logprob, greedy) for logprob, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See `LM`."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """See `LM`."""
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: list[Instance]) -> list[Any]:
        # A task may repeat a request, to sample several answers: the n-th time is another request.
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
    """Content hash of one request."""
    return hashlib.sha256(json.dumps([kind, args], sort_keys=True, default=str).encode()).hexdigest()
