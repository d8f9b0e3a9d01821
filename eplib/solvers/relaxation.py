"""Explicit Euler to a residual."""

from ..config import configuration
from .base import Count, Solver, Step, Tolerance


@configuration
class Relaxation(Solver):
    """Damped fixed-point iteration z <- z + step * F(z) (explicit Euler).

    step: Euler step. max_steps: most steps of a sample. tol: residual at which a sample stops and is frozen.
    """

    step: Step = 0.5
    max_steps: Count = 64
    tol: Tolerance = 1e-4

    in_kernel = True
