"""Measurements of gradients and at a fixed point, and whether a model of your own is what it is taken for."""

from .adaptive import adaptive_compute, clean_and_noisy, ranks
from .checking import Checked, check
from .dense import LinearBlock, LinearSystem, NonReciprocity, adjoint_gradient, dense_jacobian, non_reciprocity
from .fixed_point import attention_distance, fingerprint
from .gdu import bptt_sums, nudged_sums, step_by_step
from .gradients import GROUPS, Agreement, agreement, groups, log_slope, triangulation
from .memory import LiveBytes
from .radii import singular_radii

__all__ = ["GROUPS", "Agreement", "Checked", "LinearBlock", "LinearSystem", "LiveBytes", "NonReciprocity", "adaptive_compute",
           "adjoint_gradient", "agreement", "attention_distance", "bptt_sums", "check", "clean_and_noisy", "dense_jacobian",
           "fingerprint", "groups", "log_slope", "non_reciprocity", "nudged_sums", "ranks", "singular_radii", "step_by_step",
           "triangulation"]
