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
from io import BytesIO
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float

from gptq_awq.storage.atomic import replacing
from gptq_awq.storage.bounded import read_bytes

FILE_NAME = "scores.npz"
MOST_BYTES = 500_000_000
"""Largest scores.npz that is read, packed and unpacked: sums over the blocks of 8 billion tokens."""


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
            archive = zipfile.ZipFile(BytesIO(read_bytes(path, MOST_BYTES)))
            if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES / 1e6:g} MB")
            return cls({name.removesuffix(".npy"): _array(archive, name) for name in archive.namelist()})
        except OSError:
            raise
        except Exception as error:  # zip files and NumPy's headers can be wrong in many ways
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _array(archive: zipfile.ZipFile, name: str) -> Float[np.ndarray, "values"]:
    """Read one array, whose header is checked against the bytes that there are before anything is allocated."""
    claimed = archive.getinfo(name).file_size
    with archive.open(name) as file:
        content = file.read(claimed + 1)  # at most: the archive says how many they are, and may be wrong
    buffer = BytesIO(content)
    version = np.lib.format.read_magic(buffer)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(buffer)
    values = content[buffer.tell() :]
    if dtype.kind not in "fiub" or len(shape) != 1 or shape[0] * dtype.itemsize != len(values):
        raise ValueError(f"{name} is no series of numbers")
    return np.frombuffer(values, dtype)
