"""What an estimator is, and what many of them are made of: the linear response, the antisymmetric part of J."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..dynamics import Linearisation
from ..families import Family, owed
from ..solvers import Solution, Solver, norm
from .batch import Batch
from .problem import Problem
from .report import Report, finite

# The unit of cost is a force evaluation of the whole batch, wherever cost is counted. A linearisation, and a product with J or
# J^T however it is computed, count as one; a backward pass through a graph as two for each of these in it, and so does the
# contraction <a, dF/dtheta>. The readout and the embedding are outside the dynamics and do not count.
FORCE = LINEARISATION = PRODUCT = 1
BACKWARD = 2

Steps = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(gt=0)]


class Estimator(Family):
    """How the gradient is found. One of your own is a `@configuration` that overrides `gradient`, or of `ByAdjoint` one that
    overrides `adjoint`, and the attributes of the class that differ.

    equilibrium: it needs a settled free phase. second_phase: a solver solves a nudged or adjoint phase for it, in at most
    `steps`, which it then has. compiled: the compiled kernel computes something of it. explicit: it is for blocks whose start
    state is the answer. rounds: its second phase may begin in half precision, which two states to be contrasted may not.
    linear: its adjoint state is the linear response, which audits of the others compare them with.
    """

    equilibrium = second_phase = compiled = True
    explicit = rounds = linear = False

    def gradient(self, batch: Batch, solver: Solver, nudged: Solver | None) -> Report:
        """The task's part of the report; its state and the penalties' part are filled in. solver: of the free phase. nudged: of
        the second one, None where there is none."""
        raise owed(self, "gradient(batch, solver, nudged), or, as an estimators.ByAdjoint, adjoint(problem, solver)")


@dataclass(frozen=True)
class Adjoint:
    """a (B, ...) = -J^-T g as an estimator found it, the phase it came from, the largest displacement ||z_beta - z*|| / ||z*||
    of each sample (B,), the cost in force evaluations but for the linearisation at the free state, and what else was
    measured."""

    value: Tensor
    phase: Solution | None = None
    displacement: Tensor | None = None
    evaluations: int = 0
    measured: dict[str, float] = field(default_factory=dict)


class ByAdjoint(Estimator):
    """An estimator that finds an adjoint state at a settled free phase; what is read out with it is the same for all."""

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        """The adjoint state. solver: of the second phase, that of the free phase where there is none."""
        raise owed(self, "adjoint(problem, solver)")

    def gradient(self, batch: Batch, solver: Solver, nudged: Solver | None) -> Report:
        """d/dtheta of mean_b <a_b, F(z*_b; theta)> + l_b at the free state: of the block's weights sums of outer products of
        quantities local to each weight, where its derivative is written by hand (`calculus`)."""
        free = batch.settle(solver)
        measured: dict[str, float] = {"force_evaluations": free.evaluations}
        if not free.status.usable:
            return Report(math.nan, None, free, None, measured)
        problem = batch.at(free.value)
        with torch.no_grad():
            found = self.adjoint(problem, nudged or solver)
            usable, grads = found.phase is None or found.phase.status.usable, None
            if usable:  # contracted with the very tensor that the solver returned: its pass may be kept
                grads = finite(problem.gradient(*problem.jacobian.contract(found.value)))
        measured["force_evaluations"] += found.evaluations + BACKWARD * usable
        if found.displacement is not None:
            measured["displacement"] = found.displacement.max().item()
        return Report(problem.readout.loss, grads, free, found.phase, found.measured | measured, found.value)


def linear_response(jacobian: Linearisation, problem: Problem, solver: Solver) -> Adjoint:
    """The adjoint state by J^T a = -g, one transposed product a step."""
    phase = solver.adjoint(jacobian, problem.slope, problem.scale, problem.part)
    return Adjoint(phase.value, phase, evaluations=PRODUCT * phase.evaluations)


def asymmetric(jacobian: Linearisation, away: Tensor) -> Tensor:
    """(J - J^T) applied to states (B, K, ...), to real and imaginary parts apart."""
    if away.is_complex():
        both = asymmetric(jacobian, torch.cat([away.real, away.imag], 1))
        return torch.complex(*both.chunk(2, 1))
    return jacobian.product(away) - jacobian.transposed(away)


def asymmetry(jacobian: Any, v: Tensor) -> float:
    """||J v - J^T v|| / ||J v||, the largest of the batch: along the adjoint state, what the correction acts on."""
    with torch.no_grad():
        moved = jacobian.product(v)
        return (norm(moved - jacobian.transposed(v)) / norm(moved).clamp_min(torch.finfo(v.dtype).tiny)).max().item()
