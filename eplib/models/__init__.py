"""Models around a block: the interfaces, the language model and the image classifier."""

from .base import RENAMED, Architecture, Backend, Model
from .generation import UnsettledWarning
from .losses import IGNORED, cross_entropy
from .transformer import Classifier, LanguageModel, Transformer, TransformerModel

__all__ = ["IGNORED", "RENAMED", "Architecture", "Backend", "Classifier", "LanguageModel", "Model", "Transformer",
           "TransformerModel", "UnsettledWarning", "cross_entropy"]
