"""Data of paired tests between runs: sums over blocks of tokens and values of items, in `OUT/scores.npz`.

Two runs that scored the same tokens (`manifest.tokens.eval`) can be compared block by block long after they finished.
Per text NAME, float64 sums over the blocks of `statistics.BLOCK` tokens:

    NAME/tokens         tokens of each block
    NAME/nll            loss of the quantized model, nats
    NAME/nll/baseline   loss of the full-precision model, nats
    NAME/kl             KL of the quantized model from full precision, nats
    NAME/agree          tokens for which both models have the same most likely word
    NAME/METRIC         a further metric that is a mean over tokens (evaluation/metrics)

and per lm-eval metric with a number for each item, in the order of items:

    lm_eval/TASK/METRIC, lm_eval/TASK/METRIC/baseline
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float

from gptq_awq.storage.atomic import replacing

FILE_NAME = "scores.npz"


@dataclass(frozen=True)
class Scores:
    """One-dimensional arrays by name, as stored in scores.npz."""

    arrays: Mapping[str, Float[np.ndarray, "values"]]

    def write(self, folder: Path | str) -> Path:
        """Write `folder/scores.npz` atomically; equal scores give equal bytes. Raises OSError."""
        path = Path(folder) / FILE_NAME
        with replacing(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **dict(sorted(self.arrays.items())))
        return path

    @classmethod
    def read(cls, folder: Path | str) -> Self:
        """Read the scores of the run in `folder`. Raises OSError if it has none, ValueError if the file is damaged."""
        path = Path(folder) / FILE_NAME
        try:
            with np.load(path, allow_pickle=False) as archive:
                return cls({name: archive[name] for name in archive.files})
        except (zipfile.BadZipFile, EOFError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
