"""Chain check: blocks that calibration runs one by one get the inputs that they have in the model's own forward.

The model's own forward is observed block by block. Each block, called with the arguments that calibration recorded for
it and with the hidden states of the own forward, must return the same; its arguments must be those of the own forward,
and its hidden states what the block before returned. By induction the chain of blocks is the model, for a few more
forwards of a few tokens.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from gptq_awq.calibration.activations import check_hidden
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.models.blocks import BlockCalls, Call, find_blocks, hidden_of, hooks, take, update_error
from gptq_awq.models.offload import offloaded
from gptq_awq.models.steady import check_unchanged, state_of, versions
from gptq_awq.models.walk import Walk

log = logging.getLogger(__name__)
WINDOWS, TOKENS = 2, 8
"""Size of the probe: with one window alone, a block that mixes windows, or has them second, looks right."""

ANSWERED = "_answered_alone"
"""Attribute of a model that says for which state of it, and which probe, `why_not_alone` gave which answer."""


@torch.no_grad()
def check_chain(model: nn.Module, tokens: TokenSet | None, calibrates: bool) -> None:
    """Check that calibration gives the model's blocks the inputs that they have in the model's own forward.

    Blocks that can't be run one by one are run within the model's own forwards (`models.walk`); that is checked, too.
    An offloaded model is not checked, as each forward would read it from disk once more; the log says so.

    Args:
        model: a causal LM.
        tokens: calibration windows, whose first tokens are the probe; None takes the first ids of the vocabulary.
        calibrates: whether the method looks at data. For one that doesn't, a chain that breaks is logged only.

    Raises:
        UserError: naming the first block that differs, or a weight that the forward changes.
    """
    name = type(model).__name__
    if offloaded(model):
        log.info("chain check: skipped, as the weights of %s are read from disk for each forward", name)
        return
    before = versions(model)
    alone = why_not_alone(model, tokens)
    check_unchanged(model, before)
    if alone is None:
        return
    within = _broken_by(lambda: _compare_walk(model, *_probe(model, tokens)), name)
    if within is None:
        log.info("%s: so they are run within the model's own forward", alone)
    elif calibrates:
        raise within
    else:
        level = logging.WARNING if isinstance(within, _OrderError) else logging.INFO
        log.log(level, "%s: this run looks at none, and rounds them all the same", within)


@torch.no_grad()
def why_not_alone(model: nn.Module, tokens: TokenSet | None) -> UserError | None:
    """First fault of a model's blocks run one by one on recorded arguments; None: there is none, or it is offloaded."""
    if offloaded(model):
        return None
    probe = None if tokens is None else _probe(model, tokens)
    asked = state_of(model), probe and [None if part is None else part.tolist() for part in probe]
    before, answer = vars(model).get(ANSWERED, (None, None))
    if before != asked:
        answer = _broken_by(lambda: _compare(model, *_probe(model, tokens)), type(model).__name__)
        answer = answer and answer.with_traceback(None)  # which holds activations
        vars(model)[ANSWERED] = asked, answer
    return answer


def _broken_by(compare: Callable[[], None], name: str) -> UserError | None:
    """The error of a comparison, as the user is told of it; None where all is equal."""
    try:
        compare()
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        return error
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, StopIteration) as error:
        own = f"blocks of {name} can't be run one by one ({type(error).__name__}: {' '.join(str(error).split())})"
        return UserError(f"model: {own}; method=rtn needs no data")
    return None


def _probe(
    model: nn.Module, tokens: TokenSet | None
) -> tuple[Int[Tensor, "windows tokens"], Bool[Tensor, "windows tokens"] | None]:
    """The first tokens of the first calibration windows and their mask, or ids from 0 on."""
    if tokens is None:
        vocabulary = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
        return torch.arange(WINDOWS * TOKENS).view(WINDOWS, -1) % vocabulary, None
    part = slice(WINDOWS), slice(TOKENS)
    return tokens.ids[part], None if tokens.mask is None else tokens.mask[part]


@dataclass(frozen=True)
class _Passage:
    """One call of a block in the model's own forward: its number, hidden states before and after, other arguments."""

    index: int
    entered: Tensor
    returned: Tensor
    call: Call


class _OrderError(UserError):
    """Error of a model that doesn't call each of its blocks once, in order: text may pass none of what is rounded."""


def _compare(model: nn.Module, ids: Tensor, mask: Tensor | None) -> None:
    """Compare the blocks one by one with the model's own forward.

    Raises:
        UserError: blocks that are not called once each, in order; naming the first block that differs.
    """
    _, blocks = find_blocks(model)
    passages = _own_forward(model, blocks, ids, mask)
    _check_order([each.index for each in passages], len(blocks))
    given, calls = BlockCalls(model, blocks).record(ids, mask)
    check_hidden(given, type(model).__name__)
    if given.shape[0] != len(ids) or (mask is not None and given.shape[1] != ids.shape[1]):
        raise _broken(f"block 0 gets hidden states of shape {tuple(given.shape)} for {tuple(ids.shape)} ids")
    real = (torch.ones(given.shape[:2], dtype=torch.bool) if mask is None else mask).to(given.device)
    for each, call in zip(passages, calls, strict=True):
        index, entered, returned = each.index, each.entered, each.returned
        if not bool(torch.isfinite(returned[real]).all()):
            return  # calibration names the values that aren't finite
        _check(index, "gets other hidden states than the block before returns", given[real], entered[real])
        kept = entered.clone()
        found = call.run(blocks[index], entered)
        if not torch.equal(entered, kept):
            raise _broken(f"block {index} overwrites its input")
        what = "returns something else by itself than in the model's forward"
        _check(index, what, found[real], returned[real], kept[real])
        _check_arguments(index, call, each.call)
        call.run(blocks[index], entered.flip(1))  # another batch: blocks that remember would hand its states on
        given = returned


