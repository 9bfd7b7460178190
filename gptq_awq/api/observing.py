"""Looking at a model: the inputs of its sites as calibration sees them, and weights exchanged for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor, nn

from gptq_awq.calibration.activations import open_activations
from gptq_awq.calibration.chain import check_chain, why_not_alone
from gptq_awq.calibration.moments import Moments
from gptq_awq.calibration.observation import Observer, passing
from gptq_awq.data.tokens import TokenSet, make_token_set
from gptq_awq.errors import UserError
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.models.blocks import find_blocks, heads_of
from gptq_awq.models.left import mark_left
from gptq_awq.models.linear import Site, matrix
from gptq_awq.models.unfuse import unfuse
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.quantize import Settings


@dataclass(frozen=True)
class SiteInput:
    """Input of one site of a model, as calibration saw it.

    Attributes:
        block: index of the site's block.
        site: names within the block, and the absorber where one was looked for.
        linears: the names, in the model, of the linears that read this input.
        moments: of the input.
    """

    block: int
    site: Site
    linears: tuple[str, ...]
    moments: Moments = field(repr=False)


def observe_moments(
    model: nn.Module,
    calibration: Int[Tensor, "n seqlen"] | TokenSet,
    absorbers: bool = False,
    settings: Settings = Settings(compute_dtype="float32"),  # noqa: B008 (frozen)
) -> Iterator[SiteInput]:
    """Gather the moments of every site's input in the model as it is, block by block, in the order that sites run.

    Fused experts become linears; those that few tokens reach are shown as all tokens (`ExpertPolicy`) meet them.

    Each Hessian has (columns of the input)² floats: of a large model, keep only those that are wanted.

    Args:
        model: a transformers causal LM in eval mode; it is not changed.
        calibration: token ids, one row per window.
        absorbers: also find the op that can take over a scaling of each site's input, as AWQ needs.
        settings: how forwards compute.

    Raises:
        UserError: non-finite activations; no token at all.
    """
    if isinstance(calibration, Tensor):
        calibration = make_token_set("calibration", calibration.cpu(), None, "memory")
    unfuse(model)
    mark_left(model, calibrates=True)
    check_chain(model, calibration, calibrates=True)
    prefix, blocks = find_blocks(model)
    dtype = resolve_compute_dtype(settings.compute_dtype, next(model.parameters()).device)
    walked = why_not_alone(model, calibration) is not None
    activations = open_activations(model, blocks, calibration, settings.tokens_per_batch, dtype, walked=walked)
    heads = heads_of(model)
    for block, seen in enumerate(passing(Observer(activations, absorbers, heads), blocks, dtype)):
        for site, moments in zip(seen.sites, seen.moments, strict=True):
            yield SiteInput(block, site, tuple(f"{prefix}.{block}.{name}" for name in site.linears), moments)


@contextmanager
def with_weights(model: nn.Module, weights: Mapping[str, QuantizedWeight | Tensor]) -> Iterator[None]:
    """Give the named linears other weights, (out, in) each, for the body of a `with` statement.

    So a model can be scored with one layer quantized, or with each at the width of your choice.

    Raises:
        UserError: a name that the model has no linear of.
    """
    try:
        held = {name: matrix(model.get_submodule(name)) for name in weights}
    except AttributeError as error:
        raise UserError(f"weights: the model has no linear of that name ({error})") from error
    own = {name: weight.clone() for name, weight in held.items()}
    try:
        for name, weight in weights.items():
            held[name].copy_(weight if isinstance(weight, Tensor) else weight.dequantize())
        yield
    finally:
        for name, weight in own.items():
            held[name].copy_(weight)
