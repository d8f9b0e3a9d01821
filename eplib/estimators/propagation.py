"""Equilibrium propagation: estimators of the adjoint state from a nudged phase, and negative controls.

Notation. The free phase settles F(z*; theta) = 0. Sample b has loss l_b(z), the mean over its own tokens; g = dl/dz. With the
adjoint state a = -J^-T g the loss gradient is

    dL/dtheta = mean_b [ d/dtheta <a_b, F(z*_b; theta)> + dl_b/dtheta ]      (implicit function theorem)

The estimators differ only in how they find a. The contrasting ones relax states z_k under F - beta_k g and combine them into
a = -dz/dbeta at beta = 0: two points +-beta leave a bias O(beta^2) (Laborieux et al. 2021), N points on a complex circle of
radius r one of O(r^N) (Laborieux & Zenke 2022). For J != J^T the plain field gives J^-1 instead of J^-T; the correction
-(J - J^T)(z - z*) repairs it (Scurria et al. 2026). All are matrix-free, and none stores a graph in a relaxation except BPTT
and the forward mode, which are there to be compared with.
"""

import math
from dataclasses import fields, replace
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..config import configuration
from ..solvers import Solver, norm
from .nudged import (
    FORCE,
    LINEARISATION,
    PRODUCT,
    Adjoint,
    Beta,
    Estimator,
    Nudging,
    Problem,
    Steps,
    asymmetric,
    contrast,
    lanes,
    real_points,
)

CORRECTED = FORCE + 2 * PRODUCT  # a trajectory's step under F - (J - J^T)(z - z*)


@configuration
class VectorField(Estimator):
    """Plain EP on the vector field, uncorrected: a = -J^-1 g, exact only where J = J^T (Scellier & Bengio 2017)."""

    beta: Beta = 0.2
    steps: Steps | None = None
    nudging: Nudging = "symmetric"

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        points = real_points(problem, self.beta, self.nudging)
        return contrast(problem, *points, solver, None, cost=FORCE * points[0].shape[1])[0]


@configuration
class AsymEP(Estimator):
    """Corrected EP, the correction -(J - J^T)(z - z*) frozen at the free state (Scurria et al. 2026)."""

    beta: Beta = 0.2
    steps: Steps | None = None
    nudging: Nudging = "symmetric"

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        points, centre = real_points(problem, self.beta, self.nudging), problem.state.unsqueeze(1)
        jacobian = problem.linearise(centre)
        found = contrast(problem, *points, solver, lambda states: asymmetric(jacobian, states - centre),
                         cost=CORRECTED * points[0].shape[1], held=jacobian)[0]
        return replace(found, evaluations=found.evaluations + LINEARISATION)


@configuration
class HolomorphicEP(Estimator):
    """Corrected EP on `points` nudges r e^(2 pi i k / N): a = -Re (1 / N r) sum_k e^(-2 pi i k / N) (z_k - z*), the Cauchy
    integral for dz/dbeta, biased by O(r^N) (Laborieux & Zenke 2022; with the correction 002, section "Holomorphic EP").

    z at the conjugate nudge is the conjugate of z, so the lower half of the circle is not computed. Within the radius of
    convergence the mean of the z_k is z*: `measured["aliasing"]` is its distance relative to the displacement, and
    `measured["imaginary_leakage"]` the imaginary part of the states at the two real nudges, which is zero in exact arithmetic.
    N = 2 is symmetric nudging. Raises TypeError for a block without a complex extension.
    """

    beta: Beta = 0.2
    points: Annotated[int, Field(ge=2, multiple_of=2)] = 4
    steps: Steps | None = None

    compiled = False

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        if not problem.model.block.holomorphic:
            raise TypeError(f"{type(problem.model.block).__name__} has no complex extension; use blocks.Thick, or a real nudge")
        half = self.points // 2
        centre = problem.state.unsqueeze(1)
        jacobian = problem.linearise(centre)
        turns = torch.arange(half + 1, dtype=torch.float64) / self.points  # upper half: 0, 1/N, .. 1/2
        circle = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
        circle[0], circle[half] = 1, -1  # exactly real, so that their states stay so
        # a conjugate pair counts twice, in its real part
        double = torch.where((turns == 0) | (turns == 0.5), 1, 2).to(torch.float64)
        dtype = torch.promote_types(problem.state.dtype, torch.complex32)
        nudges, weights = ((value[None]).to(problem.state.device, dtype) for value in (
            self.beta * circle, double * circle.conj() / (self.points * self.beta)))
        found, states = contrast(problem, nudges, weights, solver, lambda z: asymmetric(jacobian, z - centre),
                                  cost=2 * CORRECTED * (half + 1))  # of real and of imaginary parts
        moved = torch.stack([norm(one) for one in (states - centre).unbind(1)]).amax(0).clamp_min(torch.finfo(dtype).tiny)
        mean = (lanes(double.to(problem.state)[None], problem.state) * states.real).sum(1) / self.points
        leak = norm(torch.cat([states[:, 0].imag, states[:, half].imag], 1))
        measured = {"aliasing": (norm(mean - problem.state) / moved).max().item(),
                    "imaginary_leakage": (leak / moved).max().item()}
        return replace(found, evaluations=found.evaluations + LINEARISATION, measured=measured)


