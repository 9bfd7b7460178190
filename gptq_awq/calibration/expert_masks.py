"""Which rows of an expert's input are padding.

Experts are handed rows picked from a batch's tokens, `hidden[index]`, so a batch's mask doesn't fit them. The picking
is watched: an expert's first linears read what was picked last, the later ones of the same expert the same tokens.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from greenlet import getcurrent, greenlet
from jaxtyping import Bool, Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptq_awq.errors import UserError
from gptq_awq.models.linear import Site


class PickedRows(TorchFunctionMode):
    """Within: knows of every expert's input which tokens it is of. Forwards may run in greenlets."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Tensor, Tensor] | None = None
        self._of: WeakKeyDictionary[greenlet, tuple[int | None, Tensor]] = WeakKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None):
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__ and args[0].dim() == 2:
            rows = [i for i in (args[1] if isinstance(args[1], tuple) else (args[1],)) if isinstance(i, Tensor)]
            if len(rows) == 1 and rows[0].dim() == 1 and rows[0].dtype == torch.long:
                self._last = (out, rows[0])
        return out

    def mask(
        self, site: Site, x: Float[Tensor, "rows in"], mask: Bool[Tensor, "batch tokens"], where: str
    ) -> Bool[Tensor, "rows"]:
        """True at rows of real tokens, at the moment when the expert's linears are called.

        Raises:
            UserError: nobody saw where the rows are from.
        """
        forward, count = getcurrent(), x.shape[:-1].numel()
        picked, known = self._last, self._of.get(forward)
        if picked is not None and len(picked[1]) == count and _share_memory(picked[0], x):
            self._of[forward] = (site.expert, picked[1])
            return mask.flatten()[picked[1]].view(x.shape[:-1])
        if known is not None and known[0] == site.expert and len(known[1]) == count:
            return mask.flatten()[known[1]].view(x.shape[:-1])
        raise UserError(
            f"data.packing=documents: which of the tokens that reach {where}, {site.name} are padding can't be told; "
            "choose data.packing=windows"
        )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
