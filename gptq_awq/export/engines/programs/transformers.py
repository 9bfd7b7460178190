"""Logits by transformers: hf folders, GGUF files, compressed-tensors and bitsandbytes checkpoints.

python -I transformers.py MODEL FOLDER DTYPE; see ../run.py for what FOLDER holds.
"""

# pyright: reportMissingImports=false
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def load(model: Path, dtype: torch.dtype):
    """The model of a folder, or of a GGUF file, whose weights transformers expands."""
    if model.suffix == ".gguf":
        found = transformers.AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=dtype)
    else:
        found = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return found.eval()


def main(model_path: str, folder_path: str, dtype: str) -> None:
    """Run every window on its own, as padding or batching would be one more thing to differ."""
    folder = Path(folder_path)
    model = load(Path(model_path), getattr(torch, dtype))
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
    with torch.inference_mode():
        logits = [model(window[None], use_cache=False).logits[0].float().numpy() for window in tokens]
    np.save(folder / "logits.npy", np.stack(logits))
    (folder / "version.txt").write_text(transformers.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
