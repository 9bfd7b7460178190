"""Compute logits with llama.cpp from GGUF files, with weights expanded to float32 (llamacpp.cpp explains why).

python -I llamacpp.py MODEL FOLDER DTYPE; see ../run.py for the files in FOLDER.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

SHORTEST = 32  # smallest batch, in tokens, that llama.cpp computes with BLAS


def main(model: str, folder_path: str, _dtype: str) -> None:
    """Compute and save logits; windows too short for BLAS are padded, as later tokens don't affect earlier logits."""
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
