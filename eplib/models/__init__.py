"""Language model and image classifier around one equilibrium block."""

from .base import IGNORED, Backend, Classifier, EquilibriumModel, LanguageModel, UnsettledWarning, cross_entropy

__all__ = ["IGNORED", "Backend", "Classifier", "EquilibriumModel", "LanguageModel", "UnsettledWarning", "cross_entropy"]
