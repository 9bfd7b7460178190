"""Last hidden states of evaluation windows: window by window, or block by block for an offloaded model."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.evaluation.head import Head
from gptq_awq.evaluation.precision import lowered
from gptq_awq.models.blocks import BlockCalls, Call, find_blocks
from gptq_awq.models.offload import offloaded, read_ahead, resident
from gptq_awq.runtime.profiling import phase
from gptq_awq.runtime.progress import Track, no_track


def states_of(
    head: Head, windows: Int[Tensor, "windows tokens"], name: str, track: Track = no_track
) -> Iterable[Float[Tensor, "scored width"]]:
    """Last hidden states of each window in turn, at every position but the last, which predicts no token of it.

    A model in memory runs one forward per window, when the caller asks for it. An offloaded model runs all windows
    through each block, so that a block is read from disk once; `track` reports this under `name`.
    """
    if offloaded(head.model):
        return _blockwise(head, windows, name, track)
    return (window_states(head, window) for window in windows)


def window_states(head: Head, window: Int[Tensor, "tokens"]) -> Float[Tensor, "scored width"]:
    """Last hidden states of one window at every position but the last."""
    return head.hidden(window[None].to(head.model.device))[0, :-1]


@torch.no_grad()
def _blockwise(
    head: Head, windows: Int[Tensor, "windows tokens"], name: str, track: Track
) -> list[Float[Tensor, "scored width"]]:
    """Last hidden states of all windows of an offloaded model, one block after the other."""
    _, blocks = find_blocks(head.decoder)
    embedding = head.model.get_input_embeddings()
    with resident(embedding), lowered(head.compute_dtype):
        recorder = BlockCalls(head.decoder, blocks)
        records = [recorder.record(window[None]) for window in windows]
    hidden, calls = [h for h, _ in records], [c for _, c in records]
    for index in track(range(len(blocks)), f"{name}: blocks", len(blocks)):
        if index + 1 < len(blocks):
            read_ahead(blocks[index + 1])
        with resident(blocks[index]), lowered(head.compute_dtype):
            hidden = _through(blocks[index], hidden, [call[index] for call in calls])
    # `finish` runs the decoder again without its blocks, from the embedding to the last norm.
    with resident(embedding), lowered(head.compute_dtype):
        outputs = [recorder.finish(window[None], h) for window, h in zip(windows, hidden, strict=True)]
    return [output["last_hidden_state"][0, :-1] for output in outputs]


def _through(block: torch.nn.Module, hidden: Sequence[Tensor], calls: Sequence[Call]) -> list[Tensor]:
    """Hidden states of each window after one block."""
    out = []
    for states, call in zip(hidden, calls, strict=True):
        with phase("score/forward", *states.shape[:2]):
            out.append(call.run(block, states))
    return out
