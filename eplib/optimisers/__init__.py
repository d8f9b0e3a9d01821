"""How gradients become updates: schedule and clipping that all rules share, AdamW, and what stores its updates with faults."""

from .base import Optimiser, UpdateRule
from .device import Device, quantised

__all__ = ["Device", "Optimiser", "UpdateRule", "quantised"]
