"""Corrected EP on imperfect hardware: noise on what is nudged and read, a transposed circuit that is not quite the first's."""

import math
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..config import configuration
from ..intact import bare
from ..solvers import Solver, norm
from .base import LINEARISATION, PRODUCT, Adjoint, Beta, ByAdjoint, Steps, linear_response
from .nudged import corrected, lanes, real_points
from .problem import Problem, Readout, counted

Strength = Annotated[float, Field(ge=0)]


def _draws(problem: Problem, key: str) -> torch.Generator:
    """Another stream at every call."""
    return torch.Generator().manual_seed(counted(problem.carried, key))


def _noise(problem: Problem, like: Tensor, draws: torch.Generator) -> Tensor:
    """Normal noise whose deviation is the root mean square of each sample of `like`, (B, ...) as the state."""
    return lanes(norm(like) / math.sqrt(like[0].numel()), like) * problem.normal(draws)


@dataclass(frozen=True)
class _Misnudged(Problem):
    """A problem whose loss pulls at the state by g + error, (B, ...), wherever the state is."""

    error: Tensor = None  # type: ignore[assignment]  # always given

    def loss_slope(self, z: Tensor) -> Tensor:
        return super().loss_slope(z) + (self.error.unsqueeze(1) if z.dim() > self.state.dim() else self.error)

    @cached_property
    def readout(self) -> Readout:
        found = super().readout
        return found._replace(slope=found.slope + self.error)


@configuration
class NoisyEP(ByAdjoint):
    """Corrected EP (`AsymEP`) whose two nudged states are read, and whose nudge is applied, with noise.

    state: deviation of the noise on each unit as it is read, over the root mean square of z*; independent in the two states,
    so that the adjoint state, their difference over 2 beta, has it 1 / (sqrt(2) beta) times. nudge: of the noise on the loss's
    pull on each unit, over the root mean square of g; the same while both states settle. Both are drawn anew for every batch.
    """

    beta: Beta = 0.2
    state: Strength = 0.0
    nudge: Strength = 0.0
    steps: Steps | None = None

    @model_validator(mode="after")
    def _does_something(self) -> "NoisyEP":
        if not (self.state or self.nudge):
            raise ValueError("NoisyEP without noise is AsymEP; give state or nudge, or take that")
        return self

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        draws = _draws(problem, "noise_draws")
        nudges, weights = real_points(problem, self.beta)
        given = problem
        if self.nudge:
            known = {field.name: getattr(problem, field.name) for field in fields(problem)}
            given = _Misnudged(**known, error=self.nudge * _noise(problem, problem.slope, draws))
        found = corrected(given, nudges, weights, solver)
        if not self.state:
            return found
        read = self.state * weights.square().sum().sqrt() * _noise(problem, problem.state, draws)
        return replace(found, value=found.value + read)


@configuration
class MismatchedTwin(ByAdjoint):
    """The linear response of a transposed twin, a second circuit whose weights w (1 + mismatch xi), xi standard normal, are not
    quite those of the first: J^T a = -g with its J at the first one's free state.

    redrawn: new xi at every call, of weights that fluctuate between the phases; else one xi for ever, of devices that differ.
    Measures ||(J_twin - J)^T a|| / ||J^T a|| as `twin_error`. What is contracted with a is the first circuit's own force.
    """

    mismatch: Strength
    redrawn: bool = False
    steps: Steps | None = None

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        draws = _draws(problem, "twin_draws") if self.redrawn else torch.Generator().manual_seed(0)
        twin = deepcopy(bare(problem.model.block))
        for value in twin.parameters():
            value.mul_(1 + self.mismatch * torch.randn(value.shape, generator=draws, dtype=torch.float64).to(value))
        jacobian = twin.linearise(problem.state, problem.x)
        found = linear_response(jacobian, problem, solver)
        own = problem.jacobian.transposed(found.value)
        error = norm(jacobian.transposed(found.value) - own) / norm(own).clamp_min(torch.finfo(own.dtype).tiny)
        return replace(found, evaluations=found.evaluations + LINEARISATION + 2 * PRODUCT,
                       measured={"twin_error": error.max().item()})
