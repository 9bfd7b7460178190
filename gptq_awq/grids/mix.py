"""llama.cpp's file types: which of its formats each weight of a model gets, Q4_K_M and the like.

The names stand for mixes: most weights in one type, those that matter more (attention values, the MLP's last layer in
some blocks, the output head) in a longer one; where a width isn't whole blocks of 256, the type that llama.cpp falls
back to. The rules are those of its quantizer (src/llama-quant.cpp, release 11434) for dense models.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gptq_awq.errors import UserError
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.base import Grid, Place
from gptq_awq.grids.kquant import BLOCK, TYPES, KGrid
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.grids.ternary import TernaryGrid

ROLES = {
    "attn_v": r"v_proj|attention\.wv",
    "attn_qkv": r"qkv_proj|c_attn|query_key_value|Wqkv",
    "attn_output": r"o_proj|out_proj|attn\.c_proj|attention\.(dense|wo)",
    "ffn_down": r"down_proj|fc2|mlp\.c_proj|dense_4h_to_h|feed_forward\.w2",
    "embedding": r"embed_tokens|wte|embed_in|word_embeddings",
    "output": r"lm_head|embed_out",
}
FALLBACK = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
}
# Most weights' type by file type.
BASE = {name: name for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q6_k", "tq1_0", "tq2_0")} | {
    f"{base}_{size}": base for base, sizes in {"q3_k": "sml", "q4_k": "sm", "q5_k": "sm"}.items() for size in sizes
}


@dataclass(frozen=True)
class LlamaMix:
    """A llama.cpp file type as a choice of grids.

    Attributes:
        type: q4_0 q4_1 q5_0 q5_1 q8_0 iq4_nl q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k tq1_0 tq2_0.
        search: how ranges are chosen: minmax, mse or hessian.
        embeddings: whether the embedding and the output head are rounded too (to nearest), as llama.cpp does.

    Raises:
        UserError: a type that there isn't.
    """

    type: str = "q4_k_m"
    search: str = "minmax"
    embeddings: bool = True

    def __post_init__(self) -> None:
        if self.type not in BASE:
            raise UserError(f"grid.type={self.type}: choose one of {', '.join(sorted(BASE))}")
        llama_grid(BASE[self.type], self.search)

    @property
    def bits(self) -> float:
        """Of most weights' codes."""
        return llama_grid(BASE[self.type]).bits

    @property
    def group_size(self) -> int:
        """Of most weights."""
        return llama_grid(BASE[self.type]).group_size

    @property
    def label(self) -> str:
        """Its llama.cpp name."""
        return self.type

    @property
    def needs_hessian(self) -> bool:
        """Only the `hessian` search does."""
        return self.search == "hessian"

    def at(self, place: Place) -> Grid | None:
        """The grid of one weight; None leaves it in 16 bits."""
        role = role_of(place.name)
        if role in ("embedding", "output"):
            if not self.embeddings and not place.head:
                return None
            # No Hessian there; and from 6 bits on there is nothing to gain from a search of millions of weights.
            kind = self._end(role, place)
            search = "minmax" if kind in ("q6_k", "q8_0") or self.search == "minmax" else "mse"
        else:
            kind, search = _inner(self.type, role, place), self.search
        if place.columns % BLOCK and kind in FALLBACK:
            kind = FALLBACK[kind]
        return None if place.columns % 32 and role in ("embedding", "output") else llama_grid(kind, search)

    def _end(self, role: str, place: Place) -> str:
        """The output head, and an embedding that is one too, get Q6_K, unless all get Q8_0."""
        base = BASE[self.type]
        if base in ("tq1_0", "tq2_0"):
            return "q6_k" if role == "output" or place.tied else "q4_k"
        return "q6_k" if (role == "output" or place.tied) and base != "q8_0" else base


def role_of(name: str) -> str:
    """What a module is to llama.cpp, by its name in transformers ("" for those that no rule names)."""
    for role, pattern in ROLES.items():
        if re.search(rf"(^|\.)({pattern})$", name):
            return role
    return ""


def llama_grid(kind: str, search: str = "minmax") -> Grid:
    """One of llama.cpp's formats as a grid."""
    if kind in TYPES:
        return KGrid(kind, search)  # pyright: ignore[reportArgumentType]
    if kind.startswith("tq"):
        how, bits = "absmean" if search == "minmax" else search, {"tq1_0": 1.625, "tq2_0": 2.0}[kind]
        return TernaryGrid(BLOCK, how, bits=bits)  # pyright: ignore[reportArgumentType]
    if kind == "iq4_nl":
        return TableGrid("iq4_nl", 32, search)  # pyright: ignore[reportArgumentType]
    bits, minimum = int(kind[1]), kind.endswith("_1")
    return (AffineGrid if minimum else SignedGrid)(bits, 32, search)  # pyright: ignore[reportArgumentType]


def _inner(file_type: str, role: str, place: Place) -> str:
    """The type of a weight inside a block, before any fallback."""
    base, i, n = BASE[file_type], place.block, place.blocks
    rules: Mapping[tuple[str, str], str] = {
        ("q2_k", "attn_v"): "q4_k" if place.shared_kv >= 4 else "q3_k",
        ("iq4_nl", "attn_v"): "q5_k" if place.shared_kv >= 4 else base,
        ("iq4_nl", "ffn_down"): "q5_k" if i < n // 8 else base,
        ("q2_k", "ffn_down"): "q3_k",
        ("q2_k", "attn_output"): "q3_k",
        ("q3_k_m", "attn_v"): "q5_k" if i < 2 else "q4_k",
        ("q3_k_m", "ffn_down"): "q5_k" if i < n // 16 else "q4_k",
        ("q3_k_m", "attn_output"): "q4_k",
        ("q3_k_m", "attn_qkv"): "q4_k",
        ("q3_k_l", "attn_v"): "q5_k",
        ("q3_k_l", "ffn_down"): "q5_k",
        ("q3_k_l", "attn_output"): "q5_k",
        ("q3_k_l", "attn_qkv"): "q4_k",
        ("q4_k_s", "attn_v"): "q5_k" if i < 4 else base,
        ("q4_k_s", "ffn_down"): "q5_k" if i < n // 8 else base,
        ("q4_k_m", "attn_v"): "q6_k" if _more_bits(i, n) else base,
        ("q4_k_m", "ffn_down"): "q6_k" if _more_bits(i, n) else base,
        ("q4_k_m", "attn_qkv"): "q5_k",
        ("q5_k_m", "attn_v"): "q6_k" if _more_bits(i, n) else base,
        ("q5_k_m", "ffn_down"): "q6_k" if _more_bits(i, n) else base,
        ("q5_k_m", "attn_qkv"): "q6_k",
    }
    return rules.get((file_type, role), base)


def _more_bits(block: int, blocks: int) -> bool:
    """The first and the last eighth of the blocks, and every third between them."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
