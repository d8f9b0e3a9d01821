"""The classic networks of equilibrium propagation, a file each, written as one of your own would be: on public names alone."""

from .convolutional import Convolutional
from .hopfield import Hopfield, LayeredHopfield

__all__ = ["Convolutional", "Hopfield", "LayeredHopfield"]
