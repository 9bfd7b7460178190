"""Compute logits with mlx-lm from MLX folders, quantized or not.

python -I mlx.py MODEL FOLDER DTYPE; see ../run.py for the files in FOLDER.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model


def main(model_path: str, folder_path: str, dtype: str) -> None:
    """Compute and save logits, one window at a time, with scales, biases and unquantized parameters in `dtype`."""
    mx.set_default_device(mx.cpu)
    folder = Path(folder_path)
    model, _ = load_model(Path(model_path))
    model.set_dtype(getattr(mx, dtype))
    tokens = np.load(folder / "tokens.npy")
    logits = [np.array(model(mx.array(window[None]))[0].astype(mx.float32)) for window in tokens]
    np.save(folder / "logits.npy", np.stack(logits))
    (folder / "version.txt").write_text(f"{version('mlx-lm')} (mlx {version('mlx')})")


if __name__ == "__main__":
    main(*sys.argv[1:])
