"""Logits by vLLM on a CPU: hf folders, gptq, awq and compressed-tensors checkpoints.

python -I vllm.py MODEL FOLDER DTYPE; see ../run.py for what FOLDER holds.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import os
import sys
from pathlib import Path

import numpy as np

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the model in this process, where its logits can be caught
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # apply_model wants it
    VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",  # room for the one token that is sampled and thrown away
    VLLM_NO_USAGE_STATS="1",
)


class Caught:
    """Everything the model's head computes, in the order it does."""

    def __init__(self) -> None:
        self.logits = []

    def hook(self, model) -> None:
        """Keep a copy of whatever `compute_logits` returns."""
        head = model.compute_logits

        def compute_logits(*args, **kwargs):
            logits = head(*args, **kwargs)
            self.logits.append(logits.float().cpu().numpy().copy())
            return logits

        model.compute_logits = compute_logits


def window_logits(engine, caught: Caught, tokens: list[int], sampling) -> np.ndarray:
    """(seqlen, vocabulary). vLLM asks for the last position, to sample, and for all others, as prompt_logprobs."""
    caught.logits.clear()
    engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    by_rows = {len(rows): rows for rows in caught.logits}
    return np.concatenate([by_rows[len(tokens) - 1], by_rows[1]])


def main(model: str, folder_path: str, dtype: str) -> None:
    """Run every window as one prompt, whole and uncached."""
    import vllm

    folder = Path(folder_path)
    tokens = np.load(folder / "tokens.npy")
    room = tokens.shape[1] + 1
    engine = vllm.LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=room,
        max_num_batched_tokens=max(room, 256),
        max_num_seqs=1,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    caught = Caught()
    engine.apply_model(caught.hook)
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    np.save(folder / "logits.npy", np.stack([window_logits(engine, caught, row.tolist(), sampling) for row in tokens]))
    (folder / "version.txt").write_text(vllm.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
