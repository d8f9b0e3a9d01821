"""The same fixed point by a path from the start state, along which the force is switched on."""

from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor

from ..config import configuration
from .anderson import Anderson, Differences
from .base import Count
from .solution import norm


@configuration
class Homotopy(Anderson):
    """Fixed-point homotopy (HomoODE: Ding et al. 2023): the zero of H(z) = share F(z) - (1 - share)(z - z_0) is followed from
    the start z_0, where share is 0, to the zero of F at 1.

    share rises in `stages` equal parts; each zero but the last is corrected by `corrections` steps of Anderson's method, from
    the one before it, the last by what is left of `max_steps`. Before the last the spectrum of H is that of F drawn towards -1,
    so a path may arrive where plain relaxation and Anderson's method from z_0 do not. A sample ends where F itself is at `tol`.
    """

    stages: Count = 4
    corrections: Count = 6

    @model_validator(mode="after")
    def _arrives(self) -> "Homotopy":
        if (path := (self.stages - 1) * self.corrections) >= self.max_steps:
            raise ValueError(f"the path takes {path} steps before its last stage, and max_steps is {self.max_steps}: it would "
                             "never ask for the zero of the force itself; give more max_steps, or fewer stages or corrections")
        return self

    def history(self, linear: bool) -> Any:
        return Path(self, linear)


class Path:
    """Where a path began, and Anderson's memory of its present stage: of another force the last one says nothing."""

    def __init__(self, solver: Homotopy, linear: bool):
        self.solver, self.linear, self.count, self.given_up = solver, linear, 0, 0
        self.inner = Differences(solver.memory, solver.step, linear)

    @property
    def fallbacks(self) -> int:
        """Samples that stalled, summed over the stages."""
        return self.given_up + self.inner.fallbacks

    def next(self, state: Tensor, push: Tensor, residual: Tensor, best: Tensor) -> Tensor:
        """The next states (B, n) from these, their forces, and the best of F so far."""
        stage, within = divmod(self.count, self.solver.corrections)
        share = min(1.0, (stage + 1) / self.solver.stages)
        if self.count == 0:
            self.origin = state
        if within == 0 and stage < self.solver.stages:
            self.given_up += self.inner.fallbacks
            self.inner = Differences(self.solver.memory, self.solver.step, self.linear)
            self.best, self.lowest = state, torch.full_like(residual, torch.inf)
        self.count += 1
        if share < 1:  # stalls and the best state are those of H
            push = share * push - (1 - share) * (state - self.origin)
            residual = norm(push)
            self.best = best = torch.where((residual < self.lowest).unsqueeze(1), state, self.best)
            self.lowest = torch.minimum(self.lowest, residual)
        return self.inner.next(state, push, residual, best)

    def keep(self, samples: Tensor) -> None:
        """Goes on with these samples only."""
        self.inner.keep(samples)
        self.origin, self.best, self.lowest = self.origin[samples], self.best[samples], self.lowest[samples]
