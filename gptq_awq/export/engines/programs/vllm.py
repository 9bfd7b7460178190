"""Compute logits with vLLM on a CPU from hf folders, gptq, awq and compressed-tensors checkpoints.

python -I vllm.py MODEL FOLDER DTYPE; see ../run.py for the files in FOLDER.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import os
import sys
from pathlib import Path

import numpy as np

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # runs the model in this process, where logits can be recorded
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # required by apply_model
    VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",  # room for the one token that is sampled and discarded
    VLLM_NO_USAGE_STATS="1",
)


class LogitsRecorder:
    """Recorder of all logits that the model's head computes, in order."""

    def __init__(self) -> None:
        self.logits = []

    def hook(self, model) -> None:
        """Wrap the model's `compute_logits` to keep a copy of its results."""
        head = model.compute_logits

        def compute_logits(*args, **kwargs):
            logits = head(*args, **kwargs)
            self.logits.append(logits.float().cpu().numpy().copy())
            return logits

        model.compute_logits = compute_logits


def window_logits(engine, recorder: LogitsRecorder, tokens: list[int], sampling) -> np.ndarray:
    """Compute logits (seqlen, vocabulary) of one window.

    vLLM computes the last position, to sample from it, separately from all others, for prompt_logprobs.
    """
    recorder.logits.clear()
    engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    by_rows = {len(rows): rows for rows in recorder.logits}
    return np.concatenate([by_rows[len(tokens) - 1], by_rows[1]])


def main(model: str, folder_path: str, dtype: str) -> None:
    """Compute and save logits of every window as one prompt, without chunks or prefix caching."""
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
    recorder = LogitsRecorder()
    engine.apply_model(recorder.hook)
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    logits = [window_logits(engine, recorder, row.tolist(), sampling) for row in tokens]
    np.save(folder / "logits.npy", np.stack(logits))
    (folder / "version.txt").write_text(vllm.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
