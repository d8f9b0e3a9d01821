"""The nudged phase where the backend has a phase's loop but not the loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..dynamics import InKernel, LinearInKernel
from ..solvers import Differences, Solution, Solver, Status, worst
from .base import FORCE, PRODUCT, asymmetric
from .problem import Problem


class Rounds:
    """The trajectories z_k (B, K, ...) of a contrast, settled from z* in rounds, with Anderson's method over them.

    A round without a correction settles each trajectory under F(z) - F(z*) - beta_k g with the slope g held; one with the
    correction, of which J at z* is held, solves J^T dz = -F_k for what its force F_k leaves. The forces are relative to that at
    z*, so the trajectory of beta = 0 rests there. At z* the forces with the correction are -beta_k g, multiples of one another,
    so the first such round is one solve, the linear response, which may be given. A sample's steps are those of all its rounds;
    it begins no other once they have reached `max_steps`.
    """

    def __init__(self, problem: Problem, dynamics: InKernel, solver: Solver, nudges: Tensor, allowed: Tensor,
                 held: LinearInKernel | None, response: Tensor | None):
        """nudges beta_k (B or 1, K, 1 ...). allowed (B, K): what a trajectory may leave, in units of the tolerance."""
        self.problem, self.dynamics, self.solver, self.nudges, self.allowed = problem, dynamics, solver, nudges, allowed
        self.held, self.response, self.first = held, response, True
        self.centre, self.rest = problem.state.unsqueeze(1), problem.force(problem.state).unsqueeze(1)
        self.states = self.best = self.centre.repeat_interleave(allowed.shape[1], 1)
        self.slope = problem.slope.unsqueeze(1)
        self.push = -nudges * self.slope.expand_as(self.states)
        self.lowest, self.rate = torch.full_like(problem.scale, torch.inf), torch.full_like(problem.scale, torch.nan)
        self.steps, self.evaluations = torch.zeros_like(self.lowest, dtype=torch.long), float(FORCE)
        self.status = Status.CONVERGED

    def solve(self, measure: Callable[[Tensor, Tensor], Tensor]) -> Solution:
        """The lowest-residual states by `measure(force, state)`, (B,)."""
        each, history = (-1,) + (1,) * self.problem.state.dim(), Differences(memory=5, step=1.0)
        while True:
            residual = measure(self.push, self.states)
            better = residual < self.lowest
            self.best = torch.where(better.view(each), self.states, self.best)
            self.lowest = torch.where(better, residual, self.lowest)
            active = (self.lowest > self.solver.tol) & (self.steps < self.solver.max_steps)
            if not self.status.usable or not active.any():
                break
            # a sample that is done takes one evaluation
            move = self._move(torch.where(active.unsqueeze(1), self.allowed, torch.inf), active)
            self.states = history.next(self.states.flatten(1), move.flatten(1), residual,
                                       self.best.flatten(1)).view_as(self.states)
            self._evaluate()
        if self.status.usable:
            self.status = Status.MAX_STEPS if (self.lowest > self.solver.tol).any() else Status.CONVERGED
        return Solution(self.best, self.lowest, self.steps, self.rate, round(self.evaluations), self.status, history.fallbacks)

    def _move(self, scale: Tensor, active: Tensor) -> Tensor:
        """Where a round takes the trajectories, (B, K, ...)."""
        if self.held is None:
            clamp = self.problem.x.unsqueeze(1) - self.rest - self.nudges * self.slope
            phase = self.dynamics.relax(self.solver, clamp.flatten(0, 1), self.states.flatten(0, 1), scale.flatten())
            self._count([phase], active)
            return phase.value.view_as(self.states) - self.states
        if self.first:
            if self.response is None:
                phase = self.held.relax(self.solver, self.problem.slope, (scale / self.nudges.flatten(1).abs()).amin(1))
                self._count([phase], active)
                self.response = phase.value
            return -self.nudges * self.response.unsqueeze(1)
        each = zip(self.push.unbind(1), scale.unbind(1), strict=True)
        phases = [self.held.relax(self.solver, push, bound) for push, bound in each]
        self._count(phases, active)
        return torch.stack([phase.value for phase in phases], 1)

    def _count(self, phases: list[Solution], active: Tensor) -> None:
        """Takes in what the solves of a round took, of all trajectories together or one by one."""
        samples = len(self.steps)
        taken, rates = (torch.cat([getattr(phase, name).view(samples, -1) for phase in phases], 1).amax(1)
                        for name in ("steps", "rate"))
        self.steps = self.steps + torch.where(active, taken.clamp_min(1), 0)
        self.rate = torch.where(active, rates, self.rate)
        self.status = worst(phase.status for phase in phases)
        self.evaluations += sum(phase.evaluations * len(phase.steps) for phase in phases) / samples

    def _evaluate(self) -> None:
        """The forces of the trajectories where they are now."""
        self.slope = self.problem.loss_slope(self.states)
        self.push = self.problem.force(self.states) - self.rest - self.nudges * self.slope
        self.evaluations += FORCE * self.states.shape[1]
        if self.held is not None:
            if self.first and self.response is not None:
                self.push = self.push + self.nudges * asymmetric(self.held, self.response.unsqueeze(1))
                self.evaluations += 2 * PRODUCT
            else:
                self.push = self.push - asymmetric(self.held, self.states - self.centre)
                self.evaluations += 2 * PRODUCT * self.states.shape[1]
        self.first = False
