"""From gradient dynamics to free attention by one number."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..config import configuration
from .base import Block, Damping, Dynamical, Positive, Scale
from .energy import Energy, EnergyBlock
from .thick import EquilibriumBlock, Thick


class MixedBlock(Dynamical):
    """F = (1 - share) F_energy + share F_free, the forces of an `EnergyBlock`, whose J is symmetric, and of an
    `EquilibriumBlock`, whose J is not: the antisymmetric part of J is share times that of the free one."""

    def __init__(self, energy: EnergyBlock, free: EquilibriumBlock, share: float):
        super().__init__()
        self.energy, self.free, self.share, self.damping = energy, free, share, free.damping

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return (1 - self.share) * self.energy(z, x) + self.share * self.free(z, x)


@configuration
class Mixed(Block):
    """Both blocks side by side, each with its weights; share: of the free one, from 0 (`Energy`) to 1 (`Thick`)."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    damping: Damping = 0.0
    causal: bool = True
    expansion: Positive = 4
    init: Scale = 0.1

    def build(self, width: int, heads: int, context: int) -> MixedBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        energy, free = (kind(damping=self.damping, causal=self.causal, expansion=self.expansion, init=self.init).build(
            width, heads, context) for kind in (Energy, Thick))
        return MixedBlock(energy, free, self.share)  # type: ignore[arg-type]  # in this order
