"""What every controller shares: its outcome, gradients of its weights' function, and the directions that it looks along."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..estimators import BACKWARD, LINEARISATION, PRODUCT, Problem, lanes
from ..estimators.problem import counted
from ..families import Family, owed
from ..solvers import norm

Strength = Annotated[float, Field(ge=0)]
Products = Annotated[int, Field(ge=0)]
KEPT = "kept"  # in what a penalty carries: how much of its last gradient the trainer's clip left, 1 for all of it


@dataclass(frozen=True)
class Outcome:
    """grads {name: tensor} of the penalty, named scalars, and its cost in force evaluations but for the linearisation at the
    free state, which all share."""

    grads: dict[str, Tensor]
    measured: dict[str, float]
    evaluations: int


class Penalty(Family):
    """What is added to the loss for the dynamics' sake."""

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        """The penalty at a free state. step: the solver's. carried: tensors of its own from call to call."""
        raise owed(self, "__call__(problem, step, carried)")


def gradient(problem: Problem, cost: float, total: Callable[[], Tensor]) -> tuple[dict[str, Tensor], float, float]:
    """Gradient of total() in the block's weights that are trained, its value, and what both cost where total() costs `cost`."""
    trained = problem.weights
    with torch.set_grad_enabled(bool(trained)):
        value = total()
        if not value.requires_grad:
            return {}, value.item(), cost
        grads = torch.autograd.grad(value, list(trained.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(trained, grads, strict=True)), value.item(), (1 + BACKWARD) * cost


def of_samples(problem: Problem, above: Tensor, products: int, excess: Callable[[Any], Tensor],
           strength: float) -> tuple[dict[str, Tensor], float, float]:
    """The same of strength * mean_b excess_b^2, to which only the samples `above` (B,) contribute: excess(J of those), by so
    many products with it."""
    if not above.any():
        return {}, 0.0, 0.0
    cost = (LINEARISATION + products * PRODUCT) * above.double().mean().item()
    return gradient(problem, cost, lambda: strength * excess(problem.model.block.linearise(
        problem.state[above], problem.x[above])).square().sum() / len(above))


def unit(a: Tensor, tokens: bool = False) -> Tensor:
    """Each sample, or each token, scaled to norm 1; zero stays zero."""
    size = a.norm(dim=-1, keepdim=True) if tokens else lanes(norm(a), a)
    return a / size.clamp_min(torch.finfo(a.dtype).tiny)


def draw(problem: Problem, carried: dict[str, Tensor]) -> Tensor:
    """Random directions of norm 1, (B, ...), a new draw each call."""
    return unit(problem.normal(torch.Generator().manual_seed(counted(carried, "draws"))))


def leading(problem: Problem, step: float, products: int, size: int) -> Tensor:
    """Orthonormal basis (B, size, ...) of the last iterates of a power iteration by I + step J, from the last push F(z*).

    It spans a complex pair from size 2 on, which one real vector never settles on.
    """
    iterates = [unit(problem.force(problem.state))]
    for _ in range(products + size - 1):
        iterates.append(unit(iterates[-1] + step * problem.jacobian.product(iterates[-1])))
    return orthonormal(iterates[-size:])


def orthonormal(directions: list[Tensor]) -> Tensor:
    """Basis (B, K, ...) of the span of K directions (B, ...)."""
    columns = torch.stack(directions, 1).flatten(2).mT  # (B, n, K)
    return torch.linalg.qr(columns)[0].mT.unflatten(2, directions[0].shape[1:])


def compressed(jacobian: Any, basis: Tensor) -> Tensor:
    """Q^T J Q of each sample, (B, K, K), for an orthonormal basis Q (B, K, ...)."""
    moved = torch.stack([jacobian.product(q) for q in basis.unbind(1)], 1)
    return basis.flatten(2) @ moved.flatten(2).mT
