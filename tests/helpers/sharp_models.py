"""Models and data for the tests of tuning."""

import torch

from gptq_awq.data.tokens import make_token_set
from helpers.tiny_models import tiny_model


def sharp_model(name="llama"):
    """A random model that prefers some words to others."""
    model = tiny_model(name)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(6)
    return model


def padded(data):
    """Rows of 32, 31, … real tokens."""
    mask = torch.arange(data.ids.shape[1]) < data.ids.shape[1] - torch.arange(len(data.ids))[:, None]
    return make_token_set("padded", data.ids.where(mask, torch.tensor(0)), mask, "test")
