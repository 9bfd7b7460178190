"""Compute logits with GPTQModel from gptq and awq checkpoints, on a CPU.

python -I gptqmodel.py MODEL FOLDER DTYPE; see ../run.py for the files in FOLDER.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import json
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than it saves, and needs a C++ compiler

import gptqmodel
import numpy as np
import torch


def load(model: Path, dtype: torch.dtype):
    """Load a model with GPTQModel's plain PyTorch kernels, which support the most bits and group sizes.

    They load 16-bit floats only. Scales that are exact in float16 stay exact when widened to float32; the kernel for
    awq narrows them again and always computes in float16.
    """
    config = json.loads((model / "config.json").read_text())["quantization_config"]
    awq = config["quant_method"] == "awq"
    backend = gptqmodel.BACKEND.AWQ_TORCH if awq else gptqmodel.BACKEND.GPTQ_TORCH
    narrow = torch.float16 if dtype == torch.float32 else dtype
    loaded = gptqmodel.GPTQModel.load(str(model), device="cpu", dtype=narrow, backend=backend)
    loaded.model.to(dtype)
    return loaded


def main(model_path: str, folder_path: str, dtype: str) -> None:
    """Compute and save the logits of every window, one window at a time."""
    folder = Path(folder_path)
    model = load(Path(model_path), getattr(torch, dtype))
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
    with torch.inference_mode():
        logits = [model(input_ids=window[None]).logits[0].float().numpy() for window in tokens]
    np.save(folder / "logits.npy", np.stack(logits))
    (folder / "version.txt").write_text(gptqmodel.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
