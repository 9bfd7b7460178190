"""Logits by llama.cpp: GGUF files, weights expanded to float32 (see llamacpp.cpp for how, and why).

python -I llamacpp.py MODEL FOLDER DTYPE; see ../run.py for what FOLDER holds.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

SHORTEST = 32  # tokens of a batch that llama.cpp hands to BLAS


def main(model: str, folder_path: str, _dtype: str) -> None:
    """Windows too short for BLAS are filled up: what comes after a token can't change its logits."""
    folder = Path(folder_path)
    tokens = np.load(folder / "tokens.npy")
    windows, seqlen = tokens.shape
    padded = np.pad(tokens, ((0, 0), (0, max(0, SHORTEST - seqlen))), mode="edge")
    padded.astype(np.int32).tofile(folder / "tokens.raw")
    tool = Path(sys.executable).parent / "llama-logits"
    command = [tool, model, folder / "tokens.raw", folder / "logits.raw", str(windows), str(padded.shape[1])]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(f"RuntimeError: llama-logits ended with {done.returncode}")
    logits = np.fromfile(folder / "logits.raw", np.float32).reshape(windows, padded.shape[1], -1)
    np.save(folder / "logits.npy", logits[:, :seqlen])
    (folder / "version.txt").write_text("b11434")


if __name__ == "__main__":
    main(*sys.argv[1:])
