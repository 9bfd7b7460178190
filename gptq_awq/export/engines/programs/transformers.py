"""Compute logits with transformers from hf folders, GGUF files, compressed-tensors and bitsandbytes checkpoints.

python -I transformers.py MODEL FOLDER DTYPE; see ../run.py for the files in FOLDER.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

BNB = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


def load(path: Path, dtype: torch.dtype):
    """Load a model from a folder or a GGUF file; transformers dequantizes the latter.

    In float32, bitsandbytes weights are dequantized too, as its own kernels round activations: to 8 bits for INT8, and
    to bfloat16 for NF4 and FP4 on CPUs that support it.
    """
    read = transformers.AutoModelForCausalLM.from_pretrained
    if path.suffix == ".gguf":
        return read(path.parent, gguf_file=path.name, dtype=dtype).eval()
    config = transformers.AutoConfig.from_pretrained(path)
    if config.get_text_config() is not config:  # a multimodal model
        read = transformers.AutoModelForImageTextToText.from_pretrained
    model = read(path, dtype=dtype).eval()
    if dtype == torch.float32 and model.config.to_dict().get("quantization_config", {}).get("quant_method") in BNB:
        # Some versions leave dequantized weights in 16 bits, and PreTrainedModel.to refuses quantized models.
        model = torch.nn.Module.to(model.dequantize(dtype), dtype)
    return model


def main(model_path: str, folder_path: str, dtype: str) -> None:
    """Compute and save logits, one window at a time, so that neither padding nor batching can change them."""
    folder = Path(folder_path)
    model = load(Path(model_path), getattr(torch, dtype))
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
    with torch.inference_mode():
        logits = [model(window[None], use_cache=False).logits[0].float().numpy() for window in tokens]
    np.save(folder / "logits.npy", np.stack(logits))
    (folder / "version.txt").write_text(transformers.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
