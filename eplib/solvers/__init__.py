"""Solvers that take a force to its fixed point, per sample.

A solver knows the force only as a function of the state (B, ...), real or complex. Samples never influence each other: each
stops, diverges or runs on by its own residual, so a permuted batch gives permuted results. Free, nudged and adjoint phases
take any of them:

    Relaxation     explicit Euler to a residual; the lowest-residual iterate
    Anderson       the same fixed point in fewer evaluations, falling back to Euler where it stalls
    FixedHorizon   exactly so many Euler steps, the last iterate: the state of a finite-horizon objective
    MixedPrecision Anderson whose first evaluations are in bfloat16
    Homotopy       Anderson along a path of forces from the start state to the fixed point, where it stalls from afar
    Substitution   Anderson on a few tokens at a time, in the order in which a causal block's tokens depend on each other
    Snapshot       Euler through the whole horizon, the most settled iterate in hindsight
"""

from .anderson import Anderson, Differences, MixedPrecision
from .base import Solver
from .homotopy import Homotopy
from .horizons import FixedHorizon, Snapshot
from .relaxation import Relaxation
from .solution import Solution, Status, norm, refuse_rounding, relative_force, worst
from .substitution import Substitution

__all__ = ["Anderson", "Differences", "FixedHorizon", "Homotopy", "MixedPrecision", "Relaxation", "Snapshot", "Solution",
           "Solver", "Status", "Substitution", "norm", "refuse_rounding", "relative_force", "worst"]
