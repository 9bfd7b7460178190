"""Weights that a model's own forward changes: RWKV halves some in place, at its first call for inference.

What a checkpoint holds is what its reader halves again. So such a model computes with the weights as they are in files,
which gives the same numbers in float32: halving keeps float16 from overflowing.
"""

from typing import Any

from torch import nn

from gptq_awq.errors import UserError


def keep_weights(model: nn.Module) -> None:
    """Let RWKV compute with the weights that its files hold, from the next forward on; other models are left alone."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "rescale_every", 0):
        return
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):
            module.train()._rescale_layers()  # pyright: ignore[reportCallIssue]
            module.eval()
    config.rescale_every = 0


def versions(model: nn.Module) -> dict[str, int]:
    """PyTorch's count of changes in place of each parameter."""
    return {name: parameter._version for name, parameter in model.named_parameters()}


def state_of(model: nn.Module) -> tuple:
    """Modules and parameters that a model has, and how often each was changed in place: two are equal if none was."""
    modules = tuple((name, id(module), getattr(module, "left", None)) for name, module in model.named_modules())
    return modules, tuple((name, id(parameter), parameter._version) for name, parameter in model.named_parameters())


def check_unchanged(model: nn.Module, before: dict[str, int]) -> None:
    """Raise UserError, naming the first, if parameters changed in place since `before`, which `versions` gave."""
    after = versions(model)
    if changed := [name for name, version in before.items() if after.get(name, version) != version]:
        raise UserError(
            f"model: the forward of {type(model).__name__} changes its own weights ({changed[0]}), which whoever reads "
            "a checkpoint would change once more"
        )
