"""Transformer blocks as dynamical systems dz/dt = F(z, x).

A block is configured by a frozen dataclass whose `build(width, heads, context)` gives the module. A module knows nothing of
learning; it offers

    start(x) -> z             initial state
    forward(z, x) -> F        the force, same shape as z
    output(z) -> h            (..., T, C), read out by the model
    linearise(z, x)           the Jacobian J = dF/dz at z as two products, J v and J^T u

States are (..., T, C): any number of leading dimensions, so that two trajectories run as one batch.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor, nn

from .config import configuration

EPS = 1e-5  # of the normalisations, as torch.nn.LayerNorm has it
GELU_SCALE, GELU_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # tanh-GELU (Hendrycks & Gimpel 2016)


class ShapeError(ValueError):
    """A block that cannot be built: the message names the sizes and the rule they break."""


def _gelu_gate(h: Tensor) -> Tensor:
    """s(h) of tanh-GELU(h) = h s(h), written as a logistic function."""
    return (h * h).mul_(GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE).mul(h).sigmoid_()


def _gelu(h: Tensor) -> Tensor:
    """tanh-GELU. Without a graph the logistic form runs in one buffer: half the time of the library's tanh on a CPU."""
    if torch.is_grad_enabled():
        return functional.gelu(h, approximate="tanh")
    return (h * h).mul_(GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE).mul_(h).sigmoid_().mul_(h)


def _gelu_slope(h: Tensor) -> Tensor:
    """Derivative of tanh-GELU, elementwise."""
    gate = _gelu_gate(h)
    return gate + gate * (1 - gate) * h * (GELU_SCALE + 3 * GELU_SCALE * GELU_CUBIC * h * h)


def _standardise(z: Tensor) -> tuple[Tensor, Tensor]:
    """n = (z - mean) / sigma over the last dimension, and 1 / sigma (..., 1)."""
    centred = z - z.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    return centred * inverse, inverse


def _standardise_slope(v: Tensor, n: Tensor, inverse: Tensor) -> Tensor:
    """dn along v. The map v -> dn is symmetric, so this is its transpose as well."""
    return inverse * (v - v.mean(-1, keepdim=True) - n * (n * v).mean(-1, keepdim=True))


def _unit_rms(q: Tensor) -> tuple[Tensor, Tensor]:
    """q / rms(q) over the last dimension, and 1 / rms (..., 1)."""
    inverse = torch.rsqrt(q.square().mean(-1, keepdim=True) + EPS)
    return q * inverse, inverse


def _unit_rms_slope(v: Tensor, n: Tensor, inverse: Tensor) -> Tensor:
    """Derivative of q / rms(q) along v; symmetric like `_standardise_slope`."""
    return inverse * (v - n * (n * v).mean(-1, keepdim=True))


class Sublayers(nn.Module):
    """Weights of one pre-LN transformer block: LayerNorm, causal or full multi-head attention, tanh-GELU network.

    Shared by the equilibrium block and by the ordinary transformer, so that the two have the same parameters.
    The output weights of both branches start at `init` times the usual 1/sqrt(fan-in), well inside the contractive region.
    """

    def __init__(self, width: int, heads: int, expansion: int, causal: bool, qk_norm: bool, init: float):
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is not a multiple of heads {heads}; choose heads that divide the width")
        self.width, self.heads, self.causal, self.qk_norm = width, heads, causal, qk_norm
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.w1 = nn.Linear(width, expansion * width, bias=False)
        self.w2 = nn.Linear(expansion * width, width, bias=False)
        for layer, scale in ((self.qkv, 1.0), (self.wo, init), (self.w1, 1.0), (self.w2, init)):
            nn.init.normal_(layer.weight, std=scale / math.sqrt(layer.in_features))

    def _split(self, a: Tensor) -> Tensor:
        return a.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (..., T, C) -> (..., H, T, D)

    @staticmethod
    def _merge(a: Tensor) -> Tensor:
        return a.transpose(-3, -2).flatten(-2)  # (..., H, T, D) -> (..., T, C)

    def attention(self, a: Tensor) -> Tensor:
        """Multi-head self-attention of the normalised input (..., T, C)."""
        q, k, v = (self._split(part) for part in self.qkv(a).chunk(3, -1))
        if self.qk_norm:
            q, k = _unit_rms(q)[0], _unit_rms(k)[0]
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.wo(self._merge(mixed))

    def network(self, a: Tensor) -> Tensor:
        """Position-wise network of the normalised input (..., T, C)."""
        return self.w2(_gelu(self.w1(a)))

    def linearise(self, z: Tensor) -> "Linearised":
        return Linearised(self, z)


