"""Linear attention over all tokens."""

from typing import Literal

from ..calculus import (
    Sublayers,
    dividing,
)
from ..config import configuration
from .base import Block, Damping, Positive, Scale
from .energy import EnergyBlock
from .thick import EquilibriumBlock


@configuration
class LinearAttention(Block):
    """The MNIST reference: linear attention over all tokens; symmetric: derived from an energy, else with free weights.

    The symmetric form settles only near its initial weights: from init 0.1 relaxation ends in a cycle.
    """

    symmetric: bool = False
    damping: Damping = 0.0
    causal: Literal[False] = False
    expansion: Positive = 4
    init: Scale = 0.03

    def build(self, width: int, heads: int, context: int) -> EquilibriumBlock | EnergyBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        if self.symmetric:
            return EnergyBlock(width, dividing(width, heads), self.expansion, False, True, self.init, self.damping)
        return EquilibriumBlock(Sublayers(width, heads, self.expansion, False, False, self.init, linear=True), self.damping)
