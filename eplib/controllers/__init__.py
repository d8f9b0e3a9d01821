"""Controllers that keep the free phase contracting while the weights learn.

A penalty is called as `penalty(problem, step, carried)`, with a dict of tensors that is its own from call to call, and is a
function of the weights alone: the free state z* and the directions along which it looks at J = dF/dz are held fixed, so its
gradient is one backward pass through J v, or a contrast of two contractions, with every estimator, and never through a
relaxation. Frozen weights get none. `Outcome` says what it cost in force evaluations (the unit of `estimators.FORCE`). Which
samples are looked at again depends on the samples: only those that have something to penalise.
"""

from .base import KEPT, Outcome, Penalty, gradient
from .contraction import ContractionRate, Integral
from .mode import LeadingMode, NumericalAbscissa
from .norms import Homeostasis, JacobianNorm, ResidualDriven, ResidualPenalty

__all__ = ["KEPT", "ContractionRate", "Homeostasis", "Integral", "JacobianNorm", "LeadingMode", "NumericalAbscissa", "Outcome",
           "Penalty", "ResidualDriven", "ResidualPenalty", "gradient"]
