"""Driver of llm-compressor for benchmarks/peers.py; see job.py."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from job import Job, answer, read_job, timed
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(job: Job) -> tuple[list, str]:
    """llm-compressor's modifiers for the job, and a description of them."""
    weights = QuantizationArgs(
        num_bits=job.bits, type="int", symmetric=job.sym, strategy="group", group_size=job.group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    if job.scheme is not None:
        scheme = preset_name_to_scheme(job.scheme, ["Linear"])
        assert scheme.weights is not None
        scheme.weights.observer = job.observer
    where = {"config_groups": {"linears": scheme}, "ignore": ["lm_head"]}
    if job.method == "rtn":
        return [QuantizationModifier(**where)], "QuantizationModifier (ranges; it rounds when it saves)"
    if job.method == "awq":
        return [AWQModifier(), QuantizationModifier(**where)], "AWQModifier(n_grid=20, duo_scaling=True)"
    if job.method == "gptq":
        order = "static" if job.tuned else None
        return [GPTQModifier(dampening_frac=job.damping, actorder=order, **where)], f"actorder={order}"
    raise NotImplementedError(f"llm-compressor driver: no {job.method}")


def batches(job: Job) -> DataLoader:
    """Calibration tokens as the DataLoader that llm-compressor takes."""

    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = torch.stack(rows)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return DataLoader(list(job.tokens()), batch_size=job.batch_size, collate_fn=collate)


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    """Dequantize a module's codes and scales by compressed-tensors, (out, in)."""
    args, scale, zero = module.quantization_scheme.weights, module.weight_scale, module.weight_zero_point
    whole = getattr(module, "weight_global_scale", None)
    codes = quantize(module.weight, scale, zero, args, global_scale=whole)
    return dequantize(codes.float(), scale.float(), zero, args, global_scale=whole)


def main() -> None:
    """Load the model, quantize it, and write the answer."""
    job = read_job()
    # AWQModifier pins its cache in memory for a GPU, which fails where there is none.
    IntermediatesCache.pin_memory = lambda *_: None
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.torch_dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    modifiers, settings = recipe(job)
    data = {} if job.method == "rtn" else {"dataset": batches(job), "num_calibration_samples": len(job.tokens())}
    took = timed(lambda: oneshot(model=model, processor=tokenizer, recipe=modifiers, **data))
    weights = dict(model.named_parameters())
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    kept = {name: weights[name] for name in weights if not name.endswith(("_scale", "_zero_point", "_global_scale"))}
    kept |= {f"{name}.weight": dequantized(module) for name, module in linears.items()}
    answer(job, "llmcompressor", took, kept, settings)


if __name__ == "__main__":
    main()
