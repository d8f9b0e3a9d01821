"""Equilibrium propagation on two nudged states, linearised where they are."""

from dataclasses import replace

import torch
from torch import Tensor

from ..config import configuration
from ..solvers import Solver
from .base import FORCE, LINEARISATION, PRODUCT, Adjoint, Beta, ByAdjoint, Steps, asymmetric, linear_response
from .nudged import contrast, real_points
from .problem import Problem


@configuration
class Tracking(ByAdjoint):
    """Corrected EP re-linearised at the moving common mode m = (z_+ + z_-) / 2, both trajectories in lockstep (Hao 2026; the
    correction: Scurria et al. 2026).

    The correction is odd, +-(J(m) - J(m)^T) d with d = (z_+ - z_-) / 2, so it is computed once for the pair; there is no
    one-sided form. held: m stays at z*, which saves the linearisations. warm: the pair starts at its linear response z* -+ beta
    a, J^T a = -g being solved first, to half the tolerance where the solver has one, and then only has to confirm it; if that
    phase fails, it is the one that is returned.
    """

    beta: Beta = 0.2
    steps: Steps | None = None
    held: bool = False
    warm: bool = False

    @property
    def rounds(self) -> bool:  # type: ignore[override]  # of the class it is a constant
        return self.warm

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        def correction(pair: Tensor) -> Tensor:
            plus, minus = pair.unbind(1)
            jacobian = problem.jacobian if self.held else problem.linearise((plus + minus) / 2)
            odd = asymmetric(jacobian, (plus - minus) / 2)
            return torch.stack([odd, -odd], 1)

        response, spent = None, 0
        if self.warm:
            closer = replace(solver, tol=solver.tol / 2) if solver.tol else solver  # type: ignore[type-var]
            linear = linear_response(problem.jacobian, problem, closer)
            if linear.phase and not linear.phase.status.usable:
                return linear
            response, spent = linear.value, linear.evaluations
        found = contrast(problem, *real_points(problem, self.beta), solver, correction,
                         cost=2 * FORCE + 2 * PRODUCT + (0 if self.held else LINEARISATION),
                         response=response, held=problem.jacobian if self.held else None)
        return replace(found, evaluations=found.evaluations + spent)
