"""Linear layers of either layout as matrices (out, in); sites, which share an input, and their absorbers."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROUTER = "routers stay in full precision"
NOT_PASSED = "no calibration token passes it"
CHOOSES = "it only chooses, and nothing else depends on it"
COEFFICIENTS = "coefficients, no channels"
KEPT = "protect or the grid keeps it in full precision"
SHARED = "its weight is another one's, which is rounded there"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear whose weight may be quantized, and is not left for a reason (its `left`)."""
    return isinstance(module, nn.Linear | Conv1D) and getattr(module, "left", None) is None


def matrix(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear as a view (out, in), or of another module as it is; writing to it writes to the module."""
    weight = module.weight.data  # pyright: ignore[reportAttributeAccessIssue]
    return weight.T if isinstance(module, Conv1D) else weight  # pyright: ignore[reportReturnType]


def channels(module: nn.Module) -> int:
    """Number of output channels of a linear or a norm."""
    return matrix(module).shape[0]


@dataclass(frozen=True)
class Absorber:
    """An op whose output channels may be divided by s when the next linears' columns are multiplied by s.

    Attributes:
        producer: name, within the block, of a norm or a linear.
        rows: (in,), the producer's output channel that feeds each input column of the site. Columns may share
            a channel (grouped-query attention): their s must be equal.
        unit_offset: whether the producer is a norm that multiplies by (1 + weight), as Gemma's do.
    """

    producer: str
    rows: Int[Tensor, "in"]
    unit_offset: bool = False

    def tie(self, s: Float[Tensor, "in"]) -> Float[Tensor, "in"]:
        """Scales made equal wherever columns share a channel: the geometric mean of their s."""
        size = int(self.rows.max()) + 1  # where rows are: read from a GPU it would wait for all queued work
        rows = self.rows.to(s.device)
        total, count = torch.zeros(2, size, device=s.device, dtype=s.dtype)
        total.index_add_(0, rows, s.log())
        count.index_add_(0, rows, torch.ones_like(s))
        return (total / count.clamp(min=1)).exp()[rows]

    @torch.no_grad()
    def divide(self, block: nn.Module, s: Float[Tensor, "in"]) -> None:
        """Divide the producer's output channels by s, in place."""
        producer = block.get_submodule(self.producer)
        divisor = torch.ones(channels(producer), device=s.device, dtype=s.dtype)
        divisor[self.rows.to(s.device)] = s
        if is_linear(producer):
            weight = matrix(producer)
            weight.copy_(weight / divisor[:, None].to(weight))
        else:
            weight = producer.get_parameter("weight").data
            offset = 1.0 if self.unit_offset else 0.0
            weight.copy_((weight + offset) / divisor.to(weight) - offset)
        bias = getattr(producer, "bias", None)
        if bias is not None:
            bias.data.copy_(bias.data / divisor.to(bias))


@dataclass(frozen=True)
class Site:
    """The linears of a block that read the same input tensor.

    Attributes:
        linears: names within the block, in the order they are called.
        width: number of input channels, the linears' columns.
        absorber: op that can absorb a scaling of the input; None where none was found that leaves the block's
            function unchanged.
        expert: number of the expert that the linears belong to, which only some tokens reach; None: every token does.
        analogous: whether the absorber was found, and verified, on another expert of the same structure.
        calls: how often one forward calls the site's linears, with another input each time.
    """

    linears: tuple[str, ...]
    width: int
    absorber: Absorber | None = None
    expert: int | None = None
    analogous: bool = False
    calls: int = 1

    @property
    def name(self) -> str:
        """The site's name: its linears joined by +, for example `self_attn.q_proj+k_proj+v_proj`."""
        head, _, _ = self.linears[0].rpartition(".")
        tails = [name.removeprefix(f"{head}.") for name in self.linears]
        return f"{head}.{'+'.join(tails)}" if head else "+".join(tails)


def widest(blocks: nn.ModuleList) -> int:
    """Number of columns (input channels) of the widest linear in the blocks."""
    return max(matrix(module).shape[1] for module in blocks.modules() if is_linear(module))
