"""The transformer block of which the state is a fixed point."""

import torch
from pydantic import model_validator
from torch import Tensor, nn

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
    """F(z) = -(z - x) + Attn(LN z) + FFN(LN z) - c z: the transformer block of which the state is a fixed point.

    learned: c is a parameter of every channel, positive, at first the same.
    """

    def __init__(self, layers: Sublayers, damping: float, learned: bool = False):
        super().__init__()
        self.layers, self.damping = layers, damping
        self.log_damping = nn.Parameter(torch.zeros(layers.width)) if learned else None

    @property
    def state_decay(self) -> float | Tensor:
        return 1 + (self.damping if self.log_damping is None else self.damping * self.log_damping.exp())

    @property
    def holomorphic(self) -> bool:
        """elu is no holomorphic function, and what altered the block may not be one."""
        return self.altered() is None and not self.layers.linear

    def altered(self) -> str | None:
        return alteration(self, EquilibriumBlock, {"layers": Sublayers})

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - self.state_decay * z + self.layers.parallel(z)

    def _by_hand(self, z: Tensor, x: Tensor) -> Jacobian:
        layers = self.layers
        return Jacobian(ParallelSlope(layers, z), z, x, self.weights, self.state_decay, "layers.", layers.causal,
                        self.log_damping is not None)

    def weights(self) -> list[Tensor]:
        """What the force goes through."""
        return [*self.layers.parameters(), *self.parameters(recurse=False)]

    def prefix(self) -> Prefix | None:
        whole = type(self).output is not Dynamical.output or "output" in vars(self)  # may read out several tokens together
        if whole or projection(self) or self.altered() is not None or not self.layers.causal:
            return None
        return Prefix(self.layers, self.state_decay)


@configuration
class Thick(Block):
    """Equilibrium block with full multi-head attention and a 4x network (Hao 2026, "thick").

    damping: c >= 0. causal: True for language, False for images. qk_norm: q and k divided by their root mean square per head.
    init: scale of the two output weights at initialisation, in units of 1/sqrt(fan-in). learned_damping: c is a positive
    parameter of every channel, at first `damping`. gated: gamma_max of learned gates gamma_max sigmoid(g) on every channel of
    the outputs of attention and network; None for no gates.
    """

    damping: Damping = 0.0
    learned_damping: bool = False
    causal: bool = True
    qk_norm: bool = False
    expansion: Positive = 4
    init: Scale = 0.1
    gated: Scale | None = None

    @model_validator(mode="after")
    def _positive(self) -> "Thick":
        if self.learned_damping and not self.damping:
            raise ValueError("a learned damping is positive and starts at damping=0.0; choose a damping above 0")
        return self

    def build(self, width: int, heads: int, context: int) -> EquilibriumBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        layers = Sublayers(width, heads, self.expansion, self.causal, self.qk_norm, self.init, gated=self.gated)
        return EquilibriumBlock(layers, self.damping, self.learned_damping)
