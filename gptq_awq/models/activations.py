"""Fake quantization of activations and of the key-value cache, for scoring a model that computes with both.

    with quantized_activations(model, act, kv):
        ...                                        # forwards and generate() of `model`

`act` rounds the inputs of the blocks' linears, once for all linears that read the same tensor by one scale; the output
head keeps its full-precision input. Static scales come from the largest input of each linear that calibration saw.
Products are of the dequantized values, in the model's own precision: they equal those of integer kernels but for
rounding errors of sums.

`kv` rounds keys (after their rotation) and values as they enter the key-value cache, and every query reads them from
there, its own token's included. A block that is called without a cache gets one that stores nothing. Each token's key
and value are rounded by themselves, never with later ones: generating token by token reads what one forward over the
whole text reads.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.grids.dynamic import DynamicGrid
from gptq_awq.models.blocks import find_blocks, hooks
from gptq_awq.models.linear import is_linear

CACHE_ARGUMENTS = ("past_key_values", "layer_past")
"""Names of the cache argument in the forward methods of transformers' blocks."""
PROBE_TOKENS = 2
"""Length of the forward that checks whether activations and cache can be rounded."""


@contextmanager
def quantized_activations(
    model: PreTrainedModel, act: DynamicGrid, kv: DynamicGrid, largest: Mapping[str, float] | None = None
) -> Iterator[None]:
    """Context manager under which `model` rounds activations to the grid `act`, and keys and values to the grid `kv`.

    A grid without a label rounds nothing. `largest` holds the largest input of each linear of the blocks by full name,
    which static grids need.

    Raises:
        UserError: naming the option, where the model has no cache to round or groups don't divide its channels.
    """
    with ExitStack() as stack:
        if act.label is not None:
            stack.enter_context(_rounded_sites(model, act, largest or {}))
        if kv.label is not None:
            stack.enter_context(_rounded_cache(model, kv))
        yield


def check_activations(model: PreTrainedModel, act: DynamicGrid, kv: DynamicGrid) -> None:
    """Check on a forward of two tokens that the model can run with activations on `act` and its cache on `kv`.

    Raises:
        UserError: as `quantized_activations` would raise it later, when the model is scored.
    """
    if act.label is None and kv.label is None:
        return
    probe = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=model.device)
    prefix, blocks = find_blocks(model)
    any_largest = {f"{prefix}.{name}": 1.0 for name, module in blocks.named_modules() if is_linear(module)}
    with torch.no_grad(), quantized_activations(model, act, kv, any_largest):
        model(probe, use_cache=False)


@contextmanager
def _rounded_sites(model: nn.Module, act: DynamicGrid, largest: Mapping[str, float]) -> Iterator[None]:
    """Context manager under which the linears of the blocks read rounded inputs."""
    prefix, blocks = find_blocks(model)
    last: list[tuple[Tensor, int, float | None, Tensor]] = []  # q, k and v read one tensor

    def rounds(own: float | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def round_input(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            if not (last and last[0][0] is x and last[0][1:3] == (x._version, own)):
                last[:] = [(x, x._version, own, _on_grid("act", act, x, own))]
            return last[0][3], *args[1:]

        return round_input

    linears = [(f"{prefix}.{name}", module) for name, module in blocks.named_modules() if is_linear(module)]
    own = [largest.get(name) if act.static else None for name, _ in linears]
    with hooks([m.register_forward_pre_hook(rounds(o)) for (_, m), o in zip(linears, own, strict=True)]):
        yield


class RoundedCache:
    """Key-value cache that rounds keys and values before it hands them to the cache it wraps, `inner`.

    `inner` stores them and provides all other attributes; without one, nothing is stored.

    Attributes:
        updates: number of calls of `update`.
    """

    def __init__(self, grid: DynamicGrid, inner: Any = None) -> None:
        self._grid, self._inner = grid, inner
        self.updates = 0

    def update(
        self,
        key: Float[Tensor, "batch heads tokens d"],
        value: Float[Tensor, "batch heads tokens e"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Round new keys and values per token and head; return all to attend to, `inner`'s earlier ones first."""
        self.updates += 1
        key, value = _on_grid("kv", self._grid, key), _on_grid("kv", self._grid, value)
        return (key, value) if self._inner is None else self._inner.update(key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attribute of the wrapped cache."""
        return getattr(self._inner, name)


@contextmanager
def _rounded_cache(model: nn.Module, kv: DynamicGrid) -> Iterator[None]:
    """Context manager under which every block is called with a `RoundedCache` around its own cache, and must use it."""
    _, blocks = find_blocks(model)
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_rounded_cache_of(block, kv))
        yield


@contextmanager
def _rounded_cache_of(block: nn.Module, kv: DynamicGrid) -> Iterator[None]:
    """Context manager that wraps the cache argument of one block's calls. Raises UserError where the block has none."""
    signature = inspect.signature(block.forward)
    argument = next((name for name in CACHE_ARGUMENTS if name in signature.parameters), None)
    if argument is None:
        raise _no_cache(block, kv)
    given: list[RoundedCache] = []

    def wrap(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        call = signature.bind(*args, **kwargs)
        given[:] = [RoundedCache(kv, call.arguments.get(argument))]
        call.arguments[argument] = given[0]
        return call.args, call.kwargs

    def check(_module: nn.Module, _args: tuple, _output: Any) -> None:
        if not given.pop().updates:
            raise _no_cache(block, kv)

    with hooks([block.register_forward_pre_hook(wrap, with_kwargs=True), block.register_forward_hook(check)]):
        yield


def _no_cache(block: nn.Module, kv: DynamicGrid) -> UserError:
    return UserError(f"kv={kv.label}: a {type(block).__name__} keeps no keys and values in a cache; choose kv=none")


def _on_grid(
    option: str, grid: DynamicGrid, x: Float[Tensor, "*rows channels"], largest: float | None = None
) -> Float[Tensor, "*rows channels"]:
    try:
        return grid.rounded(x) if largest is None else grid.rounded(x, largest)
    except ValueError as error:
        raise UserError(f"{option}.{error}") from error
