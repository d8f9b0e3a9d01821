"""A feedforward backbone whose output an equilibrium block refines."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..calculus import (
    Derivative,
    Sublayers,
)
from ..config import configuration
from ..intact import alteration
from .base import Damping, Dynamical
from .layered import FeedforwardBlock, LayeredBlock, _Stack
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


class LayeredAttractorJacobian(Derivative):
    """J of `LayeredAttractorBlock`: the backbone's and the head's on the diagonal, and 1 from the last layer into the head."""

    def __init__(self, block: Any, z: Tensor, x: Tensor):
        super().__init__(z, x, block.parameters)
        below, state = z[..., :-1, :, :], z[..., -1, :, :]
        self.backbone = block.backbone.linearise(below, x)
        self.head = block.head.linearise(state, below[..., -1, :, :])

    def product(self, v: Tensor) -> Tensor:
        below, last = self._along(v)[..., :-1, :, :], v[..., -1, :, :]
        head = self.head.product(last) + below[..., -1, :, :]
        return torch.cat([self.backbone.product(below), head.unsqueeze(-3)], -3)

    def transposed(self, u: Tensor) -> Tensor:
        below, last = self._along(u)[..., :-1, :, :], u[..., -1, :, :]
        moved = self.backbone.transposed(below)
        moved[..., -1, :, :] += last
        return torch.cat([moved, self.head.transposed(last).unsqueeze(-3)], -3)

    def contract(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        self._along(u, several=False)
        grads, into = self.backbone.contract(u[..., :-1, :, :])
        head, _ = self.head.contract(u[..., -1, :, :])
        return {f"backbone.{name}": value for name, value in grads.items()} | {
            f"head.{name}": value for name, value in head.items()}, into


class LayeredAttractorBlock(Dynamical):
    """Backbone and head of `AttractorBlock` as one equilibrium state z = (z_1 .. z_L, h): F_l = layer_l(z_{l-1}) - z_l with
    z_0 = x, and the head's force at h under the clamp z_L.

    J is block lower-triangular: the backbone adds the eigenvalue -1 to the head's own. No layer is computed before another, so
    the adjoint state, and with it the read-out of every weight, the backbone's too, is that of one relaxation.
    """

    def __init__(self, backbone: list[Sublayers], layers: Sublayers, damping: float):
        super().__init__()
        self.backbone: Any = LayeredBlock(backbone)
        self.head: Any = EquilibriumBlock(layers, damping)

    def start(self, x: Tensor) -> Tensor:
        return torch.stack([x] * (len(self.backbone.stack) + 1), -3)  # (..., T, C) -> (..., L + 1, T, C)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        below, state = z[..., :-1, :, :], z[..., -1, :, :]
        return torch.cat([self.backbone(below, x), self.head(state, below[..., -1, :, :]).unsqueeze(-3)], -3)

    def output(self, z: Tensor) -> Tensor:
        return z[..., -1, :, :]

    def altered(self) -> str | None:
        return alteration(self, LayeredAttractorBlock, {}) or self.backbone.altered() or self.head.altered()

    def _by_hand(self, z: Tensor, x: Tensor) -> LayeredAttractorJacobian:
        return LayeredAttractorJacobian(self, z, x)


@configuration
class LayeredAttractor(Attractor):
    """The same network, weight for weight, as one equilibrium state (..., layers + 1, T, width)."""

    clamp_shaped: ClassVar[bool] = False

    def build(self, width: int, heads: int, context: int) -> LayeredAttractorBlock:  # type: ignore[override]
        """The module for states (..., layers + 1, T <= context, width). Raises `ShapeError` if heads do not divide the
        width."""
        *backbone, head = self._sublayers(width, heads, self.layers + 1)
        return LayeredAttractorBlock(backbone, head, self.damping)
