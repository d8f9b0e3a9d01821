"""Relaxation of a force to its fixed point, per sample.

A solver knows the force only as a function of the state (B, ...). Samples never influence each other: each stops, diverges or
runs on by its own residual, so a permuted batch gives permuted results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .config import configuration

GROWTH = 1e3  # a state or residual this many times its scale has diverged


class Status(Enum):
    """How a phase ended, for the worst sample of the batch."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    DIVERGED = "diverged"
    NONFINITE = "nonfinite"

    @property
    def usable(self) -> bool:
        """Whether a gradient may be read from the phase (its residual says how good it is)."""
        return self in (Status.CONVERGED, Status.MAX_STEPS)


@dataclass(frozen=True)
class Solution:
    """End of a relaxation: the lowest-residual iterate of each sample.

    value (B, ...); residual (B,) in the units of the solver's measure (||F|| / ||z|| unless said otherwise); steps (B,) taken
    by each sample; rate (B,) the last measured ratio of successive residuals (`rate_tail`); evaluations: force evaluations
    of the whole batch; status of the worst sample.
    """

    value: Tensor
    residual: Tensor
    steps: Tensor
    rate: Tensor
    evaluations: int
    status: Status


def norm(a: Tensor) -> Tensor:
    """Euclidean norm of each sample: (B, ...) -> (B,)."""
    return a.flatten(1).norm(dim=1)


def relative_force(force: Tensor, state: Tensor) -> Tensor:
    """The residual ||F(z)|| / ||z|| of each sample, not multiplied by a step: (B,)."""
    return norm(force) / norm(state).clamp_min(torch.finfo(state.dtype).tiny)


@configuration
class Relaxation:
    """Damped fixed-point iteration z <- z + step * F(z) (explicit Euler).

    step: Euler step. max_steps: most steps of a sample. tol: residual at which a sample stops and is frozen.
    """

    kind: Literal["Relaxation"] = "Relaxation"
    step: Annotated[float, Field(gt=0, le=2)] = 0.5
    max_steps: Annotated[int, Field(ge=1)] = 64
    tol: Annotated[float, Field(ge=0)] = 1e-4

    @torch.no_grad()
    def solve(self, force: Callable[[Tensor], Tensor], start: Tensor,
              measure: Callable[[Tensor, Tensor], Tensor] = relative_force) -> Solution:
        """Relaxes `force` from `start` (B, ...) without storing a graph; `measure(force, state)` gives the residual (B,).

        A sample whose state norm or residual grows a thousandfold is frozen as diverged: an explosion otherwise looks
        converged once step * F falls below the float spacing of z. A non-finite residual freezes the sample as well.
        """
        state, samples = start, start.shape[0]
        lanes = (samples,) + (1,) * (start.dim() - 1)
        bound = GROWTH * norm(start).clamp_min(start[0].numel() ** 0.5)
        best, lowest = start, start.new_full((samples,), torch.inf)
        steps = torch.zeros(samples, dtype=torch.long, device=start.device)
        previous = rate = start.new_full((samples,), torch.nan)
        active = torch.ones(samples, dtype=torch.bool, device=start.device)
        exploded, broken = ~active, ~active
        ceiling = None
        for count in range(self.max_steps + 1):
            push = force(state)
            residual = measure(push, state)
            ceiling = GROWTH * residual.clamp_min(1) if ceiling is None else ceiling
            rate = torch.where(active & (previous > 0), residual / previous, rate)
            previous = torch.where(active, residual, previous)
            improved = active & (residual < lowest)
            best = state if improved.all() else torch.where(improved.view(lanes), state, best)
            lowest = torch.where(improved, residual, lowest)
            broken = broken | (active & ~residual.isfinite())
            exploded = exploded | (active & ((norm(state) > bound) | (residual > ceiling)))
            active = active & (residual > self.tol) & ~broken & ~exploded
            if count == self.max_steps or not active.any():
                break
            steps = steps + active
            state = state + self.step * (push if active.all() else torch.where(active.view(lanes), push, 0))
        if broken.any():
            status = Status.NONFINITE
        elif exploded.any():
            status = Status.DIVERGED
        else:
            status = Status.MAX_STEPS if (lowest > self.tol).any() else Status.CONVERGED
        return Solution(best, lowest, steps, rate, count + 1, status)
