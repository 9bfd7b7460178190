"""The first token at which two greedy continuations part, and how near the choice was for both models.

Up to there both models have read the same tokens, so their probabilities are of one and the same question. What comes
after is no measure of anything: one other word makes another text.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gptq_awq.storage.atomic import replacing
from gptq_awq.storage.bounded import read_bytes

if TYPE_CHECKING:  # reports read samples without torch
    from gptq_awq.evaluation.samples.continuation import Continuation

FILE_NAME = "samples.jsonl"
"""File of a run's folder that holds its text samples."""
MOST_BYTES = 64_000_000


@dataclass(frozen=True)
class Parting:
    """The first token at which a model's greedy continuation is not full precision's.

    Attributes:
        token: number of tokens that are the same.
        at: number of characters that are the same, to where the text parts.
        full: full precision's piece of text there, and
        own: the model's.
        full_gap: by how much full precision held its own token likelier than the model's; below 0.1 a near tie.
        own_gap: by how much the model held its own token likelier than full precision's.
    """

    token: int
    at: int
    full: str
    own: str
    full_gap: float
    own_gap: float

    @classmethod
    def of(cls, full: "Continuation", own: "Continuation") -> Self | None:
        """The parting of two continuations of one prompt; None where they are the same."""
        same = 0
        for a, b in zip(full.tokens, own.tokens, strict=False):
            if a != b:
                break
            same += 1
        else:
            return None  # as far as both go, which is equally far: whoever ends does so with a token
        a, b = full.tokens[same], own.tokens[same]
        return cls(
            token=same,
            at=len("".join(full.pieces[:same])),
            full=full.pieces[same],
            own=own.pieces[same],
            full_gap=full.probability(same, a) - full.probability(same, b),
            own_gap=own.probability(same, b) - own.probability(same, a),
        )


@dataclass(frozen=True)
class Sample:
    """A prompt with two models' greedy continuations.

    Attributes:
        prompt: the text to go on from.
        full: what full precision writes.
        own: what the model writes.
        parting: where they part; None where they don't.
        tokens: number of tokens that full precision wrote.
    """

    prompt: str
    full: str
    own: str
    parting: Parting | None
    tokens: int

    @classmethod
    def of(cls, full: "Continuation", own: "Continuation") -> Self:
        """Compare two continuations of one prompt."""
        return cls(full.prompt.text, full.text, own.text, Parting.of(full, own), len(full.tokens))


def compared(full: "Sequence[Continuation]", own: "Sequence[Continuation]") -> list[Sample]:
    """Compare two models' continuations of the same prompts, in their order."""
    return [Sample.of(a, b) for a, b in zip(full, own, strict=True)]


def write_samples(samples: Sequence[Sample], folder: Path) -> Path:
    """Write FOLDER/samples.jsonl, a line per prompt. Raises OSError."""
    path = folder / FILE_NAME
    with replacing(path) as scratch:
        scratch.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples), encoding="utf-8")
    return path


def read_samples(folder: Path | str) -> list[Sample]:
    """Read the text samples of a run, [] where it has none. Raises ValueError for a file that holds something else."""
    try:
        content = read_bytes(Path(folder) / FILE_NAME, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        return [_sample(json.loads(line)) for line in content.splitlines() if line.strip()]
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{FILE_NAME}: {' '.join(str(error).split())}") from error


def _sample(row: Any) -> Sample:
    parting = row["parting"] and Parting(**row["parting"])
    sample = Sample(**{**row, "parting": parting})
    texts = [sample.prompt, sample.full, sample.own, *([parting.full, parting.own] if parting else [])]
    numbers = [sample.tokens, *([parting.token, parting.at, parting.full_gap, parting.own_gap] if parting else [])]
    if not all(isinstance(text, str) for text in texts) or not all(type(n) in (int, float) for n in numbers):
        raise TypeError("a field is of another type")
    return sample
