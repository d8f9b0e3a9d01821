"""Equilibrium propagation on the mean and the difference of two nudged states."""

import torch
from pydantic import model_validator
from torch import Tensor

from ..config import configuration
from ..solvers import Solver, norm
from .base import FORCE, LINEARISATION, PRODUCT, Adjoint, Beta, ByAdjoint, Steps, linear_response
from .problem import Problem


@configuration
class DyadicEP(ByAdjoint):
    """Dyadic EP: midpoint m' = F(m) and difference d' = J(m)^T d - beta g(m), a = -d / beta (Scurria et al. 2026).

    held: m stays at z*, which makes it the linear response of corrected EP: J^T a = -g is solved by one transposed product per
    step. There is no nudge then, so no beta, no bias and no displacement. Otherwise m and d relax together as one state (B, 2,
    ...).
    """

    beta: Beta | None = None
    steps: Steps | None = None
    held: bool = True

    @model_validator(mode="after")
    def _fits(self) -> "DyadicEP":
        if self.held and self.beta is not None:
            raise ValueError(f"held is the linear response, which has no nudge, so beta={self.beta} would do nothing; leave it "
                             "out, or set held=False")
        if not self.held and self.beta is None:
            raise ValueError("held=False relaxes under a nudge; give its beta")
        return self

    @property
    def linear(self) -> bool:  # type: ignore[override]  # of the class it is a constant
        return self.held

    rounds = linear

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        if self.beta is None:
            return linear_response(problem.jacobian, problem, solver)
        beta, scale = self.beta, self.beta * problem.scale

        def force(pair: Tensor) -> Tensor:
            middle, half = pair.unbind(1)
            push = problem.linearise(middle).transposed(half) - beta * problem.loss_slope(middle)
            return torch.stack([problem.force(middle), push], 1)

        phase = solver.solve(force, torch.stack([problem.state, torch.zeros_like(problem.state)], 1),
                             lambda push, _: norm(push[:, 1]) / scale)
        half = phase.value[:, 1]
        return Adjoint(-half / beta, phase, norm(half) / norm(problem.state),
                       (FORCE + LINEARISATION + PRODUCT) * phase.evaluations)
