"""The transformer block of which the state is a fixed point."""

from torch import Tensor

from ..calculus import (
    ParallelSlope,
    Prefix,
    Sublayers,
)
from ..config import configuration
from ..dynamics import projection
from ..intact import alteration
from .base import Block, Damping, Dynamical, Jacobian, Positive, Scale


class EquilibriumBlock(Dynamical):
    """F(z) = -(z - x) + Attn(LN z) + FFN(LN z) - c z: the transformer block of which the state is a fixed point."""

    def __init__(self, layers: Sublayers, damping: float):
        super().__init__()
        self.layers, self.damping = layers, damping

    @property
    def holomorphic(self) -> bool:
        """elu is no holomorphic function, and what altered the block may not be one."""
        return self.altered() is None and not self.layers.linear

    def altered(self) -> str | None:
        return alteration(self, EquilibriumBlock, {"layers": Sublayers})

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - (1 + self.damping) * z + self.layers.parallel(z)

    def _by_hand(self, z: Tensor, x: Tensor) -> Jacobian:
        layers = self.layers
        return Jacobian(ParallelSlope(layers, z), z, x, layers.parameters, 1 + self.damping, "layers.", layers.causal)

    def prefix(self) -> Prefix | None:
        whole = type(self).output is not Dynamical.output or "output" in vars(self)  # may read out several tokens together
        if whole or projection(self) or self.altered() is not None or not self.layers.causal:
            return None
        return Prefix(self.layers, 1 + self.damping)


@configuration
class Thick(Block):
    """Equilibrium block with full multi-head attention and a 4x network (Hao 2026, "thick").

    damping: c >= 0. causal: True for language, False for images. qk_norm: q and k divided by their root mean square per head.
    init: scale of the two output weights at initialisation, in units of 1/sqrt(fan-in).
    """

    damping: Damping = 0.0
    causal: bool = True
    qk_norm: bool = False
    expansion: Positive = 4
    init: Scale = 0.1

    def build(self, width: int, heads: int, context: int) -> EquilibriumBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return EquilibriumBlock(Sublayers(width, heads, self.expansion, self.causal, self.qk_norm, self.init), self.damping)
