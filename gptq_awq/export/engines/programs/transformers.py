"""Logits by transformers: hf folders, GGUF files, compressed-tensors and bitsandbytes checkpoints.

python -I transformers.py MODEL FOLDER DTYPE; see ../run.py for what FOLDER holds.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

BNB = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


def load(path: Path, dtype: torch.dtype):
    """The model of a folder, or of a GGUF file, whose weights transformers expands.

    In float32 bitsandbytes, too, is asked to expand its weights: its own kernels round activations, to 8 bits
    where weights are INT8, and to bfloat16 for NF4 and FP4 on CPUs that know it.
    """
    read = transformers.AutoModelForCausalLM.from_pretrained
    if path.suffix == ".gguf":
        return read(path.parent, gguf_file=path.name, dtype=dtype).eval()
    config = transformers.AutoConfig.from_pretrained(path)
    if config.get_text_config() is not config:  # a model that also sees
        read = transformers.AutoModelForImageTextToText.from_pretrained
    model = read(path, dtype=dtype).eval()
    if dtype == torch.float32 and model.config.to_dict().get("quantization_config", {}).get("quant_method") in BNB:
        # Some versions leave in 16 bits what was so computed, and PreTrainedModel.to refuses such a model.
        model = torch.nn.Module.to(model.dequantize(dtype), dtype)
    return model


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
