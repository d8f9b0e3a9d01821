"""The classic networks of equilibrium propagation, a file each, written as one of your own would be: on public names alone."""

from .completion import Completion, Masked
from .convolutional import Convolutional
from .hopfield import Hopfield, LayeredHopfield

__all__ = ["Completion", "Convolutional", "Hopfield", "LayeredHopfield", "Masked"]