@configuration
class Tracking(Estimator):
    """Corrected EP re-linearised at the moving common mode m = (z_+ + z_-) / 2, both trajectories in lockstep (002).

    The correction is odd, +-(J(m) - J(m)^T) d with d = (z_+ - z_-) / 2, so it is computed once for the pair; there is no
    one-sided form. held: m stays at z*, which saves the linearisations. warm: the pair starts at its linear response z* -+ beta
    a, J^T a = -g being solved first, to half the tolerance where the solver has one, and then only has to confirm it; if that
    phase fails, it is the one that is returned.
    """

    beta: Beta = 0.2
    steps: Steps | None = None
    held: bool = False
    warm: bool = False

    @property
    def rounds(self) -> bool:  # type: ignore[override]  # of the class it is a constant
        return self.warm

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        def correction(pair: Tensor) -> Tensor:
            plus, minus = pair.unbind(1)
            jacobian = problem.jacobian if self.held else problem.linearise((plus + minus) / 2)
            odd = asymmetric(jacobian, (plus - minus) / 2)
            return torch.stack([odd, -odd], 1)

        linear = None
        if self.warm:
            closer = replace(solver, tol=solver.tol / 2) if solver.tol else solver  # type: ignore[type-var]
            linear = closer.adjoint(problem.jacobian, problem.slope, problem.scale)
            if not linear.status.usable:
                return Adjoint(linear.value, linear, None, PRODUCT * linear.evaluations)
        found = contrast(problem, *real_points(problem, self.beta, "symmetric"), solver, correction,
                         cost=2 * FORCE + 2 * PRODUCT + (0 if self.held else LINEARISATION),
                         response=linear.value if linear else None, held=problem.jacobian if self.held else None)[0]
        return replace(found, evaluations=found.evaluations + PRODUCT * linear.evaluations) if linear else found


@configuration
class DyadicEP(Estimator):
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
    def rounds(self) -> bool:  # type: ignore[override]  # of the class it is a constant
        return self.held

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        if self.held:
            phase = solver.adjoint(problem.jacobian, problem.slope, problem.scale)
            return Adjoint(phase.value, phase, None, PRODUCT * phase.evaluations)
        assert self.beta is not None  # by _fits
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


@configuration
class ShuffledNudge(Estimator):
    """Negative control: the linear response to targets from half a batch away, a = -J^-T g'; the readout learns the right
    ones."""

    steps: Steps | None = None

    rounds = True

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        targets = problem.targets
        wrong = replace(problem, targets=targets.flatten().roll(targets.numel() // 2).view_as(targets))
        phase = solver.adjoint(problem.jacobian, wrong.slope, wrong.scale)
        return Adjoint(phase.value, phase, None, PRODUCT * phase.evaluations)


class _Swapped:
    """A linearisation with J and J^T exchanged."""

    def __init__(self, jacobian: Any):
        self.product, self.transposed = jacobian.transposed, jacobian.product


class _SwappedProblem(Problem):
    def linearise(self, z: Tensor) -> _Swapped:
        return _Swapped(super().linearise(z))


@configuration
class FlippedCorrection(Estimator):
    """Negative control: `AsymEP` whose correction has the wrong sign, +(J - J^T)(z - z*)."""

    beta: Beta = 0.2
    steps: Steps | None = None

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        swapped = _SwappedProblem(**{part.name: getattr(problem, part.name) for part in fields(problem)})
        return AsymEP(beta=self.beta).adjoint(swapped, solver)
