"""Compute logits with vLLM on a CPU from hf folders, gptq, awq and compressed-tensors checkpoints.

python -I vllm.py MODEL FOLDER DTYPE; see ../run.py for the files in FOLDER.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # runs the model in this process, where logits can be recorded
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # required by apply_model
    VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",  # room for the one token that is sampled and discarded
    VLLM_NO_USAGE_STATS="1",
)

QUANTIZATION = "vllm.model_executor.layers.quantization"
PACKED_EXPERTS = {
    f"{QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16": (
        "CompressedTensorsWNA16MoEMethod"
    ),
    f"{QUANTIZATION}.auto_gptq": "AutoGPTQMoEMethod",
    f"{QUANTIZATION}.auto_awq": "AutoAWQMoEMethod",
}
"""Module of vLLM -> its class that loads packed experts."""


def expand_experts() -> None:
    """Have vLLM load packed experts as it does, and expand them then where it has kernels for plain experts only.

    So it has on a CPU. That its loader finds every expert under its name is what there is to prove.
    """
    for name, method in PACKED_EXPERTS.items():
        with suppress(ImportError, AttributeError):  # of a vLLM that keeps them elsewhere
            module = importlib.import_module(name)
            select, loading = module.select_wna16_moe_backend, getattr(module, method)
            module.select_wna16_moe_backend = choosing_or_expanding(select, loading)


def choosing_or_expanding(select, method):
    """vLLM's choice of a kernel; where there is none, experts of this class are expanded after loading."""

    def chosen(*args, **kwargs):
        try:
            return select(*args, **kwargs)
        except NotImplementedError:
            method.process_weights_after_loading = expand
            return None, None

    return chosen


def expand(self, layer) -> None:
    """Replace a layer's packed experts by plain ones, w13_weight and w2_weight (experts, out, in)."""
    import torch
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for part in ("w13", "w2"):
        codes, zeros, scales = unpacked(type(self).__name__, layer, part)
        size = codes.shape[-1] // scales.shape[-1]
        weight = (codes - zeros.repeat_interleave(size, -1)) * scales.float().repeat_interleave(size, -1)
        layer.register_parameter(f"{part}_weight", torch.nn.Parameter(weight.to(scales.dtype), requires_grad=False))
        if f"{part}_bias" in layer._parameters and not layer.moe_config.has_bias:
            layer._parameters[f"{part}_bias"] = None
    plain = UnquantizedFusedMoEMethod(layer.moe_config)
    layer._replace_quant_method(plain)
    plain.process_weights_after_loading(layer)


def unpacked(method: str, layer, part: str):
    """Codes (experts, out, in), zero points and scales (experts, out, groups) of 4-bit experts."""
    import torch

    def nibbles(words):
        return ((words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15).flatten(-2)

    def channels(words):  # AWQ's order within a word
        return nibbles(words).unflatten(-1, (-1, 8))[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2).mT

    def tensor(name) -> torch.Tensor:
        return getattr(layer, f"{part}_{name}")

    if "AWQ" in method:
        return channels(tensor("qweight")), channels(tensor("qzeros")), tensor("scales").mT
    if "GPTQ" in method:  # symmetric, as vLLM takes no others
        scales = tensor("scales").mT
        return nibbles(tensor("qweight").mT), torch.full(scales.shape, 8), scales
    codes, scales, symmetric = nibbles(tensor("weight_packed")), tensor("weight_scale"), torch.full((1, 1, 1), 8)
    zeros = nibbles(tensor("weight_zero_point").mT).mT if hasattr(layer, f"{part}_weight_zero_point") else symmetric
    return codes, zeros.expand_as(scales), scales


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

    expand_experts()
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
