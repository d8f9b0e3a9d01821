"""The leading mode of continuous time."""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..config import configuration
from ..estimators import FORCE, PRODUCT, Problem
from .base import Outcome, Penalty, Products, Strength, compressed, leading, of_samples


@configuration
class LeadingMode(Penalty):
    """Penalty strength * mean_b relu(alpha_b + margin)^2 on the leading mode of continuous time: alpha_b is the largest real
    part of the eigenvalues of J on the span of the last two iterates of a power iteration by I + step J.

    step: of that iteration; the smaller, the more it prefers the rightmost mode to one that a larger step would overshoot.
    """

    margin: Annotated[float, Field(gt=0, lt=1)] = 0.3
    strength: Strength = 50.0
    step: Annotated[float, Field(gt=0, le=1)] = 0.3
    products: Products = 4

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        with torch.no_grad():
            basis = leading(problem, self.step, self.products, 2)
            alpha = self._abscissa(problem.jacobian, basis)
            above = alpha > -self.margin
        grads, value, cost = of_samples(problem, above, 2, lambda jacobian: self._abscissa(
            jacobian, basis[above]) + self.margin, self.strength)
        cost += FORCE + (self.products + 3) * PRODUCT
        return Outcome(grads, {"abscissa_probe": alpha.max().item(), "penalty": value}, math.ceil(cost))

    @staticmethod
    def _abscissa(jacobian: Any, basis: Tensor) -> Tensor:
        return torch.linalg.eigvals(compressed(jacobian, basis)).real.amax(-1)
