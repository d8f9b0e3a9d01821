"""The convolutional network of equilibrium propagation (Ernoult et al. 2019), read out as in Laborieux et al. 2021."""

from math import isqrt
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from ..config import configuration
from ..models import Architecture, Model, cross_entropy
from ..tasks import Patches, Signal
from .hopfield import Hopfield, OneWay

Positive = Annotated[int, Field(ge=1)]
STRIDE = 2


class ConvolutionalNetwork(Model):
    """Images in one channel; a linear readout of the last layer's units with cross-entropy, outside of the dynamics: units of
    a box that were the output would stop the pull that leads out of it."""

    def __init__(self, first: nn.Conv2d, block: Hopfield, tokens: int, classes: int):
        super().__init__()
        self.first, self.block, self.grid = first, block, isqrt(tokens)
        self.readout = nn.Linear(block.layers.sizes[-1], classes)

    def clamp(self, inputs: Tensor) -> Tensor:
        side = isqrt(inputs.shape[-1])
        rows = inputs.view(-1, self.grid, self.grid, side, side).transpose(2, 3)  # (B, row, y, column, x)
        return self.first(rows.reshape(-1, 1, self.grid * side, self.grid * side))

    def predict(self, h: Tensor) -> Tensor:
        return self.readout(h)

    def loss_of(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(predictions, targets)


@configuration
class Convolutional(Architecture):
    """Convolutions between layers of hard-sigmoid units, each with its transpose as feedback; False for the ordinary network.

    The published network pools the largest of four units, where the energy has kinks at which a phase can jump to and fro. A
    convolution of stride 2 and one pixel more holds that of stride 1 with the mean of four units as a special case, and its
    energy is smooth.
    """

    channels: tuple[Positive, ...] = (32, 64)
    kernel: Positive = 6
    feedback: bool = True

    clamp_shaped = False

    @property
    def explicit(self) -> bool:  # type: ignore[override]
        return not self.feedback

    def build(self, signal: Signal) -> ConvolutionalNetwork:
        """The network for square images in square Patches of one channel. Raises TypeError for another signal, ValueError for
        images that are too small."""
        if not isinstance(signal, Patches) or signal.channels > 1 or any(isqrt(n) ** 2 != n
                                                                         for n in (signal.tokens, signal.size)):
            raise TypeError(f"{self.kind} takes square images in square Patches of one channel, and the task gives {signal}")
        side, shapes = isqrt(signal.tokens * signal.size), []
        for channels in self.channels:
            if side < self.kernel:
                raise ValueError(f"a layer of {side} x {side} units has no room for a kernel of {self.kernel}; give fewer "
                                 "channels, or a smaller kernel")
            side = (side - self.kernel) // STRIDE + 1
            shapes.append((channels, side, side))
        first, *links = (nn.Conv2d(below, above, self.kernel, STRIDE)
                         for below, above in zip((1, *self.channels), self.channels, strict=False))
        block = (Hopfield if self.feedback else OneWay)(shapes, links)
        return ConvolutionalNetwork(first, block, signal.tokens, signal.classes)
