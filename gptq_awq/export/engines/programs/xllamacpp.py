"""Compute logits with llama.cpp as packaged in xllamacpp from GGUF files, with one call per position.

python -I xllamacpp.py MODEL FOLDER DTYPE; see ../run.py for the files in FOLDER. xllamacpp needs no compiler. It
returns log probabilities of the next token only; they serve as logits, as softmax maps them to the same probabilities.
llama.cpp's CPU kernels round activations to 8 bits where weights are quantized.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xllamacpp

MANY = 1 << 20  # more than any vocabulary


def next_token(server, prompt: list[int]) -> np.ndarray:
    """Log probabilities (vocabulary,) of every token to follow `prompt`."""
    request = {"prompt": prompt, "max_tokens": 1, "logprobs": MANY, "temperature": 0, "cache_prompt": False}
    answer = server.handle_completions(request)
    if "choices" not in answer:
        sys.exit(f"RuntimeError: {answer}")
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    logits = np.full(1 + max(token["id"] for token in found), np.nan, np.float32)
    for token in found:
        logits[token["id"]] = token["logprob"]
    return logits


def main(model: str, folder_path: str, _dtype: str) -> None:
    """Compute and save logits of every window, with one request per position."""
    folder = Path(folder_path)
    tokens = np.load(folder / "tokens.npy")
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup = max(64, tokens.shape[1] + 8), 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    logits = [[next_token(server, row[: i + 1].tolist()) for i in range(len(row))] for row in tokens]
    np.save(folder / "logits.npy", np.array(logits))
    (folder / "version.txt").write_text(version("xllamacpp"))


if __name__ == "__main__":
    main(*sys.argv[1:])