class Linearised:
    """Derivative of z -> Attn(LN z) + FFN(LN z) at a state, with everything that does not depend on the direction cached.

    Written by hand: each product costs about one force evaluation and keeps no graph. Under `torch.enable_grad` the products
    are differentiable in the weights, which is how a penalty on J v gets its gradient from a single backward pass.
    Products accept directions (..., T, C) that broadcast against the state.
    """

    def __init__(self, layers: Sublayers, z: Tensor):
        self.layers = layers
        self.n, self.inverse = _standardise(z)
        a1 = self.n * layers.ln1.weight + layers.ln1.bias
        a2 = self.n * layers.ln2.weight + layers.ln2.bias
        q, k, self.v = (layers._split(part) for part in layers.qkv(a1).chunk(3, -1))  # (..., H, T, D)
        self.q_inverse = self.k_inverse = None
        if layers.qk_norm:
            (q, self.q_inverse), (k, self.k_inverse) = _unit_rms(q), _unit_rms(k)
        self.q, self.k = q, k
        self.scale = 1 / math.sqrt(q.shape[-1])
        scores = q @ k.mT * self.scale  # (..., H, T, T)
        if layers.causal:
            length = z.shape[-2]
            future = torch.ones(length, length, dtype=torch.bool, device=z.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        self.weights = scores.softmax(-1)
        self.slope = _gelu_slope(layers.w1(a2))  # (..., T, expansion C)

    def _softmax_slope(self, s: Tensor) -> Tensor:
        """Derivative of the row-wise softmax along s; symmetric."""
        weighted = self.weights * s
        return weighted - self.weights * weighted.sum(-1, keepdim=True)

    def product(self, v: Tensor) -> Tensor:
        """J v, the directional derivative, for v of shape (..., T, C)."""
        layers = self.layers
        dn = _standardise_slope(v, self.n, self.inverse)
        dq, dk, dv = (layers._split(part) for part in layers.qkv(dn * layers.ln1.weight).chunk(3, -1))
        if layers.qk_norm:
            dq, dk = _unit_rms_slope(dq, self.q, self.q_inverse), _unit_rms_slope(dk, self.k, self.k_inverse)
        dw = self._softmax_slope((dq @ self.k.mT + self.q @ dk.mT) * self.scale)  # (..., H, T, T)
        mixed = dw @ self.v + self.weights @ dv
        return layers.wo(layers._merge(mixed)) + layers.w2(layers.w1(dn * layers.ln2.weight) * self.slope)

    def transposed(self, u: Tensor) -> Tensor:
        """J^T u for u of shape (..., T, C)."""
        layers = self.layers
        do = layers._split(u @ layers.wo.weight)  # (..., H, T, D)
        ds = self._softmax_slope(do @ self.v.mT) * self.scale  # (..., H, T, T)
        dq, dk, dv = ds @ self.k, ds.mT @ self.q, self.weights.mT @ do
        if layers.qk_norm:
            dq, dk = _unit_rms_slope(dq, self.q, self.q_inverse), _unit_rms_slope(dk, self.k, self.k_inverse)
        d1 = torch.cat([layers._merge(part) for part in (dq, dk, dv)], -1) @ layers.qkv.weight
        d2 = ((u @ layers.w2.weight) * self.slope) @ layers.w1.weight
        return _standardise_slope(d1 * layers.ln1.weight + d2 * layers.ln2.weight, self.n, self.inverse)


class Jacobian:
    """J = dF/dz of a block at a state, as two products: `product(v)` is J v, `transposed(u)` is J^T u."""

    def __init__(self, inner: Linearised, decay: float):
        self.inner, self.decay = inner, decay

    def product(self, v: Tensor) -> Tensor:
        return self.inner.product(v) - self.decay * v

    def transposed(self, u: Tensor) -> Tensor:
        return self.inner.transposed(u) - self.decay * u


class EquilibriumBlock(nn.Module):
    """F(z) = -(z - x) + Attn(LN z) + FFN(LN z) - c z: the transformer block of which the state is a fixed point."""

    explicit = False

    def __init__(self, layers: Sublayers, damping: float):
        super().__init__()
        self.layers, self.damping = layers, damping

    def start(self, x: Tensor) -> Tensor:
        return x

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        layers = self.layers
        return x - (1 + self.damping) * z + layers.attention(layers.ln1(z)) + layers.network(layers.ln2(z))

    def output(self, z: Tensor) -> Tensor:
        return z

    def linearise(self, z: Tensor, x: Tensor) -> Jacobian:
        return Jacobian(self.layers.linearise(z), 1 + self.damping)


class FeedforwardBlock(nn.Module):
    """A stack of ordinary pre-LN transformer blocks: the backprop baseline of the same shape.

    Its start state is its answer, F(z) = stack(x) - z is zero there, so every solver converges at once.
    """

    explicit = True

    def __init__(self, stack: list[Sublayers]):
        super().__init__()
        self.stack = nn.ModuleList(stack)

    def start(self, x: Tensor) -> Tensor:
        for layers in self.stack:
            x = x + layers.attention(layers.ln1(x))
            x = x + layers.network(layers.ln2(x))
        return x

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.start(x) - z

    def output(self, z: Tensor) -> Tensor:
        return z


@configuration
class Thick:
    """Equilibrium block with full multi-head attention and a 4x network (002, section "thick"; F in DESIGN).

    damping: c >= 0. causal: True for language, False for images. qk_norm: q and k divided by their root mean square per head.
    init: scale of the two output weights at initialisation, in units of 1/sqrt(fan-in).
    """

    kind: Literal["Thick"] = "Thick"
    damping: Annotated[float, Field(ge=0)] = 0.0
    causal: bool = True
    qk_norm: bool = False
    expansion: Annotated[int, Field(ge=1)] = 4
    init: Annotated[float, Field(gt=0)] = 0.1

    def build(self, width: int, heads: int, context: int) -> EquilibriumBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        layers = Sublayers(width, heads, self.expansion, self.causal, self.qk_norm, self.init)
        return EquilibriumBlock(layers, self.damping)


@configuration
class Feedforward:
    """Ordinary pre-LN transformer (Vaswani 2017, pre-LN form) with the parameters of `Thick` in each of its layers."""

    kind: Literal["Feedforward"] = "Feedforward"
    layers: Annotated[int, Field(ge=1)] = 1
    causal: bool = True
    qk_norm: bool = False
    expansion: Annotated[int, Field(ge=1)] = 4
    init: Annotated[float, Field(gt=0)] = 0.1

    def build(self, width: int, heads: int, context: int) -> FeedforwardBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return FeedforwardBlock([Sublayers(width, heads, self.expansion, self.causal, self.qk_norm, self.init)
                                 for _ in range(self.layers)])


Block = Annotated[Thick | Feedforward, Field(discriminator="kind")]
