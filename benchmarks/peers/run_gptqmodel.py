"""Driver of GPTQModel for benchmarks/peers.py; see job.py."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import gptqmodel
import torch
from gptqmodel import GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTQConfig, RTNConfig
from job import Job, answer, read_job, timed


def one_loader() -> None:
    """Let GPTQModel's pool of workers start on few cores.

    It requires two workers for loading, but makes one for every two cores, so it fails on fewer than four.
    """
    pool = gptqmodel.DeviceThreadPool
    gptqmodel.DeviceThreadPool = lambda workers, **rest: pool(workers={**workers, "model_loader:cpu": 1}, **rest)


def config(job: Job):
    """GPTQModel's config for the job, and a description of it."""
    grid = {
        "bits": job.bits,
        "group_size": job.group_size,
        "sym": job.sym,
        "offload_to_disk": False,
        "device": "cpu",
    }
    if job.method != "awq":
        grid["format"] = FORMAT.GPTQ_V2  # the other one stores zeros minus 1, and dequantize_weight reads this one
    if job.method == "rtn":
        return RTNConfig(**grid), "RTNConfig"
    if job.method == "awq":
        return AWQConfig(**grid), "AWQConfig"
    if job.method == "gptq":
        order = {} if job.tuned else {"act_group_aware": False}
        made = GPTQConfig(**grid, desc_act=False, damp_percent=job.damping, **order)
        return made, f"desc_act=False, act_group_aware={made.act_group_aware}"
    raise NotImplementedError(f"GPTQModel driver: no {job.method}")


def dequantized(module: BaseQuantLinear) -> torch.Tensor:
    """Dequantize a packed weight by GPTQModel's own code, (out, in)."""
    if isinstance(module, AwqTorchLinear):
        packed = (module.qweight, module.qzeros, module.scales.float())
        return dequantize_gemm(*packed, module.bits, module.group_size).T
    module.scales = module.scales.float()  # exact, and products are not rounded to float16 then
    return module.dequantize_weight().T


def main() -> None:
    """Load the model, quantize it, and write the answer."""
    job = read_job()
    one_loader()
    made, settings = config(job)
    model = GPTQModel.load(job.model, made, dtype=job.torch_dtype)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.tokens()]
    took = timed(lambda: model.quantize(rows, batch_size=job.batch_size))
    weights = dict(model.model.named_parameters())
    for name, module in model.model.named_modules():
        if isinstance(module, BaseQuantLinear):
            weights[f"{name}.weight"] = dequantized(module)
    answer(job, "gptqmodel", took, weights, settings)


if __name__ == "__main__":
    main()
