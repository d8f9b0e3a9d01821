"""Blocks given by one function, an energy; a box may hold their state."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .base import Dynamical


class FromEnergy(Dynamical, ABC):
    """F(z) = clip(z - dE/dz, low, high) - z, of an energy E(z, x) that a subclass writes down; F = -dE/dz without a box.

    A step of at most 1 is a convex combination of z and its projected gradient step, so it stays in the box. F = 0 where E has
    no slope along any free unit and pushes every other unit against its bound: the first-order conditions of the minimum of E
    in the box (projected gradient flow; the hard-sigmoid Hopfield network of Scellier & Bengio 2017 is one).

    A solver puts each state that it moves to into the box (`project`), an accelerated one too.

    The pull of the loss is taken inside the box (`nudged`), so that the nudged phase is the same flow of E + beta l, and plain
    EP, `estimators.VectorField`, is exact, with units at their bounds as well. With H the Hessian of E, A the free units and S
    those held at a bound (pushed against it, not just touching), J = dF/dz has the rows J_A = -(H_AA, H_AS) and J_S = (0, -1):
    it is not symmetric, but two facts repair that. Under a small pull the units in S stay, so the response is that of A alone,
    a_A = H_AA^-1 g_A; and J^T a = -g has the same a_A, for its rows of A are H_AA a_A = g_A without a_S. As F_S = bound - z_S
    knows no weight and no clamp, a_S enters no gradient. The other estimators find another a_S, and the same gradient.

    The state is (..., n) or of any shape that `start` gives; energy has to take leading dimensions (B, K, ...), to which the
    clamp broadcasts. Its slope is taken by torch.func.grad, so weights and products with J differentiate through it.
    """

    box: tuple[float, float] | None = None  # low and high of every unit

    @abstractmethod
    def energy(self, z: Tensor, x: Tensor) -> Tensor:
        """E of each sample, (B, ...) -> (B,) or (B, ...), which is summed: no mean over the samples."""

    def slope(self, z: Tensor, x: Tensor) -> Tensor:
        """dE/dz, the shape of z. Raises ValueError for an energy that is not one number, or several, for each sample."""

        def total(state: Tensor) -> Tensor:
            energy = self.energy(state, x)
            if energy.shape[:1] != z.shape[:1]:
                raise ValueError(f"the energy of {type(self).__name__} has shape {tuple(energy.shape)} for states "
                                 f"{tuple(z.shape)}; give one for each sample, ({len(z)},): sum over the units, not the batch")
            return energy.sum()

        return torch.func.grad(total)(z)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self._projected(z, self.slope(z, x))

    def nudged(self, z: Tensor, x: Tensor, pull: Tensor) -> Tensor:
        """The force of E + beta l, pull being beta dl/dz."""
        return self._projected(z, self.slope(z, x) + pull)

    def project(self, z: Tensor) -> Tensor:
        """The nearest state of the box. Raises ValueError for a box without an inside."""
        if self.box is None:
            return z
        low, high = self.box
        if not low < high:
            raise ValueError(f"the box of {type(self).__name__} is {self.box}; its first number is to be below its second")
        return z.clamp(low, high)

    def _projected(self, z: Tensor, slope: Tensor) -> Tensor:
        return -slope if self.box is None else self.project(z - slope) - z
