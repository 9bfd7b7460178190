"""Padding masks for the inputs of experts, whose rows are a selection of a batch's tokens.

An expert reads `hidden[index]`, rows selected from a batch's tokens, so the batch's mask does not fit its input.
`PickedRows` observes these selections: an expert's first linears read the rows selected last, and its later linears
see the same tokens.
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
    """A torch function mode that remembers which tokens of the batch the rows of every expert's input are.

    Forwards may run in greenlets: each has its own memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Tensor, Tensor] | None = None
        self._by_forward: WeakKeyDictionary[greenlet, tuple[int | None, Tensor]] = WeakKeyDictionary()

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
        """The mask of an expert's input, True at rows of real tokens; call it while the site's first linear is called.

        Args:
            site: the expert's site.
            x: its input.
            mask: the batch's mask.
            where: names the block in errors.

        Raises:
            UserError: the selection of these rows was not observed.
        """
        forward, count = getcurrent(), x.shape[:-1].numel()
        picked, known = self._last, self._by_forward.get(forward)
        if picked is not None and len(picked[1]) == count and _share_memory(picked[0], x):
            self._by_forward[forward] = (site.expert, picked[1])
            return mask.flatten()[picked[1]].view(x.shape[:-1])
        if known is not None and known[0] == site.expert and len(known[1]) == count:
            return mask.flatten()[known[1]].view(x.shape[:-1])
        raise UserError(
            f"data.packing=documents: which of the tokens that reach {where}, {site.name} are padding can't be told; "
            "choose data.packing=windows"
        )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
