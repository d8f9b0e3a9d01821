"""The loop of one solve: evaluations, in half precision at first where that is asked for, and a batch that shrinks."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..parallel import Part
from .samples import Samples
from .solution import Solution, Status

if TYPE_CHECKING:
    from .base import Solver

Force = Callable[[Tensor], Tensor]  # of states (B, ...)
Measure = Callable[[Tensor, Tensor], Tensor]  # residual (B,) of a force at a state


class Loop:
    """Takes a force to its zero without storing a graph, every sample for itself, as `Solver.solve` says."""

    def __init__(self, solver: "Solver", force: Force, start: Tensor, measure: Measure, rough: Part | None, linear: bool,
                 among: Callable[[Tensor], Force] | None, project: Callable[[Tensor], Tensor] | None):
        self.solver, self.force, self.measure, self.rough, self.among = solver, force, measure, rough, among
        self.project, self.start, self.history, self.evaluated = project, start, solver.history(linear), 0
        self.all = self.now = Samples(start if project is None else project(start))
        self.left: Tensor | None = None  # which samples are left, where some have gone

    def run(self) -> Solution:
        solver = self.solver
        for count in range(solver.max_steps + 1):
            last = count == solver.max_steps
            push, residual = self._evaluate(last)
            self.now.see(residual, -math.inf if self.rough else solver.tol, solver.latest)
            going = int(self.now.active.sum())
            if last or not (going or (self.rough and self.rough.ranks > 1)):  # all ranks end rounding together
                break
            moved = solver.next(self.now.state, push, residual, self.now.best, self.history)
            self.now.move(moved if self.project is None else self.project(moved))
            if self.among and 0 < 2 * going <= len(residual):
                self._shrink(self.among)
        return self._solution()

    def _evaluate(self, last: bool) -> tuple[Tensor, Tensor]:
        """Force and residual. Rounding ends with the last evaluation, or once half of the samples are coarsely settled."""
        now = self.now
        if self.rough and (last or self.rough.gathered(now.residual).nanmedian() <= (self.solver.coarse or 0)):
            self.rough = None
            now.lowest = torch.full_like(now.lowest, torch.inf)  # until here it was that of a rounded force
        with torch.autocast(self.start.device.type, torch.bfloat16) if self.rough else nullcontext():
            push = self.force(now.state).to(self.start.dtype)
        self.evaluated += len(push)
        return push, self.measure(push, now.state)

    def _shrink(self, among: Callable[[Tensor], Force]) -> None:
        """Leaves the samples that have ended out of the batch."""
        self.all = self._together()
        going = self.now.active.nonzero().squeeze(1)
        self.left = going if self.left is None else self.left[going]
        self.now, self.force = self.now.take(going), among(self.left)
        if self.history:
            self.history.keep(going)

    def _together(self) -> Samples:
        return self.now if self.left is None else self.all.updated(self.left, self.now)

    def _solution(self) -> Solution:
        end = self._together()
        status = end.status(self.solver.tol, self.solver.hindsight)
        # where all have settled, the same numbers, and the very tensor of the last evaluation, whose passes may be kept
        value = end.state if status is Status.CONVERGED else end.best
        return Solution(value, end.lowest, end.steps, end.rate, math.ceil(self.evaluated / len(self.start)), status,
                        self.history.fallbacks if self.history else 0)
