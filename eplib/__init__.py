"""Equilibrium propagation on transformers: blocks, solvers, estimators, controllers.

Importing this package is cheap: torch is loaded when the first submodule that needs it is.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["gradient", "ep_loss", "load", "__version__"]

_LAZY = {"gradient": "estimators", "ep_loss": "estimators", "load": "trained"}
_MODULES = ("blocks", "calculus", "classics", "codecs", "controllers", "data", "diagnostics", "dynamics",
            "estimators", "evaluation", "families", "kernels", "log", "markup", "models", "optimisers", "parallel", "plotting",
            "profiles", "runconfig", "settings", "solvers", "sources", "spectra", "starts", "store", "tasks", "trained",
            "training")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"eplib.{_LAZY[name]}"), name)
    if name in _MODULES:
        return import_module(f"eplib.{name}")
    raise AttributeError(f"eplib has no {name!r}; it has {', '.join((*_LAZY, *_MODULES))}")
