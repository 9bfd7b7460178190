"""Logits by GPTQModel: gptq and awq checkpoints on a CPU.

python -I gptqmodel.py MODEL FOLDER DTYPE; see ../run.py for what FOLDER holds.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import json
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than it saves, and wants a C++ compiler

import gptqmodel
import numpy as np
import torch


def load(model: Path, dtype: torch.dtype):
    """The model, run by GPTQModel's plain PyTorch kernels: of all, they take the most bits and groups.

    They load 16-bit floats only. In float32 nothing is rounded once the scales, exact in float16, are widened;
    the kernel for awq narrows them again and computes in float16 whatever it is asked for.
    """
    config = json.loads((model / "config.json").read_text())["quantization_config"]
    awq = config["quant_method"] == "awq"
    backend = gptqmodel.BACKEND.AWQ_TORCH if awq else gptqmodel.BACKEND.GPTQ_TORCH
    narrow = torch.float16 if dtype == torch.float32 else dtype
    loaded = gptqmodel.GPTQModel.load(str(model), device="cpu", dtype=narrow, backend=backend)
    loaded.model.to(dtype)
    return loaded


def main(model_path: str, folder_path: str, dtype: str) -> None:
    """Run every window on its own."""
    folder = Path(folder_path)
    model = load(Path(model_path), getattr(torch, dtype))
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
    with torch.inference_mode():
        logits = [model(input_ids=window[None]).logits[0].float().numpy() for window in tokens]
    np.save(folder / "logits.npy", np.stack(logits))
    (folder / "version.txt").write_text(gptqmodel.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
