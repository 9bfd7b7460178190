"""Output-side curvature H_O = E[g gᵀ] of every linear (YAQA, arXiv 2505.22988): what the end loss feels of its outputs.

g is the gradient of the model's own loss by the linear's outputs at one token. One backward pass of the calibration
text gives H_O of all linears; solvers/yaqa.py rounds with it.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.calibration.moments import mirrored, upper_products
from gptq_awq.calibration.output_gradients import mean_over_tokens
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.models.offload import check_in_memory
from gptq_awq.runtime.options import NonNegative, PositiveInt, Seed, checked_dataclass
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.checksummed import ChecksummedFile, once


@checked_dataclass
class OutputCurvature:
    """Settings of rounding with output-side curvature.

    Attributes:
        tile: number of rows that are rounded together, without feedback among them.
        damping: fraction of mean(diag H_O) that is added to the diagonal.
        draws: labels drawn per calibration token, a backward pass each; more make H_O less noisy.
        rows: most rows that see each other's errors: a linear with more outputs has blocks of so many.
        windows: calibration windows, the first ones, that gradients are computed on; None: all.
        seed: seed of the labels.
    """

    tile: PositiveInt = 16
    damping: NonNegative = 1.0
    draws: PositiveInt = 1
    rows: PositiveInt = 2048
    windows: PositiveInt | None = None
    seed: Seed = 0

    def check(self, model: Any) -> None:
        """Raise UserError where the model is offloaded: gradients go through the whole of it."""
        check_in_memory(model, "method.output_curvature: gradients go through", "set it to null")

    def gather(
        self, model: Any, tokens: TokenSet, dtype: torch.dtype, track: Track = no_track
    ) -> dict[str, Float[Tensor, "out n"]]:
        """H_O of every linear in the model's blocks that tokens reach, as diagonal blocks below each other.

        Args:
            model: a causal LM in eval mode, in full precision.
            tokens: calibration windows.
            dtype: dtype that the forward and the backward pass compute in.
            track: reports progress over windows.

        Raises:
            UserError: the model is offloaded; a gradient is not finite.
        """
        self.check(model)
        found = mean_over_tokens(model, tokens.first(self.windows), self._products, self.seed, self.draws, track, dtype)
        for name, curvature in found.items():
            for block in curvature.split(curvature.shape[1]):
                mirrored(block[:, : len(block)])
            if not torch.isfinite(curvature).all():
                raise UserError(
                    f"method.output_curvature: gradients at {name} are not finite; try compute_dtype=float32"
                )
        return found

    def kept(
        self, path: Path | None, model: Any, tokens: TokenSet, dtype: torch.dtype, track: Track = no_track
    ) -> dict[str, Float[Tensor, "out n"]]:
        """H_O of every linear as `gather` gives it, read from the file `path` or computed and stored there."""
        if path is None:
            return self.gather(model, tokens, dtype, track)
        compute = partial(self.gather, model, tokens, dtype, track)
        return dict(once(path, "output curvature", lambda: ChecksummedFile(compute())).tensors)

    def unit(self, out: int) -> Float[Tensor, "out n"]:
        """H_O of a linear whose outputs all count alike, in the layout of `gather`: no feedback among rows."""
        return self._blocks([torch.eye(len(rows)) for rows in torch.arange(out).split(self.rows)])

    def needed_bytes(self, model: Any, length: int, dtype: torch.dtype) -> int:
        """Bytes that gathering H_O allocates, about: the curvature itself, one window's activations, and a copy.

        A copy of the parameters is needed where the model has another dtype.
        """
        widths = [matrix(module).shape for module in find_blocks(model)[1].modules() if is_linear(module)]
        kept = sum(4 * out * min(out, self.rows) for out, _ in widths)
        activations = sum(4 * length * (out + columns) for out, columns in widths)
        logits = 16 * length * model.get_input_embeddings().weight.shape[0]
        copied = sum(p.numel() for p in model.parameters()) if model.dtype != dtype else 0
        return kept + 2 * activations + logits + copied * dtype.itemsize

    def _products(self, gradients: Float[Tensor, "tokens out"]) -> Float[Tensor, "out n"]:
        """Sum of g gᵀ over tokens on and above the diagonal, in diagonal blocks; half the work of the whole."""
        blocks = []
        for part in gradients.split(self.rows, 1):
            blocks.append(upper_products(part))
        return self._blocks(blocks)

    def _blocks(self, blocks: list[Float[Tensor, "_ _"]]) -> Float[Tensor, "out n"]:
        """Diagonal blocks below each other; the last one is padded with zeros."""
        if len(blocks) == 1:
            return blocks[0]
        return torch.cat([torch.nn.functional.pad(each, (0, self.rows - each.shape[1])) for each in blocks])
