"""What the linearisation at one state gives: the adjoint state as a linear response, and how far J is from symmetric."""

from typing import Any

import torch
from torch import Tensor

from ..solvers import Solver, norm
from .base import PRODUCT, Adjoint
from .problem import Problem


def linear_response(jacobian: Any, problem: Problem, solver: Solver) -> Adjoint:
    """The adjoint state by J^T a = -g, one transposed product a step."""
    phase = solver.adjoint(jacobian, problem.slope, problem.scale)
    return Adjoint(phase.value, phase, evaluations=PRODUCT * phase.evaluations)


def asymmetric(jacobian: Any, away: Tensor) -> Tensor:
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
