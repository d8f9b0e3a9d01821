"""Attention as a raw force, the network as a memory's energy."""

import math

from torch import Tensor, nn

from ..calculus import (
    Memory,
    ThinSlope,
    attend,
    dividing,
    merge_heads,
    split_heads,
    standardise,
    standardise_slope,
)
from ..config import configuration
from ..intact import alteration
from .base import Block, Damping, Dynamical, Jacobian, Positive, Scale


class ThinBlock(Dynamical):
    """F(z) = -(z - x) + Attn(LN z) - dE_memory/dz - c z: attention as a raw force, the network as a memory's energy (Hao 2026,
    "thin")."""

    qk_norm = False  # queries and keys enter as they are

    def __init__(self, width: int, heads: int, expansion: int, causal: bool, init: float, damping: float):
        super().__init__()
        self.heads, self.causal, self.damping = heads, causal, damping
        self.qkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        nn.init.normal_(self.qkv.weight, std=1 / math.sqrt(width))
        nn.init.normal_(self.wo.weight, std=init / math.sqrt(width))
        self.memory = Memory(width, expansion, init)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        n, inverse = standardise(z)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(n).chunk(3, -1))
        attention = self.wo(merge_heads(attend(q, k, v, self.causal)))
        return x - (1 + self.damping) * z + attention + standardise_slope(self.memory(n), n, inverse)

    def altered(self) -> str | None:
        return alteration(self, ThinBlock, {"qkv": nn.Linear, "wo": nn.Linear, "memory": Memory})

    def _by_hand(self, z: Tensor, x: Tensor) -> Jacobian:
        return Jacobian(ThinSlope(self, z), z, x, self.parameters, 1 + self.damping, "", self.causal)


@configuration
class Thin(Block):
    """Raw attention force with a modern-Hopfield memory, which needs its damping (Hao 2026, "thin")."""

    damping: Damping = 1.0
    causal: bool = True
    expansion: Positive = 4
    init: Scale = 0.1

    def build(self, width: int, heads: int, context: int) -> ThinBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return ThinBlock(width, dividing(width, heads), self.expansion, self.causal, self.init, self.damping)
