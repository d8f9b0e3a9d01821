"""An ordinary transformer, and the same as one equilibrium state."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..calculus import (
    Derivative,
    SequentialSlope,
    Sublayers,
)
from ..config import configuration
from ..intact import alteration
from .base import Block, Dynamical, Positive, Scale


class StackJacobian(Derivative):
    """J of `LayeredBlock`: -1 on the diagonal, each layer's derivative below it."""

    def __init__(self, stack: Any, inputs: Tensor, x: Tensor):
        super().__init__(inputs, x, stack.parameters)
        self.layers = [SequentialSlope(layers, z) for layers, z in zip(stack, inputs.unbind(-3), strict=True)]

    def product(self, v: Tensor) -> Tensor:
        self._along(v)
        moved = [torch.zeros_like(v[..., 0, :, :])]
        moved += [layer.product(below) for layer, below in zip(self.layers[1:], v.unbind(-3)[:-1], strict=True)]
        return torch.stack(moved, -3) - v

    def transposed(self, u: Tensor) -> Tensor:
        self._along(u)
        moved = [layer.transposed(above) for layer, above in zip(self.layers[1:], u.unbind(-3)[1:], strict=True)]
        return torch.stack([*moved, torch.zeros_like(u[..., 0, :, :])], -3) - u

    def contract(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        self._along(u, several=False)
        each = (layer.contract(part) for layer, part in zip(self.layers, u.unbind(-3), strict=True))
        grads = {f"stack.{i}.{name}": value for i, found in enumerate(each) for name, value in found.items()}
        return grads, self.layers[0].transposed(u[..., 0, :, :]).sum_to_size(self.clamped)


class LayeredBlock(Dynamical):
    """An L-layer pre-LN transformer as one equilibrium state z = (z_1 .. z_L), F_l = layer_l(z_{l-1}) - z_l with z_0 = x.

    J is block lower-triangular with -1 on the diagonal, so all its eigenvalues are -1: at step 1 the free phase is exact after
    L sweeps and the adjoint after L more, and the corrected gradient is backpropagation's, layer by layer.
    """

    def __init__(self, stack: list[Sublayers]):
        super().__init__()
        self.stack: Any = nn.ModuleList(stack)  # iterated as the sublayers it holds

    def start(self, x: Tensor) -> Tensor:
        return torch.stack([x] * len(self.stack), -3)  # (..., T, C) -> (..., L, T, C)

    def _inputs(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.cat([x.unsqueeze(-3).expand_as(z[..., :1, :, :]), z[..., :-1, :, :]], -3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inputs = self._inputs(z, x).unbind(-3)
        return torch.stack([layers.sequential(below) for layers, below in zip(self.stack, inputs, strict=True)], -3) - z

    def output(self, z: Tensor) -> Tensor:
        return z[..., -1, :, :]

    def altered(self) -> str | None:
        return alteration(self, LayeredBlock, {f"stack.{i}": Sublayers for i in range(len(self.stack))})

    def _by_hand(self, z: Tensor, x: Tensor) -> StackJacobian:
        return StackJacobian(self.stack, self._inputs(z, x), x)


class FeedforwardBlock(Dynamical):
    """A stack of ordinary pre-LN transformer blocks: the backprop baseline of the same shape, with the weights of
    `LayeredBlock`.

    Its start state is its answer, F(z) = stack(x) - z is zero there, so every solver converges at once.
    """

    explicit = True

    def __init__(self, stack: list[Sublayers]):
        super().__init__()
        self.stack: Any = nn.ModuleList(stack)  # iterated as the sublayers it holds

    def start(self, x: Tensor) -> Tensor:
        for layers in self.stack:
            x = layers.sequential(x)
        return x

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.start(x) - z


@configuration
class _Stack(Block):
    layers: Positive = 1
    causal: bool = True
    qk_norm: bool = False
    expansion: Positive = 4
    init: Scale = 0.1
    gated: Scale | None = None

    def _sublayers(self, width: int, heads: int, count: int) -> list[Sublayers]:
        return [Sublayers(width, heads, self.expansion, self.causal, self.qk_norm, self.init, gated=self.gated)
                for _ in range(count)]


@configuration
class Feedforward(_Stack):
    """Ordinary pre-LN transformer (Vaswani 2017, pre-LN form) with the parameters of `Thick` in each of its layers."""

    explicit: ClassVar[bool] = True

    def build(self, width: int, heads: int, context: int) -> FeedforwardBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return FeedforwardBlock(self._sublayers(width, heads, self.layers))


@configuration
class Layered(_Stack):
    """The same transformer, weight for weight, as one equilibrium state (..., layers, T, width)."""

    clamp_shaped: ClassVar[bool] = False

    def build(self, width: int, heads: int, context: int) -> LayeredBlock:
        """The module for states (..., layers, T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return LayeredBlock(self._sublayers(width, heads, self.layers))
