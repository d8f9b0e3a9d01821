"""Estimators of the loss gradient, what calls them, and what one of your own is made of."""

from .base import (
    BACKWARD,
    FORCE,
    LINEARISATION,
    PRODUCT,
    Adjoint,
    Beta,
    ByAdjoint,
    Estimator,
    Steps,
    asymmetric,
    asymmetry,
    linear_response,
)
from .baselines import FeedbackAlignment, Implicit, OneStep
from .batch import Batch
from .calls import at_state, ep_loss, gradient
from .controls import FlippedCorrection, ShuffledNudge
from .dyadic import DyadicEP
from .entry import second_phase
from .holomorphic import HolomorphicEP
from .horizons import BPTT, Backprop, FiniteHorizon, ForwardMode
from .imperfect import MismatchedTwin, NoisyEP
from .nudged import contrast, lanes, real_points
from .problem import DerivativeError, Problem, trained
from .propagation import AsymEP, VectorField
from .report import GradientError, Report, finite, summed
from .tracking import Tracking

__all__ = ["BACKWARD", "BPTT", "FORCE", "LINEARISATION", "PRODUCT", "Adjoint", "AsymEP", "Backprop", "Batch", "Beta",
           "ByAdjoint", "DerivativeError", "DyadicEP", "Estimator", "FeedbackAlignment", "FiniteHorizon",
           "FlippedCorrection", "ForwardMode", "GradientError", "HolomorphicEP", "Implicit", "MismatchedTwin", "NoisyEP",
           "OneStep", "Problem", "Report", "ShuffledNudge", "Steps", "Tracking", "VectorField", "asymmetric", "asymmetry",
           "at_state", "contrast", "ep_loss", "finite", "gradient", "lanes", "linear_response", "real_points",
           "second_phase", "summed", "trained"]
