"""The modules outside of a causal LM's blocks: embeddings that write the residual stream, the final norm, the head."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptq_awq.errors import UserError
from gptq_awq.models.auto_class import also_sees
from gptq_awq.models.blocks import find_blocks, hooks
from gptq_awq.models.linear import is_linear


@dataclass(frozen=True)
class Ends:
    """The modules outside of the blocks that read or write the residual stream.

    Attributes:
        embeddings: embeddings of tokens, and of positions where the model has them; (·, width) each.
        norm: final norm, between the last block and the head.
        head: output layer.
        inputs: hidden states of a probe as they enter the final norm.
    """

    embeddings: tuple[nn.Embedding, ...]
    norm: nn.Module
    head: nn.Module
    inputs: Float[Tensor, "tokens width"]

    @property
    def width(self) -> int:
        """Number of channels of the residual stream."""
        return self.inputs.shape[-1]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, ids: Int[Tensor, "1 tokens"]) -> "Ends":
        """Find a model's ends by observing one forward of a few tokens.

        Raises:
            UserError: something else lies between embeddings, blocks, norm and head, such as a projection.
        """
        if also_sees(model.config):
            name = type(model).__name__
            raise UserError(f"method: what {name} sees enters its residual stream, too, and from no embedding")
        prefix, _ = find_blocks(model)
        head, seen = model.get_output_embeddings(), []

        def watch(module: nn.Module, args: tuple) -> None:
            seen.append((module, args[0] if args else None))

        outside = [m for name, m in model.named_modules() if not name.startswith(prefix) and not any(m.children())]
        with hooks([m.register_forward_pre_hook(watch) for m in outside if any(True for _ in m.parameters())]):
            model(ids, use_cache=False)
        order = [module for module, _ in seen]
        embeddings = tuple(dict.fromkeys(m for m in order if isinstance(m, nn.Embedding)))
        rest = [m for m in order if not isinstance(m, nn.Embedding)]
        one_norm = len(rest) == 2 and rest[1] is head and is_linear(head) and rest[0].get_parameter("weight").dim() == 1
        inputs = next((x for module, x in seen if one_norm and module is rest[0]), None)
        if inputs is None or any(e.embedding_dim != inputs.shape[-1] for e in embeddings):
            names = ", ".join(type(m).__name__ for m in rest)
            raise UserError(f"method: {type(model).__name__} has {names} outside of its blocks, not a norm and a head")
        return cls(embeddings, rest[0], head, inputs.reshape(-1, inputs.shape[-1]).float())

    def subtracts_mean(self) -> bool:
        """Whether the final norm subtracts the mean, as LayerNorm does: a constant added to its input has no effect."""
        norm = self._bare(0.5)
        plain, shifted = norm(self.inputs), norm(self.inputs + self.inputs.std())
        return float((shifted - plain).norm()) < 1e-3 * float(plain.norm())

    def unit_offset(self) -> bool:
        """Whether the final norm multiplies by (1 + weight): its output is then not zero for a weight of 0."""
        return bool(self._bare(0.0)(self.inputs).abs().max() > 0)

    def _bare(self, weight: float) -> nn.Module:
        """Copy of the final norm with every weight set to `weight` and its bias to 0."""
        norm = copy.deepcopy(self.norm).float()
        norm.get_parameter("weight").data.fill_(weight)
        if isinstance(bias := getattr(norm, "bias", None), Tensor):
            bias.data.zero_()
        return norm


def is_tied(model: Any) -> bool:
    """Whether the output head and the input embedding share one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and head.weight is embedding.weight


def correct_tie(model: Any) -> str | None:
    """Make the config say what the model is: a head that it ties to the embedding and that has its own weight is not.

    Returns:
        Name of such a head's weight; None where config and model agree.
    """
    head = model.get_output_embeddings()
    if head is None or is_tied(model):
        return None
    name = next((f"{name}.weight" for name, module in model.named_modules() if module is head), "")
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if name not in {*tied, *tied.values()}:
        return None
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return name


def untie(model: Any) -> None:
    """Give a head that is tied to the embedding its own copy of the weight; the model's function stays the same."""
    if is_tied(model):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
