"""A feedforward backbone whose output an equilibrium block refines."""

from torch import Tensor

from ..calculus import (
    Sublayers,
)
from ..config import configuration
from .base import Damping
from .layered import FeedforwardBlock, _Stack
from .thick import EquilibriumBlock


class AttractorBlock(EquilibriumBlock):
    """A feedforward backbone proposes h; the equilibrium block, clamped to h, refines it to its fixed point (Attractor
    Models).

    Relaxation starts from the proposal, so `solvers.FixedHorizon(steps=0)` evaluates the network with the solver removed.
    """

    def __init__(self, backbone: list[Sublayers], layers: Sublayers, damping: float):
        super().__init__(layers, damping)
        self.backbone = FeedforwardBlock(backbone)

    def drive(self, x: Tensor) -> Tensor:
        return self.backbone.start(x)


@configuration
class Attractor(_Stack):
    """Feedforward backbone of `layers` layers, and a `Thick` head that refines its output to a fixed point."""

    damping: Damping = 0.0

    def build(self, width: int, heads: int, context: int) -> AttractorBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        *backbone, head = self._sublayers(width, heads, self.layers + 1)
        return AttractorBlock(backbone, head, self.damping)