def _compare_walk(model: nn.Module, ids: Tensor, mask: Tensor | None) -> None:
    """Compare forwards that wait at each block with the model's own forward; two batches take turns.

    Raises:
        UserError: blocks that are called in another order than they are listed, change what they are given, or
            remember; hidden states that a mask doesn't fit.
    """
    _, blocks = find_blocks(model)
    passages = _own_forward(model, blocks, ids, mask)
    first = list(dict.fromkeys(each.index for each in passages))
    if first != sorted(first) or not first:
        said = f"calls its {len(blocks)} blocks in another order than they are listed, block {first[:1]} first"
        raise _OrderError(str(_broken(said)))
    walk, other = Walk(model, blocks, ids, mask), Walk(model, blocks, ids.flip(1), mask)
    if mask is not None and walk.hidden.shape[:2] != ids.shape:
        raise _broken(f"block 0 gets hidden states of shape {tuple(walk.hidden.shape)} for {tuple(ids.shape)} ids")
    for each in passages:
        if walk.index != each.index or other.index != each.index:
            raise _broken(f"calls block {each.index} for some texts only")
        block, kept = blocks[each.index], walk.hidden.clone()
        if not bool(torch.isfinite(each.returned).all()):
            return  # calibration names the values that aren't finite
        _check_all(each.index, "gets other hidden states than in the model's forward", kept, each.entered)
        walk.call.whole(block, walk.hidden)
        if not torch.equal(walk.hidden, kept):
            raise _broken(f"block {each.index} overwrites its input")
        others = other.call.whole(block, other.hidden)
        output = walk.call.whole(block, walk.hidden)
        _check_all(each.index, "returns something else when it is called again", hidden_of(output), each.returned)
        walk.leave(output)
        other.leave(others)


def _check_all(index: int, what: str, found: Tensor, expected: Tensor) -> None:
    """Raise UserError where hidden states differ in shape, or by more than rounding."""
    rounding = torch.finfo(expected.dtype).eps ** 0.5
    if found.shape != expected.shape or not float((found - expected).norm()) <= rounding * float(expected.norm()):
        raise _broken(f"block {index} {what}")


def _check_order(order: list[int], count: int) -> None:
    """Raise _OrderError unless the forward called each of the blocks once, the first one first."""
    if len(set(order)) < count:
        raise _OrderError(f"model: calls {len(set(order))} of its {count} blocks; all of them are needed")
    wrong = next((i for i, index in enumerate(order) if index != i), None)
    if wrong is not None:
        said = f"calls its {count} blocks {len(order)} times, block {order[wrong]} as number {wrong}"
        raise _OrderError(str(_broken(said)))


def _check(index: int, what: str, found: Tensor, expected: Tensor, before: Tensor | None = None) -> None:
    """Raise UserError where hidden states of any token differ, relative to what was added to those `before`."""
    error = update_error(found, expected, torch.zeros_like(expected) if before is None else before)
    if not error <= torch.finfo(expected.dtype).eps ** 0.5:
        raise _broken(f"block {index} {what} (by {error:.1e})")


def _check_arguments(index: int, found: Call, expected: Call) -> None:
    """Raise UserError where a block's other tensors differ; a short probe may not show it in what the block returns."""
    calibration, own = ({**dict(_named(x.args)), **dict(_named(x.kwargs))} for x in (found, expected))
    for name in sorted(calibration.keys() | own.keys()):
        a, b = calibration.get(name), own.get(name)
        if a is None or b is None or a.shape != b.shape or not torch.allclose(_real(a), _real(b), equal_nan=True):
            raise _broken(f"block {index} gets another argument {name} than in the model's forward")


def _real(value: Tensor) -> Tensor:
    """A tensor in float32; of a complex one (Llama 4's rotations) both parts."""
    return (torch.view_as_real(value) if value.is_complex() else value).float()


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested tuples, lists and mappings, by keyword or place."""
    if isinstance(value, Tensor):
        yield name.strip("."), value
    elif isinstance(value, (tuple, list)):
        for place, item in enumerate(value):
            yield from _named(item, f"{name}.{place}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{name}.{key}")


def _broken(what: str) -> UserError:
    return UserError(f"model: {what}, which calibration, block by block, can't follow; method=rtn needs no data")


def _own_forward(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, mask: Tensor | None) -> list[_Passage]:
    """Each call of a block in one ordinary forward of the model, in order."""
    passages: list[_Passage] = []
    entered: list[Tensor] = []

    def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        entered.append(take(args, kwargs)[0].clone())

    def leave(index: int):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            returned = hidden_of(output).clone()
            passages.append(_Passage(index, entered.pop(), returned, take(args, kwargs)[1]))

        return hook

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave(i), with_kwargs=True) for i, block in enumerate(blocks)]
    with hooks(handles):
        device = next(model.parameters()).device
        attention = None if mask is None else mask.to(device, torch.long)
        model(input_ids=ids.to(device), attention_mask=attention, use_cache=False)
    return passages
