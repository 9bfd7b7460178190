"""A key-value cache that writes into memory reserved for the whole text, where transformers' own copies itself.

Its `DynamicCache` concatenates all keys and values seen so far with each new token's: for 96 texts of 512 tokens that
takes longer than the model's own products.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def reserved_cache(model: Any, length: int) -> DynamicCache | None:
    """A cache for texts of `length` tokens, for a model that generates with `DynamicCache`; None for any other.

    Layers with windows and states of their own keep transformers' classes.
    """
    takes_it = getattr(model, "_supports_default_dynamic_cache", lambda: False)()
    if not takes_it or model.config.is_encoder_decoder:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not any(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [_ReservedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _ReservedLayer(DynamicLayer):
    """Keys and values of one attention layer, in memory for `length` tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._reserved: tuple[Tensor, Tensor] | None = None

    def update(
        self,
        key_states: Float[Tensor, "batch kv new d"],
        value_states: Float[Tensor, "batch kv new e"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch kv tokens d"], Float[Tensor, "batch kv tokens e"]]:
        """Add new tokens' keys and values, and return those of all tokens, views of the reserved memory."""
        seen = self.get_seq_length()
        total = seen + key_states.shape[2]
        if total > self._length:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not seen:
            sizes = [(*x.shape[:2], self._length, x.shape[3]) for x in (key_states, value_states)]
            self._reserved = key_states.new_empty(sizes[0]), value_states.new_empty(sizes[1])
        for memory, new in zip(self._reserved or (), (key_states, value_states), strict=True):
            memory[:, :, seen:total] = new
        self.keys, self.values = (memory[:, :, :total] for memory in self._reserved or ())
        return self.keys, self.values
