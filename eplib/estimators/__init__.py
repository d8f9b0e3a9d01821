"""Estimators of the loss gradient, what calls them, and what one of your own is made of."""

from .baselines import FeedbackAlignment, Implicit, OneStep
from .calls import GradientError, Report, _finite, asymmetry, at_state, gradient, summed
from .entry import second_phase
from .horizons import BPTT, Backprop, FiniteHorizon, ForwardMode
from .loss import ep_loss
from .nudged import (
    BACKWARD,
    FORCE,
    LINEARISATION,
    PRODUCT,
    Adjoint,
    Beta,
    DerivativeError,
    Estimator,
    Problem,
    Steps,
    asymmetric,
    contrast,
    real_points,
)
from .propagation import AsymEP, DyadicEP, FlippedCorrection, HolomorphicEP, ShuffledNudge, Tracking, VectorField

__all__ = ["BACKWARD", "BPTT", "FORCE", "LINEARISATION", "PRODUCT", "Adjoint", "AsymEP", "Backprop", "Beta", "DerivativeError",
           "DyadicEP", "Estimator", "FeedbackAlignment", "FiniteHorizon", "FlippedCorrection", "ForwardMode", "GradientError",
           "HolomorphicEP", "Implicit", "OneStep", "Problem", "Report", "ShuffledNudge", "Steps", "Tracking", "VectorField",
           "_finite", "asymmetric", "asymmetry", "at_state", "contrast", "ep_loss", "gradient", "real_points",
           "second_phase", "summed"]
