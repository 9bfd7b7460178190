"""Quantizing a model in memory: from texts to a checkpoint, a report and a comparison with full precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_awq.api.compared import ModelComparison, compare_models
from gptq_awq.api.inputs import SEQLEN, Texts, token_set
from gptq_awq.api.methods import load_method
from gptq_awq.api.saving import save_model
from gptq_awq.api.summary import ModelReport
from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.export.loading import load_checkpoint
from gptq_awq.grids.base import GridChoice, QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.footprint import Footprint
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import Settings, examine, quantize
from gptq_awq.runtime.memory import make_private
from gptq_awq.runtime.progress import Track, no_track, rich_track


@dataclass(frozen=True, repr=False)
class QuantizedModel:
    """A model quantized in place, with what checkpoints and reports need.

    Attributes:
        model: the model that was passed in; its linears hold dequantized weights.
        weights: module name → codes, scales, zeros.
        ledger: one row per linear.
        method: that quantized it; None where that isn't known.
        tokenizer: of the model, where one was passed.
        calibration: windows that it was calibrated on; None: no data.
    """

    model: nn.Module
    weights: dict[str, QuantizedWeight]
    ledger: list[dict[str, Any]]
    method: Method | None = None
    tokenizer: Any = None
    calibration: TokenSet | None = field(default=None)

    def __repr__(self) -> str:
        name = "" if self.method is None else f"{self.method.name}, "
        size = self.footprint.model_bytes(self.model) / 1e6
        return (
            f"QuantizedModel({type(self.model).__name__}, {name}{len(self.weights)} linears, "
            f"{self.footprint.bits_per_weight:.3g} bits per weight, {size:.1f} MB)"
        )

    @property
    def footprint(self) -> Footprint:
        """Stored sizes of the quantized weights."""
        found = Footprint()
        found.add(self.weights)
        return found

    def save(self, folder: Path | str, format: str = "hf", tokenizer: Any = None, **options: Any) -> Path:
        """Write a checkpoint that engines load, decode it again, and compare it with the weights in memory.

        Args:
            folder: that becomes the checkpoint: new, empty, or an earlier checkpoint, which is replaced.
            format: one of export.formats: gptq, awq, compressed_tensors, gguf, mlx, bnb, hf.
            tokenizer: of the model; None: the one that `quantize_model` was passed.
            options: of the format, as in `export.FORMAT` of the configs (`dtype="float32"`).

        Returns:
            The folder.

        Raises:
            UserError: the format can't store this model exactly, and what would fit; no tokenizer; the folder holds
                something else or can't be written.
        """
        return save_model(self, Path(folder), format, tokenizer or self.tokenizer, options)

    def report(self) -> ModelReport:
        """Sum up sizes and errors: `print` shows a table, a notebook renders it, `.worst` names the worst linears."""
        return ModelReport.of_model(self.model, self.footprint, self.ledger, self.method)

    def compare(
        self,
        model: PreTrainedModel,
        texts: "Int[Tensor, 'n seqlen'] | TokenSet | Texts | None" = None,
        prompts: Texts = (),
        tokenizer: Any = None,
        seqlen: int = SEQLEN,
        tokens: int = 64,
    ) -> ModelComparison:
        """Score this model and full precision on the same tokens, and let both go on from prompts.

        Args:
            model: the same model before it was quantized (quantizing is in place: keep a copy, or load it again).
            texts: texts or token ids to score; None: the calibration windows, which flatter the quantized model.
            prompts: to go on from, greedily.
            tokenizer: of the model; None: the one that `quantize_model` was passed.
            seqlen: tokens per window of texts.
            tokens: most tokens to write after a prompt.

        Raises:
            UserError: nothing to compare on; texts or prompts without a tokenizer; `model` is this very model.
        """
        tokenizer = tokenizer or self.tokenizer
        if model is self.model:
            raise UserError("model: is the quantized one itself; pass a full-precision copy of it")
        windows = token_set(texts, tokenizer, seqlen, "text", model) if texts is not None else self.calibration
        prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        return compare_models(model, self.model, windows, prompts, tokenizer, tokens)


def quantize_model(
    model: nn.Module,
    calibration: "Int[Tensor, 'n seqlen'] | TokenSet | Texts | None" = None,
    method: str | Method = "awq",
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool | None = None,
    *,
    grid: GridChoice | str | None = None,
    tokenizer: Any = None,
    seqlen: int = SEQLEN,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    track: Track | None = None,
    experts: ExpertPolicy = ExpertPolicy(),  # noqa: B008 (frozen)
    head: str | None = None,
    untie_head: bool = False,
    **options: Any,
) -> QuantizedModel:
    """Quantize all linears in a causal LM's blocks, in place.

        quantized = quantize_model(model, texts, method="gptq", bits=3, tokenizer=tokenizer, damping=0.1)

    Fused experts become linears, which `gptq_awq.models.experts.fuse` puts together again for saving.

    Args:
        model: a transformers causal LM in eval mode.
        calibration: texts, with a tokenizer, or token ids, one row per window; None for methods that need no data.
        method: a preset's name (configs/method), which may have a grid of its own, or a Method.
        bits: 2 to 8; None: 4, or the grid's own.
        group_size: columns that share a scale; -1 for per channel; None: 64, or the grid's own.
        sym: symmetric grid; None: no, or the grid's own.
        grid: instead of the preset's: a name of configs/grid ("q4_k_m"), a grid, or a mix of them.
        tokenizer: of the model, for texts, `save` and `compare`.
        seqlen: tokens per window of texts.
        settings: how calibration computes.
        track: reports progress; None: bars on a terminal and in a notebook, nothing elsewhere.
        experts: what calibrates experts that few tokens reach.
        head: what becomes of the output head, None, "rtn" or "solve", and
        untie_head: whether a tied one may get a matrix of its own for that: see `Method`.
        options: of the preset and its grid, by name: `damping=0.1`, `act_order=False`, `search="mse"`.

    Raises:
        UserError: as `gptq_awq.quantization.quantize.quantize` and `load_method` do.
    """
    method, grid = _chosen(method, grid, (bits, group_size, sym), options)
    make_private(model.parameters())
    windows = token_set(calibration, tokenizer, seqlen, "calibration", model)
    if head is not None or untie_head:
        method = replace(method, head=head, untie_head=untie_head)
    with _reporting(track) as told:
        if method.self_calibration is not None and windows is not None:
            dtype = resolve_compute_dtype(settings.compute_dtype, next(model.parameters()).device)
            windows = method.self_calibration.extend(model, windows, dtype, told)
        done = QuantizedModel(model, {}, [], method, tokenizer, windows)
        if (coverage := examine(model, windows, method, grid)) is not None:
            coverage.tell()
        for block in quantize(model, windows, method, grid, settings, told, experts=experts):
            done.weights.update(block.weights)
            done.ledger.extend(block.rows)
    return done


def load_quantized(folder: Path | str) -> PreTrainedModel:
    """Load a checkpoint that `QuantizedModel.save` or export.formats wrote, with its dequantized weights, in float32.

    It runs wherever PyTorch does, and takes the memory of full precision; to run it packed, use an engine of
    docs/export.md. Its tokenizer: `transformers.AutoTokenizer.from_pretrained(folder)`.

    Raises:
        UserError: the folder holds no such checkpoint, or it can't be decoded.
    """
    return load_checkpoint(folder)[0]


def _chosen(
    method: str | Method,
    grid: GridChoice | str | None,
    wanted: tuple[int | None, int | None, bool | None],
    options: dict[str, Any],
) -> tuple[Method, GridChoice]:
    """Method and grid as objects. Raises UserError for options beside an object, which has its own."""
    bits, group_size, sym = wanted
    if isinstance(method, str):
        if grid is None or isinstance(grid, str):
            return load_method(method, bits, group_size, sym, grid, options)
        return load_method(method, options=options)[0], grid
    if options:
        raise UserError(f"{next(iter(options))}: an option of a preset's name; a Method object has its own")
    if isinstance(grid, str):
        return method, load_method("rtn", bits, group_size, sym, grid)[1]
    made = IntGrid(4 if bits is None else bits, group_size or 64, bool(sym), scale_dtype="float16")
    return method, made if grid is None else grid


@contextmanager
def _reporting(track: Track | None) -> Iterator[Track]:
    """Progress to report to: the one given, else bars where there is somebody to see them."""
    console = Console(stderr=True)
    if track is None and (console.is_interactive or console.is_jupyter):
        with rich_track(console, brief=True) as bars:
            yield bars
    else:
        yield track or no_track
