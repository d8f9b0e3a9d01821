"""Equilibrium propagation on a circle of complex nudges."""

import math
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from ..config import configuration
from ..solvers import Solver, norm
from .base import Adjoint, Beta, ByAdjoint, Steps
from .nudged import corrected, lanes
from .problem import Problem


@configuration
class HolomorphicEP(ByAdjoint):
    """Corrected EP on `points` nudges r e^(2 pi i k / N): a = -Re (1 / N r) sum_k e^(-2 pi i k / N) (z_k - z*), the Cauchy
    integral for dz/dbeta, biased by O(r^N) (Laborieux & Zenke 2022; the correction: Scurria et al. 2026).

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
        half, state = self.points // 2, problem.state
        turns = torch.arange(half + 1, dtype=torch.float64) / self.points  # upper half: 0, 1/N, .. 1/2
        circle = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
        circle[0], circle[half] = 1, -1  # exactly real, so that their states stay so
        # a conjugate pair counts twice, in its real part
        double = torch.where((turns == 0) | (turns == 0.5), 1, 2).to(torch.float64)
        dtype = torch.promote_types(state.dtype, torch.complex32)
        nudges, weights = ((value[None]).to(state.device, dtype) for value in (
            self.beta * circle, double * circle.conj() / (self.points * self.beta)))
        found = corrected(problem, nudges, weights, solver)
        assert found.phase is not None  # a contrast has one
        states, tiny = found.phase.value, torch.finfo(dtype).tiny
        moved = torch.stack([norm(one) for one in (states - state.unsqueeze(1)).unbind(1)]).amax(0).clamp_min(tiny)
        mean = (lanes(double.to(state)[None], states) * states.real).sum(1) / self.points
        leak = norm(torch.cat([states[:, 0].imag, states[:, half].imag], 1))
        return replace(found, measured={"aliasing": (norm(mean - state) / moved).max().item(),
                                        "imaginary_leakage": (leak / moved).max().item()})
