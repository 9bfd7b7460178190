"""Driver of AutoRound for benchmarks/peers.py; see job.py."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import torch
from auto_round import AutoRound
from job import Job, answer, read_job, timed
from transformers import AutoModelForCausalLM, AutoTokenizer


def steps(job: Job) -> int:
    """Number of learning steps per block; with 0, AutoRound rounds to nearest."""
    return {"rtn": 0, "autoround": job.iters}[job.method]


def quantizer(job: Job, model: torch.nn.Module, tokenizer) -> AutoRound:
    """AutoRound configured for the job."""
    scheme = {"bits": job.bits, "group_size": job.group_size, "sym": job.sym, "data_type": "int", "act_bits": 16}
    tokens = job.tokens()
    return AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        dataset=list(tokens.split(8)),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        iters=steps(job),
        disable_opt_rtn=True if job.method == "rtn" else None,
        amp=job.dtype != "float32",
        device_map="cpu",
        low_cpu_mem_usage=False,
    )


def main() -> None:
    """Load the model, quantize it, and write the answer."""
    job = read_job()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.torch_dtype).eval()
    tool = quantizer(job, model, AutoTokenizer.from_pretrained(job.model))
    took = timed(tool.quantize)
    weights = dict(tool.model.named_parameters())
    answer(job, "auto-round", took, weights, f"iters={steps(job)}")


if __name__ == "__main__":
    main()
