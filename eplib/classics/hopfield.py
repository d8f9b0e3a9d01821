"""The layered Hopfield network, on which equilibrium propagation was introduced (Scellier & Bengio 2017)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ..blocks import FromEnergy, Packed
from ..config import configuration
from ..models import Architecture, Model
from ..tasks import Patches, Signal

Positive = Annotated[int, Field(ge=1)]
FEEDBACK = 0.2  # of the usual initial weights between layers: small enough for one fixed point


class Hopfield(FromEnergy):
    """E = |s|^2 / 2 - <s_1, x> - sum_l <s_(l+1), W_l(s_l)> over layers s_l in the box [0, 1].

    In the box the hard sigmoid is the identity, so this is equation 1 of Scellier & Bengio 2017, and the links W_l may be any
    modules. x is what the first of them makes of the input, once for all steps. shapes: of the layers, packed in a state
    (..., n).
    """

    box = (0.0, 1.0)

    def __init__(self, shapes: Sequence[tuple[int, ...]], links: Sequence[nn.Module]):
        super().__init__()
        self.layers, self.links = Packed(*shapes), nn.ModuleList(links)

    def start(self, x: Tensor) -> Tensor:
        return self.layers.zeros(x)

    def energy(self, z: Tensor, x: Tensor) -> Tensor:
        layers, lead = self.layers.split(z), z.dim() - 1
        energy = z.square().sum(-1) / 2 - (layers[0] * x).flatten(lead).sum(-1)
        for link, (below, layer) in zip(self.links, pairwise(layers), strict=True):
            drive = link(below.flatten(0, lead - 1)).view(layer.shape)  # modules take one leading dimension
            energy = energy - (layer * drive).flatten(lead).sum(-1)
        return energy

    def output(self, z: Tensor) -> Tensor:
        return z[..., -self.layers.sizes[-1]:]


class OneWay(Hopfield):
    """The same links without feedback: the ordinary network of hard sigmoids, whose layers have their values at the start."""

    explicit = True

    def start(self, x: Tensor) -> Tensor:
        layers = [x.clamp(*self.box)]
        for link in self.links:
            layers.append(link(layers[-1]).clamp(*self.box))
        return self.layers.join(*layers)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.start(x) - z


class HopfieldNetwork(Model):
    """Its last layer is compared with the class as one-hot code: l = |s_L - y|^2 / 2."""

    def __init__(self, first: nn.Module, block: Hopfield):
        super().__init__()
        self.first, self.block = first, block

    def clamp(self, inputs: Tensor) -> Tensor:
        return self.first(inputs.flatten(1))

    def predict(self, h: Tensor) -> Tensor:
        return h

    def loss_of(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return (predictions - one_hot(targets, predictions.shape[-1]).to(predictions)).square().sum(-1) / 2


@configuration
class LayeredHopfield(Architecture):
    """Layers of hidden units between pixels and classes. feedback: False for the ordinary network of the same weights."""

    hidden: tuple[Positive, ...] = (500,)
    feedback: bool = True

    clamp_shaped = False

    @property
    def explicit(self) -> bool:  # type: ignore[override]
        return not self.feedback

    def build(self, signal: Signal) -> HopfieldNetwork:
        """The network for Patches, whose order it does not see. Raises TypeError for another signal."""
        if not isinstance(signal, Patches):
            raise TypeError(f"{self.kind} takes images in Patches, and the task gives {signal}")
        sizes = (signal.tokens * signal.size, *self.hidden, signal.classes)
        first, *links = (nn.Linear(below, above) for below, above in pairwise(sizes))
        for link in (first, *links):
            nn.init.xavier_uniform_(link.weight, gain=1.0 if link is first else FEEDBACK)
            nn.init.constant_(link.bias, 1 / signal.classes if link is links[-1] else 0.0)  # no output begins at its bound
        return HopfieldNetwork(first, (Hopfield if self.feedback else OneWay)([(size,) for size in sizes[1:]], links))
