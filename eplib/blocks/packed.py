"""States of several tensors: the layers of a network, say."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Packed:
    """Several tensors as one state (B, n), which is what solvers, estimators and controllers move; each by its own shape.

        layers = Packed((500,), (10,))             # or Packed((32, 12, 12), (64, 4, 4), (10,)): channels of a convolution
        hidden, output = layers.split(z)           # views of z: (B, 500), (B, 10); of several states a sample, (B, K, ...)
        z = layers.join(hidden, output)
    """

    def __init__(self, *shapes: Sequence[int]):
        self.shapes = [tuple(shape) for shape in shapes]
        self.sizes = [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """The number n of units."""
        return sum(self.sizes)

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        """The tensors of a state (..., n), views of it. Raises ValueError for a state of another size."""
        if z.shape[-1] != self.size:
            raise ValueError(f"a state {tuple(z.shape)} does not hold tensors {self.shapes}, which are {self.size} numbers")
        return tuple(part.unflatten(-1, shape) for part, shape in zip(z.split(self.sizes, -1), self.shapes, strict=True))

    def join(self, *parts: Tensor) -> Tensor:
        """The state (..., n) of these tensors. Raises ValueError for tensors of other shapes."""
        ends = [tuple(part.shape)[-len(shape):] for part, shape in zip(parts, self.shapes, strict=False)]
        if ends != self.shapes or len(parts) != len(ends):
            raise ValueError(f"tensors {[tuple(part.shape) for part in parts]} do not end in {self.shapes}")
        return torch.cat([part.flatten(-len(shape)) for part, shape in zip(parts, self.shapes, strict=True)], -1)

    def zeros(self, x: Tensor) -> Tensor:
        """A state at zero for each sample of a clamp (B, ...)."""
        return x.new_zeros(len(x), self.size)
