"""Models and windows of tokens for the tests of evaluation, and a plain implementation of their losses."""

import torch
import transformers

from gptq_awq.data.tokens import make_token_set
from helpers.tiny_models import GROUPED, tiny_tokens

ARCHITECTURES = ["llama", "opt", "opt-post-norm", "gpt2", "gpt-neox", "gemma3", "qwen3", "phi3"]


def windows(rows=4, length=32, name="text"):
    """Windows of random tokens, as a set to score on."""
    return make_token_set(name, tiny_tokens(rows, length), None, "random")


def postprocessing_model(name):
    """Models that do something to the output of their last linear layer."""
    torch.manual_seed(0)
    configs = {
        "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=16, final_logit_softcapping=1.5),
        "granite": lambda: transformers.GraniteConfig(**GROUPED, logits_scaling=7.0),
        "cohere": lambda: transformers.CohereConfig(**GROUPED, logit_scale=0.25),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[name]()).eval().requires_grad_(False)


def plain_losses(model, ids):
    """An independent implementation: whole windows, transformers' logits, torch's cross entropy."""
    logits = (model(row[None], use_cache=False).logits[0, :-1] for row in ids)
    losses = [
        torch.nn.functional.cross_entropy(x, row[1:], reduction="none") for x, row in zip(logits, ids, strict=True)
    ]
    return torch.stack(losses)


def disturb(model, by=0.3, seed=1):
    """Add noise to every weight matrix of the decoder's blocks."""
    generator = torch.Generator().manual_seed(seed)
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for weight in model.parameters():
        if weight.dim() == 2 and all(weight is not end for end in ends):
            weight.add_(by * weight.std() * torch.randn(weight.shape, generator=generator))
