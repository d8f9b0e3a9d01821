"""How far a nudge may go in the complex plane."""

import math

import numpy
import torch
from torch import Tensor

from ..blocks import EquilibriumBlock
from ..calculus import EPS, GELU_CUBIC, GELU_SCALE, split_heads, standardise, standardise_slope
from ..models import Model


@torch.no_grad()
def singular_radii(model: Model, z: Tensor, v: Tensor) -> dict[str, float]:
    """How far z + beta v (B, T, C) may go in the complex plane of beta before `EquilibriumBlock`'s force is singular: smallest
    |beta|.

    LayerNorm: where a token's variance + eps is zero. tanh-GELU: where its logistic gate has a pole, 0.0447 h^3 + h = i pi /
    1.596, the hidden units moving linearly. Softmax: below this radius no denominator vanishes, since a sum of exponentials
    needs phases pi apart; its zero lies further out. To first order in beta inside the block. The nearest of them bounds the
    radius of convergence.
    """
    block = model.block
    if not isinstance(block, EquilibriumBlock) or block.altered() or block.layers.linear or block.layers.qk_norm:
        why = block.altered() if isinstance(block, EquilibriumBlock) else None
        raise TypeError(f"singular_radii is for blocks.Thick without qk_norm and blocks.Attractor, as they are built, got "
                        f"{type(block).__name__}{f': {why}' if why else ''}")

    def nearest(away: Tensor, moving: Tensor) -> float:
        """Smallest |away / moving|; what does not move is never reached."""
        return (away.abs() / moving.abs()).nan_to_num(nan=math.inf, posinf=math.inf).min().item()

    layers = block.layers
    zc, vc = z - z.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
    a, b, c = (pair.mean(-1).to(torch.complex128) for pair in (vc * vc, 2 * zc * vc, zc * zc + EPS))
    root = (b * b - 4 * a * c).sqrt()
    radii = {"LayerNorm": min(nearest(-b + root, 2 * a), nearest(-b - root, 2 * a))}
    n, inverse = standardise(z)
    dn = standardise_slope(v, n, inverse)
    hidden, moving = layers.w1(n * layers.ln2.weight + layers.ln2.bias), layers.w1(dn * layers.ln2.weight)
    poles = torch.as_tensor(numpy.roots([GELU_CUBIC, 0, 1, -1j * math.pi / GELU_SCALE]))
    radii["tanh-GELU"] = min(nearest(pole - hidden, moving) for pole in poles)
    q, k = (split_heads(part, layers.heads) for part in layers.qkv(n * layers.ln1.weight + layers.ln1.bias).chunk(3, -1)[:2])
    dq, dk = (split_heads(part, layers.heads) for part in layers.qkv(dn * layers.ln1.weight).chunk(3, -1)[:2])
    slope = (dq @ k.mT + q @ dk.mT) / math.sqrt(q.shape[-1])  # (B, H, T, T), of the scores
    future = torch.ones_like(slope, dtype=torch.bool).triu(1) if layers.causal else torch.zeros_like(slope, dtype=torch.bool)
    spread = slope.masked_fill(future, -torch.inf).amax(-1) - slope.masked_fill(future, torch.inf).amin(-1)
    return radii | {"softmax": nearest(torch.full_like(spread, math.pi), spread)}
