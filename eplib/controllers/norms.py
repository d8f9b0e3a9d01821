"""Norms of the Jacobian and of the force along random directions or at the state itself."""

import math
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..config import configuration
from ..estimators import FORCE, LINEARISATION, PRODUCT, Problem
from ..solvers import norm
from .base import Outcome, Penalty, Strength, draw, gradient


def _graph(problem: Problem) -> Any:
    return problem.model.block.linearise(problem.state, problem.x)


@configuration
class ResidualDriven:
    """A coefficient that follows the free residual: multiplied by (r / target)^gain at every call, r being the batch's largest
    residual smoothed by an exponential average, and kept within floor and ceiling. The floor is never zero: a controller that
    has annealed away is not there when the next update needs it (Hao 2026).
    """

    target: Annotated[float, Field(gt=0)] = 1.5e-2
    floor: Annotated[float, Field(gt=0)] = 0.1
    ceiling: Annotated[float, Field(gt=0)] = 16.0
    gain: Annotated[float, Field(gt=0, le=1)] = 0.2
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9

    @model_validator(mode="after")
    def _ordered(self) -> "ResidualDriven":
        if self.ceiling < self.floor:
            raise ValueError(f"ceiling {self.ceiling} is below floor {self.floor}; choose floor <= ceiling")
        return self

    def __call__(self, residual: float, carried: dict[str, Tensor], start: float) -> float:
        """The next coefficient, the last one (at first `start`) and the smoothed residual being carried."""
        residual = min(residual, 1.0) if math.isfinite(residual) else 1.0  # an exploded phase says no more than 1
        mean = float(carried.get("residual_mean", residual))
        mean += (1 - self.smoothing) * (residual - mean)
        value = float(carried.get("coefficient", start)) * (mean / self.target) ** self.gain
        value = min(self.ceiling, max(self.floor, value))
        carried["residual_mean"], carried["coefficient"] = (torch.tensor(v, dtype=torch.float64) for v in (mean, value))
        return value


@configuration
class JacobianNorm(Penalty):
    """Penalty strength * mean_b ||J_f v_b||^2 on a random direction v_b of norm 1, J_f = J + (1 + c) I the derivative of Attn +
    FFN: Hutchinson's estimate of ||J_f||_F^2 over the number of units (Bai et al. 2021). driven: how the strength follows
    the residual; None keeps it.
    """

    strength: Strength = 3.0
    driven: ResidualDriven | None = None

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        v, decay, strength = draw(problem, carried), problem.model.block.state_decay, self.strength
        if self.driven:
            with torch.no_grad():
                residual = norm(problem.force(problem.state)) / norm(problem.state)
            strength = self.driven(problem.part.largest(residual.max().item())[0], carried, self.strength)
        grads, value, cost = gradient(problem, LINEARISATION + PRODUCT, lambda: strength * norm(
            _graph(problem).product(v) + decay * v).square().mean())
        return Outcome(grads, {"penalty": value, "coefficient": strength}, int(cost) + FORCE * bool(self.driven))


@configuration
class ResidualPenalty(Penalty):
    """Penalty strength * mean_b (||F(z_b)|| / ||z_b||)^2 at the state that the free phase reached and that is evaluated: it
    acts where the phase has not settled and is silent where it has (Hao 2026)."""

    strength: Strength = 100.0

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        block, z = problem.model.block, problem.state
        grads, value, cost = gradient(problem, FORCE, lambda: self.strength * (
            norm(block(z, problem.x)) / norm(z)).square().mean())
        return Outcome(grads, {"penalty": value}, int(cost))


@configuration
class Homeostasis(Penalty):
    """Jacobian homeostasis: penalty strength * mean_b ||(J - J^T) v_b||^2 on a random direction of norm 1, an estimate of
    ||J - J^T||_F^2 over the number of units (Laborieux & Zenke 2023). It makes J symmetric, not contracting."""

    strength: Strength = 1.0

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        v = draw(problem, carried)

        def total() -> Tensor:
            jacobian = _graph(problem)
            return self.strength * norm(jacobian.product(v) - jacobian.transposed(v)).square().mean()

        grads, value, cost = gradient(problem, LINEARISATION + 2 * PRODUCT, total)
        return Outcome(grads, {"penalty": value}, int(cost))
