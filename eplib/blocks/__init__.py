"""Transformer blocks as dynamical systems dz/dt = F(z, x).

A block is configured by a frozen dataclass whose `build(width, heads, context)` gives the module. A module knows nothing of
learning; it offers

    drive(x) -> x             what clamps the dynamics, from the embedded input; the identity unless there is a backbone
    start(x) -> z             initial state
    forward(z, x) -> F        the force, same shape as z
    prefix()                  keys and values of settled tokens, where tokens settle one after the other
    output(z) -> h            (..., T, C), read out by the model
    linearise(z, x)           the Jacobian J = dF/dz at z: J v, J^T u, and the gradient of <u, F> in weights and x
                              (`calculus.Derivative`)
    nudged(z, x, pull)        the force under a pull of the loss, only where it is not F - pull: `FromEnergy`, a block
                              of your own given by its energy alone

A derivative by hand is that of the block as it was built. A block that was altered since, by a hook, a parametrisation, an
adapter, a force of a subclass's own, is differentiated automatically, and its tokens do not settle one after the other.

States are (..., T, C), or (..., L, T, C) for a stack of L layers: any number of leading dimensions, so that several
trajectories run as one batch.
"""

from .attractor import Attractor, AttractorBlock, LayeredAttractor, LayeredAttractorBlock
from .base import Block, Dynamical, Jacobian
from .energy import Energy, EnergyBlock
from .given import FromEnergy
from .layered import Feedforward, FeedforwardBlock, Layered, LayeredBlock
from .linear import LinearAttention
from .mixed import Mixed, MixedBlock
from .monotone import Monotone, MonotoneBlock
from .packed import Packed
from .thick import EquilibriumBlock, Thick
from .thin import Thin, ThinBlock

__all__ = ["Attractor", "AttractorBlock", "Block", "Dynamical", "Energy", "EnergyBlock", "EquilibriumBlock", "Feedforward",
           "FeedforwardBlock", "FromEnergy", "Jacobian", "Layered", "LayeredAttractor", "LayeredAttractorBlock", "LayeredBlock",
           "LinearAttention", "Mixed", "MixedBlock", "Monotone", "MonotoneBlock", "Packed", "Thick", "Thin", "ThinBlock"]
