"""What a solve knows of each sample of its batch."""

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from .solution import Status, norm

GROWTH = 1e3  # a state or residual this many times its scale has diverged


class Samples:
    """States (B, ...), all else (B,). Samples never influence each other."""

    def __init__(self, start: Tensor):
        size = norm(start)
        self.state = self.best = start
        self.bound = GROWTH * size.clamp_min(start[0].numel() ** 0.5)
        self.lowest = torch.full_like(size, torch.inf)
        self.first = self.residual = self.rate = torch.full_like(size, torch.nan)
        self.steps = torch.zeros_like(size, dtype=torch.long)
        self.active = torch.ones_like(size, dtype=torch.bool)
        self.exploded = self.broken = ~self.active

    def lanes(self, values: Tensor) -> Tensor:
        """Values (B,) beside states."""
        return values.view(-1, *(1,) * (self.state.dim() - 1))

    def see(self, residual: Tensor, tol: float, latest: bool) -> None:
        """Takes in the residuals of the present states. A sample that is at `tol` ends, and so does one whose state or residual
        has grown a thousandfold or is not finite. latest: whether the present state is the best one whatever its residual."""
        self.first = torch.where(self.first.isnan() & self.active, residual, self.first)
        self.rate = torch.where(self.active & (self.residual > 0), residual / self.residual, self.rate)
        self.residual = torch.where(self.active, residual, self.residual)
        improved = self.active & ((residual < self.lowest) | latest)
        self.best = self.state if improved.all() else torch.where(self.lanes(improved), self.state, self.best)
        self.lowest = torch.where(improved, residual, self.lowest)
        self.broken = self.broken | (self.active & ~residual.isfinite())
        self.exploded = self.exploded | (self.active & (
            (norm(self.state) > self.bound) | (residual > GROWTH * self.first.clamp_min(1))))
        self.active = self.active & (residual > tol) & ~self.broken & ~self.exploded

    def move(self, moved: Tensor) -> None:
        """Takes those that go on to their next states."""
        self.steps = self.steps + self.active
        self.state = moved if self.active.all() else torch.where(self.lanes(self.active), moved, self.state)

    def status(self, tol: float, hindsight: bool) -> Status:
        """How the worst of them ended. hindsight: what came after the most settled iterate does not count, if there was one."""
        lost = ~(self.lowest < self.first) if hindsight else torch.ones_like(self.active)
        if (self.broken & lost).any():
            return Status.NONFINITE
        if (self.exploded & lost).any():
            return Status.DIVERGED
        return Status.MAX_STEPS if (self.lowest > tol).any() else Status.CONVERGED

    def take(self, samples: Tensor) -> "Samples":
        """Of these samples only."""
        return self._each(lambda name: getattr(self, name)[samples])

    def updated(self, samples: Tensor, part: "Samples") -> "Samples":
        """With these samples as `part` has them."""
        return self._each(lambda name: getattr(self, name).index_copy(0, samples, getattr(part, name)))

    def _each(self, value: Callable[[str], Tensor]) -> "Samples":
        other = copy(self)
        vars(other).update({name: value(name) for name in vars(self)})
        return other
