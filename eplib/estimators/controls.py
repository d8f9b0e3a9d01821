"""Negative controls: what equilibrium propagation is without one of its parts."""

from dataclasses import replace

from ..config import configuration
from ..solvers import Solver
from .base import Adjoint, Beta, ByAdjoint, Steps, linear_response
from .nudged import corrected, real_points
from .problem import Problem


@configuration
class ShuffledNudge(ByAdjoint):
    """The linear response to targets from half a batch away, a = -J^-T g'; the readout learns the right ones."""

    steps: Steps | None = None

    rounds = True

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        targets = problem.part.gathered(problem.targets)  # half a batch away, another rank's may be
        rolled = targets.flatten().roll(targets.numel() // 2).view_as(targets)
        wrong = replace(problem, targets=rolled[problem.part.rows])
        return linear_response(problem.jacobian, wrong, solver)


@configuration
class FlippedCorrection(ByAdjoint):
    """`AsymEP` whose correction has the wrong sign, +(J - J^T)(z - z*)."""

    beta: Beta = 0.2
    steps: Steps | None = None

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        return corrected(problem, *real_points(problem, self.beta), solver, sign=-1)
