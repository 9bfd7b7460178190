"""Dtypes that forwards compute in: the one that hardware multiplies natively, and names of dtypes."""

import torch

from gptq_awq.errors import UserError


def native_dtype(device: torch.device) -> torch.dtype:
    """Fastest dtype on `device`: bfloat16 if multiplied natively, else float32 (float16 on GPUs without bfloat16)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = torch.cpu.get_capabilities()
    has_bf16 = device.type == "cpu" and (native.get("avx512_bf16") or native.get("amx_bf16"))
    return torch.bfloat16 if has_bf16 else torch.float32


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of calibration forwards by its name; "auto" is the `native_dtype` of `device`.

    Raises:
        UserError: the name is unknown.
    """
    if name == "auto":
        return native_dtype(device)
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"compute_dtype={name}: choose auto, float32, bfloat16 or float16")
    return getattr(torch, name)
