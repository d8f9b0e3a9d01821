"""What a transformer block is made of, with its derivatives by hand.

Every piece of the block (normalisation, attention, network) comes as a function that also takes complex states, which makes the
holomorphic extension, and as a linearisation at a state that offers

    product(v)      J v
    transposed(u)   J^T u
    contract(u)     gradient of <u, F> in the weights, for the read-out: outer products of quantities local to each weight

`AutomaticSlope` is the same of any force, by automatic differentiation.

Written by hand, each product costs about one force evaluation and keeps no graph. Under `torch.enable_grad` the products are
differentiable in the weights, which is how a penalty on J v gets its gradient from a single backward pass.
"""

from .attention import AttentionSlope, LinearAttentionSlope
from .automatic import AutomaticSlope, Derivative, twice_differentiable, uncompiled, version, writes
from .functions import (
    EPS,
    GELU_CUBIC,
    GELU_SCALE,
    Gated,
    ShapeError,
    attend,
    attention_weights,
    contracted,
    dividing,
    features,
    gelu,
    gelu_slope,
    linear,
    matrix,
    merge_heads,
    normalise,
    positions,
    split_heads,
    standardise,
    standardise_slope,
    unit_rms,
    unit_rms_slope,
)
from .layers import Memory, Prefix, Sublayers
from .slopes import MemorySlope, NetworkSlope, ParallelSlope, SequentialSlope, ThinSlope

__all__ = ["AttentionSlope", "AutomaticSlope", "Derivative", "EPS", "GELU_CUBIC", "GELU_SCALE", "Gated",
           "LinearAttentionSlope", "Memory", "MemorySlope", "NetworkSlope", "ParallelSlope", "Prefix", "SequentialSlope",
           "ShapeError", "Sublayers", "ThinSlope", "attend", "attention_weights", "contracted", "dividing", "features", "gelu",
           "gelu_slope", "linear", "matrix", "merge_heads", "normalise", "positions", "split_heads", "standardise",
           "standardise_slope", "twice_differentiable", "uncompiled", "unit_rms", "unit_rms_slope", "version", "writes"]
