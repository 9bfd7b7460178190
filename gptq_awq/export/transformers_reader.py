"""Check of transformers' own reader for packed formats, before calibration: it builds a model whose linears are packed.

Some classes initialize the weights of certain linears, or tie them between layers, whatever is loaded; a packed linear
has no such weight. The checkpoint is whole, and other engines may read it.
"""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from gptq_awq.models.linear import is_linear


def unread(model: PreTrainedModel, packed: Iterable[str]) -> str | None:
    """Say why transformers can't read a checkpoint of a model in which these linears are packed; None if it can.

    No weights are made: the model is built anew without data, its packed linears lose their weight, and transformers
    initializes and ties the rest.
    """
    with torch.device("meta"):
        empty = type(model)(model.config)
    own = dict(empty.named_modules())
    for name in packed:
        if name in own and is_linear(own[name]):  # not an expert, which is fused there
            del own[name].weight
    try:
        empty.initialize_weights()
        empty.tie_weights(recompute_mapping=False)
    except AttributeError as error:
        return f"transformers can't load packed linears of {type(model).__name__} ({error}); other engines may"
    return None
