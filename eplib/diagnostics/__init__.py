"""Measurements of gradients and at a fixed point, and whether a model of your own is what it is taken for."""

from .checking import Checked, check
from .gdu import bptt_sums, nudged_sums, step_by_step
from .gradients import (
    GROUPS,
    Agreement,
    LinearBlock,
    LinearSystem,
    LiveBytes,
    NonReciprocity,
    adaptive_compute,
    adjoint_gradient,
    agreement,
    attention_distance,
    dense_jacobian,
    fingerprint,
    groups,
    log_slope,
    non_reciprocity,
    ranks,
    singular_radii,
    triangulation,
)

__all__ = ["GROUPS", "Agreement", "Checked", "LinearBlock", "LinearSystem", "LiveBytes", "NonReciprocity",
           "adaptive_compute", "adjoint_gradient", "agreement", "attention_distance", "bptt_sums", "check", "dense_jacobian",
           "fingerprint", "groups", "log_slope", "non_reciprocity", "nudged_sums", "ranks", "singular_radii", "step_by_step",
           "triangulation"]
