"""The leading mode of continuous time, and the fastest growth at first."""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..config import configuration
from ..estimators import FORCE, PRODUCT, Problem
from .base import Outcome, Penalty, Products, Strength, compressed, leading, of_samples, orthonormal, unit


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


@configuration
class NumericalAbscissa(Penalty):
    """Penalty strength * mean_b relu(mu_b - bound)^2 on mu_b, the largest eigenvalue of S = (J + J^T) / 2: the fastest growth
    that any deviation has at first, which bounds what the abscissa alone leaves to J's departure from normal.

    mu_b = <v, J v> of a unit vector v, the topmost Ritz vector of S on the span of F(z*), S F(z*), .. S^(size - 1) F(z*).
    """

    bound: float = 0.0
    strength: Strength = 1.0
    size: Annotated[int, Field(ge=2)] = 4

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        with torch.no_grad():
            jacobian, iterates = problem.jacobian, [unit(problem.force(problem.state))]
            for _ in range(self.size - 1):
                iterates.append(unit(jacobian.product(iterates[-1]) + jacobian.transposed(iterates[-1])))
            basis = orthonormal(iterates)
            small = compressed(jacobian, basis)
            values, vectors = torch.linalg.eigh((small + small.mT) / 2)
            mu, top = values[:, -1], torch.einsum("bk,bk...->b...", vectors[..., -1], basis)
            above = mu > self.bound

        def excess(jacobian: Any) -> Tensor:
            v = top[above]
            return (v * jacobian.product(v)).flatten(1).sum(1) - self.bound

        grads, value, cost = of_samples(problem, above, 1, excess, self.strength)
        cost += FORCE + (3 * self.size - 2) * PRODUCT
        return Outcome(grads, {"numerical_probe": mu.max().item(), "penalty": value}, math.ceil(cost))
