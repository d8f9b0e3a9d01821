"""The nudged phase: trajectories relaxed under the loss's pull and contrasted with the free state."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..dynamics import InKernel, LinearInKernel, projection
from ..solvers import Solution, Solver, norm
from .base import FORCE, LINEARISATION, PRODUCT, Adjoint, asymmetric
from .problem import Problem, counted
from .rounds import Rounds

Nudging = Literal["symmetric", "one-sided", "random-sign"]
CORRECTED = FORCE + 2 * PRODUCT  # of one trajectory under F - (J - J^T)(z - z*)
# Float spacings of z*, times sum |w_k|, below which the slope's own size is no unit for a contrast's residual: a force has a
# round-off of about half a spacing, and a hundredth of the unit, shared by the trajectories, is to be within reach.
ROUNDING = 256.0


def real_points(problem: Problem, beta: float, nudging: Nudging = "symmetric") -> tuple[Tensor, Tensor]:
    """Nudges and weights of a real contrast, (B or 1, K) each: +-beta, +beta against the free state, or a random sign for each
    sample, whose first-order biases cancel in the mean (Laborieux et al. 2021)."""
    if nudging == "symmetric":
        nudges = problem.state.new_tensor([[beta, -beta]])
        return nudges, 1 / (2 * nudges)
    nudges = problem.state.new_full((problem.state.shape[0], 1), beta)
    if nudging == "random-sign":
        generator = torch.Generator().manual_seed(counted(problem.carried, "sign_draws"))
        signs = problem.part.mine(lambda size: torch.randint(2, (size, 1), generator=generator))
        nudges = nudges * (2 * signs - 1).to(nudges)
    return nudges, 1 / nudges


def lanes(values: Tensor, like: Tensor) -> Tensor:
    """Values (B) or (B, K) as factors of states (B, ...) or (B, K, ...)."""
    return values.view(*values.shape, *(1,) * (like.dim() - values.dim()))


def contrast(problem: Problem, nudges: Tensor, weights: Tensor, solver: Solver, correction: Callable[[Tensor], Tensor] | None,
             cost: int, response: Tensor | None = None, held: LinearInKernel | None = None) -> Adjoint:
    """Relaxes z_k under F - beta_k g - correction and contrasts them: a = -Re sum_k w_k (z_k - z*).

    nudges beta_k and weights w_k are (B or 1, K), real or complex. The residual is that of the contrast relative to the slope,
    ||Re sum_k w_k F_k|| / ||g(z*)||: times the solver's step it is the increment of a. A slope below what the contrast can
    resolve of the state counts as that (`ROUNDING`). Where the weights sum to zero the free phase's own residual, which moves
    all trajectories alike, drops out; a single one, which it would move by itself, relaxes under forces relative to F(z*). The
    trajectories start at z* - beta_k response, by default at z*. cost: of one evaluation of all of them. held: J at z*, where
    that is what the correction consists of. `Adjoint.phase` ends at the states (B, K, ...).
    """
    spacing = torch.finfo(problem.state.dtype).eps * norm(problem.state) * weights.abs().sum(1)
    unit = torch.maximum(problem.scale, ROUNDING * spacing)
    centre = problem.state.unsqueeze(1)
    factors, shares = lanes(nudges, centre), lanes(weights, centre)

    def combined(states: Tensor) -> Tensor:
        total = (shares * states).sum(1)
        return total.real if total.is_complex() else total

    def residual(push: Tensor, _: Tensor) -> Tensor:
        return norm(combined(push)) / unit

    if solver.in_kernel and isinstance(problem.dynamics, InKernel) and (correction is None or held is not None):
        # what each trajectory may leave: the contrast adds K of them up, and half of the tolerance is for the slope's change
        allowed = unit.unsqueeze(1) / (2 * weights.shape[1] * weights.abs())
        phase = Rounds(problem, problem.dynamics, solver, factors, allowed, held, response).solve(residual)
    else:
        phase = _relaxed(problem, solver, factors, correction, cost, response, residual)
    away = phase.value - centre
    displacement = torch.stack([norm(one) for one in away.unbind(1)]).amax(0) / norm(problem.state)
    return Adjoint(-combined(away), phase, displacement, phase.evaluations)


def _relaxed(problem: Problem, solver: Solver, factors: Tensor, correction: Callable[[Tensor], Tensor] | None, cost: int,
             response: Tensor | None, residual: Callable[[Tensor, Tensor], Tensor]) -> Solution:
    """All trajectories as one batch (B, K, ...), by the solver's own loop."""
    centre, alone = problem.state.unsqueeze(1), factors.shape[1] == 1
    rest = problem.force(centre) if alone else 0.0

    def force(states: Tensor) -> Tensor:
        push = problem.nudged(states, factors * problem.loss_slope(states), rest)
        return push if correction is None else push - correction(states)

    start = centre.repeat_interleave(factors.shape[1], 1).to(factors.dtype)
    if response is not None:
        start = start - factors * response.unsqueeze(1)
    # a correction pushes what the set holds as well, and settles there outside of it
    phase = solver.solve(force, start, residual, project=projection(problem.dynamics) if correction is None else None)
    return replace(phase, evaluations=phase.evaluations * cost + FORCE * alone)


def corrected(problem: Problem, nudges: Tensor, weights: Tensor, solver: Solver, sign: int = 1) -> Adjoint:
    """The contrast under F - sign (J - J^T)(z - z*), J frozen at z*; sign = -1 is the wrong one."""
    centre = problem.state.unsqueeze(1)
    jacobian = problem.linearise(centre)
    cost = CORRECTED * nudges.shape[1] * (2 if nudges.is_complex() else 1)  # of real and of imaginary parts
    found = contrast(problem, nudges, weights, solver, lambda states: sign * asymmetric(jacobian, states - centre), cost,
                     held=jacobian if sign == 1 else None)
    return replace(found, evaluations=found.evaluations + LINEARISATION)
