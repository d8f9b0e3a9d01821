"""Equilibrium propagation on two nudged states, or on one and the free state.

Notation. The free phase settles F(z*; theta) = 0. Sample b has loss l_b(z), the mean over its own tokens; g = dl/dz. With the
adjoint state a = -J^-T g the loss gradient is

    dL/dtheta = mean_b [ d/dtheta <a_b, F(z*_b; theta)> + dl_b/dtheta ]      (implicit function theorem)

The estimators differ only in how they find a. The contrasting ones relax states z_k under F - beta_k g and combine them into
a = -dz/dbeta at beta = 0: two points +-beta leave a bias O(beta^2) (Laborieux et al. 2021), N points on a complex circle of
radius r one of O(r^N) (Laborieux & Zenke 2022). For J != J^T the plain field gives J^-1 instead of J^-T; the correction
-(J - J^T)(z - z*) repairs it (Scurria et al. 2026). All are matrix-free, and none stores a graph in a relaxation except BPTT
and the forward mode, which are there to be compared with.
"""

from ..config import configuration
from ..solvers import Solver
from .base import FORCE, Adjoint, Beta, ByAdjoint, Steps
from .nudged import Nudging, contrast, corrected, real_points
from .problem import Problem


@configuration
class VectorField(ByAdjoint):
    """Plain EP on the vector field, uncorrected: a = -J^-1 g, exact only where J = J^T (Scellier & Bengio 2017)."""

    beta: Beta = 0.2
    steps: Steps | None = None
    nudging: Nudging = "symmetric"

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        nudges, weights = real_points(problem, self.beta, self.nudging)
        return contrast(problem, nudges, weights, solver, None, cost=FORCE * nudges.shape[1])


@configuration
class AsymEP(ByAdjoint):
    """Corrected EP, the correction -(J - J^T)(z - z*) frozen at the free state (Scurria et al. 2026)."""

    beta: Beta = 0.2
    steps: Steps | None = None
    nudging: Nudging = "symmetric"

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        return corrected(problem, *real_points(problem, self.beta, self.nudging), solver)
