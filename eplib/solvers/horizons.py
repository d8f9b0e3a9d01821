"""A fixed number of Euler steps."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from ..config import configuration
from .base import Count, Solver, Step


@configuration
class FixedHorizon(Solver):
    """Exactly `steps` Euler steps for every sample, no early stop; the last iterate, settled or not. Zero steps evaluate the
    start state, the solver removed."""

    step: Step = 0.5
    steps: Annotated[int, Field(ge=0)] = 64

    tol, latest = 0.0, True

    @property
    def max_steps(self) -> int:
        return self.steps

    def limited(self, steps: int) -> "FixedHorizon":
        return replace(self, steps=steps)


@configuration
class Snapshot(Solver):
    """Euler through all `max_steps`, and the most settled iterate in hindsight (Hao 2026, "adaptive T2 by hindsight snapshot
    selection").

    In a nudged phase the residual is that of the contrast, which is its increment over the step, not the size of a step. A
    sample that explodes later keeps its snapshot; one that never settled below its first residual has diverged.
    """

    step: Step = 0.5
    max_steps: Count = 64

    tol, hindsight = 0.0, True
