"""The run store: what was trained, with which configuration and by which source, and the results that notebooks write."""

from .records import ROOT, Store, configurations, load_profile, save_machine, save_result
from .runs import Run

__all__ = ["ROOT", "Run", "Store", "configurations", "load_profile", "save_machine", "save_result"]
