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

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS = 1e-5  # of the normalisations, as torch.nn.LayerNorm has it
GELU_SCALE, GELU_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # tanh-GELU (Hendrycks & Gimpel 2016)


class ShapeError(ValueError):
    """A block that cannot be built: the message names the sizes and the rule they break."""


def gelu(h: Tensor) -> Tensor:
    """tanh-GELU(h) = h s(h), s a logistic function: with a pole wherever its argument is an odd multiple of i pi.

    Without a graph the logistic form runs in one buffer: half the time of the library's tanh on a CPU.
    """
    if torch.is_grad_enabled() and not h.is_complex():
        return functional.gelu(h, approximate="tanh")
    return (h * h).mul_(GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE).mul_(h).sigmoid_().mul_(h)


def gelu_slope(h: Tensor) -> Tensor:
    """Derivative of tanh-GELU, elementwise."""
    gate = (h * h).mul_(GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE).mul(h).sigmoid_()
    return gate + gate * (1 - gate) * h * (GELU_SCALE + 3 * GELU_SCALE * GELU_CUBIC * h * h)


def linear(layer: nn.Linear, a: Tensor) -> Tensor:
    """layer(a); of a complex input the real and the imaginary part go through the real weights apart."""
    if not a.is_complex():
        return layer(a)
    return torch.complex(layer(a.real), functional.linear(a.imag, layer.weight))


def standardise(z: Tensor) -> tuple[Tensor, Tensor]:
    """n = (z - mean) / sigma over the last dimension, and 1 / sigma (..., 1). The variance is not conjugated: holomorphic."""
    centred = z - z.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    return centred * inverse, inverse


def standardise_slope(v: Tensor, n: Tensor, inverse: Tensor) -> Tensor:
    """dn along v. The map v -> dn is symmetric, so this is its transpose as well."""
    return inverse * (v - v.mean(-1, keepdim=True) - n * (n * v).mean(-1, keepdim=True))


def normalise(layer: nn.LayerNorm, z: Tensor) -> Tensor:
    """layer(z), for complex z too."""
    return standardise(z)[0] * layer.weight + layer.bias if z.is_complex() else layer(z)


def unit_rms(q: Tensor) -> tuple[Tensor, Tensor]:
    """q / rms(q) over the last dimension, and 1 / rms (..., 1)."""
    inverse = torch.rsqrt(q.square().mean(-1, keepdim=True) + EPS)
    return q * inverse, inverse


def unit_rms_slope(v: Tensor, n: Tensor, inverse: Tensor) -> Tensor:
    """Derivative of q / rms(q) along v; symmetric like `standardise_slope`."""
    return inverse * (v - n * (n * v).mean(-1, keepdim=True))


def split_heads(a: Tensor, heads: int) -> Tensor:
    return a.unflatten(-1, (heads, -1)).transpose(-3, -2)  # (..., T, C) -> (..., H, T, D)


def merge_heads(a: Tensor) -> Tensor:
    return a.transpose(-3, -2).flatten(-2)  # (..., H, T, D) -> (..., T, C)


def attention_weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) (..., H, T, T); for complex q, k the ratio of exponentials, with a pole where their sum is
    zero."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    if not scores.is_complex():
        if causal:  # adding takes less time than filling
            scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
        return scores.softmax(-1)
    if causal:
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    raised = (scores - scores.real.amax(-1, keepdim=True)).exp()
    return raised / raised.sum(-1, keepdim=True)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (..., H, T, D): `attention_weights` times v, fused where that is faster."""
    if q.is_complex() or (q.dtype is torch.bfloat16 and q.device.type == "cpu"):  # in bfloat16 it takes longer on a CPU
        return attention_weights(q, k, causal) @ v
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def features(h: Tensor) -> Tensor:
    """Positive features elu(h) + 1 of linear attention; their slope is min(features, 1)."""
    return functional.elu(h) + 1


def outer(u: Tensor, a: Tensor) -> Tensor:
    """Sum over all positions of u a^T: (..., n), (..., m) -> (n, m)."""
    return u.flatten(0, -2).mT @ a.flatten(0, -2)


def positions(u: Tensor) -> Tensor:
    """Sum over all positions: (..., n) -> (n,)."""
    return u.flatten(0, -2).sum(0)


def dividing(width: int, heads: int) -> int:
    """The number of heads. Raises `ShapeError` if they do not divide the width."""
    if width % heads:
        raise ShapeError(f"width {width} is not a multiple of heads {heads}; choose heads that divide the width")
    return heads


class Memory(nn.Module):
    """Modern-Hopfield memory, energy -|relu(W n)|^2 / 2 (002): its force W^T relu(W n) is a network with tied weights."""

    def __init__(self, width: int, expansion: int, init: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(expansion * width, width) * math.sqrt(init / (expansion * width)))

    def energy(self, n: Tensor) -> Tensor:
        return -functional.linear(n, self.weight).relu().square().sum((-2, -1)) / 2  # (..., T, C) -> (...)

    def forward(self, n: Tensor) -> Tensor:
        return functional.linear(n, self.weight).relu() @ self.weight


class Sublayers(nn.Module):
    """Weights of one pre-LN transformer block: LayerNorm, causal or full multi-head attention, tanh-GELU network.

    linear: the attention is f(q) (f(k)^T v) / (f(q) sum f(k)) over all tokens, f = elu + 1 (Katharopoulos 2020). Shared by the
    equilibrium blocks and by the ordinary transformer, so that the two have the same parameters.
    The output weights of both branches start at `init` times the usual 1/sqrt(fan-in), well inside the contractive region.
    """

    def __init__(self, width: int, heads: int, expansion: int, causal: bool, qk_norm: bool, init: float,
                 linear: bool = False):
        super().__init__()
        if linear and causal:
            raise ShapeError("linear attention is over all tokens, got causal=True; choose causal=False")
        self.width, self.heads, self.causal, self.qk_norm, self.linear = width, dividing(width, heads), causal, qk_norm, linear
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.w1 = nn.Linear(width, expansion * width, bias=False)
        self.w2 = nn.Linear(expansion * width, width, bias=False)
        for layer, scale in ((self.qkv, 1.0), (self.wo, init), (self.w1, 1.0), (self.w2, init)):
            nn.init.normal_(layer.weight, std=scale / math.sqrt(layer.in_features))

    def attention(self, z: Tensor) -> Tensor:
        """Attn(LN z), (..., T, C)."""
        q, k, v = (split_heads(part, self.heads) for part in linear(self.qkv, normalise(self.ln1, z)).chunk(3, -1))
        if self.qk_norm:
            q, k = unit_rms(q)[0], unit_rms(k)[0]
        if self.linear:
            q, k = features(q), features(k)
            mixed = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))
        else:
            mixed = attend(q, k, v, self.causal)
        return linear(self.wo, merge_heads(mixed))

    def network(self, z: Tensor) -> Tensor:
        """FFN(LN z), (..., T, C)."""
        return linear(self.w2, gelu(linear(self.w1, normalise(self.ln2, z))))

    def parallel(self, z: Tensor) -> Tensor:
        """Attn(LN z) + FFN(LN z), the force of the equilibrium block."""
        return self.attention(z) + self.network(z)

    def sequential(self, z: Tensor) -> Tensor:
        """One layer of the ordinary pre-LN transformer: z + Attn(LN z), then + FFN(LN of that)."""
        z = z + self.attention(z)
        return z + self.network(z)


class Prefix:
    """Keys and values of settled tokens: all that the tokens after them see of the past in a causal block."""

    def __init__(self, layers: Sublayers, decay: float):
        self.layers, self.decay = layers, decay
        self.past: tuple[Tensor, Tensor] | None = None  # keys and values, (..., H, settled, D) each

    def _heads(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = self.layers
        q, k, v = (split_heads(part, layers.heads) for part in layers.qkv(layers.ln1(z)).chunk(3, -1))
        if layers.qk_norm:
            q, k = unit_rms(q)[0], unit_rms(k)[0]
        if self.past:
            k, v = (torch.cat([settled, new], -2) for settled, new in zip(self.past, (k, v), strict=True))
        return q, k, v

    def force(self, z: Tensor, x: Tensor) -> Tensor:
        """F of the n tokens (..., n, C) that follow the settled ones."""
        q, keys, values = self._heads(z)
        new, seen = q.shape[-2], keys.shape[-2]
        allowed = torch.ones(new, seen, dtype=torch.bool, device=z.device).tril(seen - new)
        mixed = functional.scaled_dot_product_attention(q, keys, values, attn_mask=allowed)
        return x - self.decay * z + self.layers.wo(merge_heads(mixed)) + self.layers.network(z)

    def extend(self, z: Tensor) -> None:
        """Takes the settled states (..., n, C) of the next n tokens in."""
        _, *past = self._heads(z)
        self.past = past[0], past[1]


class Kept:
    """The last backward pass of a derivative, so that contracting the adjoint state of the solve's last product costs no new
    one. The direction is not kept alive: memory does not depend on whether it is the one that is returned."""

    last: tuple[weakref.ref, tuple, Tensor] | None = None

    def _backward(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def _back(self, u: Tensor) -> Tensor:
        now = version(u), torch.is_grad_enabled()  # a pass without a graph is none for a gradient in the weights
        if self.last is None or self.last[0]() is not u or self.last[1] != now:
            self.last = weakref.ref(u), now, self._backward(u)
        return self.last[2]


def version(a: Tensor) -> Any:
    """How often a tensor was written to; of one that does not count that, never the same."""
    return object() if a.is_inference() else a._version


def writes(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """What changes when one of the weights is replaced or written to."""
    return [(value.data_ptr(), 0 if value.is_inference() else value._version) for value in weights]


class AttentionSlope(Kept):
    """Derivative of Attn at its normalised input a (..., T, C), everything direction-independent cached."""

    q_inverse: Tensor  # with qk_norm
    k_inverse: Tensor

    def __init__(self, layers: Any, a: Tensor):
        """layers: what holds qkv, wo, heads, causal and qk_norm: `Sublayers` or a block."""
        self.layers = layers
        # contiguous once, as every product with them would make them
        q, k, self.v = (split_heads(part, layers.heads).contiguous() for part in layers.qkv(a).chunk(3, -1))
        if layers.qk_norm:
            (q, self.q_inverse), (k, self.k_inverse) = unit_rms(q), unit_rms(k)
        scale = 1 / math.sqrt(q.shape[-1])
        self.q, self.k, self.q_scaled, self.k_scaled = q, k, scale * q, scale * k  # so that no (T, T) array is scaled
        self.weights = attention_weights(q, k, layers.causal)
        self.mixed = self.weights @ self.v  # (..., H, T, D)

    def product(self, da: Tensor) -> Tensor:
        layers = self.layers
        dq, dk, dv = (split_heads(part, layers.heads) for part in layers.qkv(da).chunk(3, -1))
        if layers.qk_norm:
            dq, dk = unit_rms_slope(dq, self.q, self.q_inverse), unit_rms_slope(dk, self.k, self.k_inverse)
        ds = self.weights * (dq @ self.k_scaled.mT + self.q_scaled @ dk.mT)  # (..., H, T, T)
        # the softmax's slope is ds - weights * rowsum(ds), and weights @ v is known
        return layers.wo(merge_heads(ds @ self.v - ds.sum(-1, keepdim=True) * self.mixed + self.weights @ dv))

    def token_product(self, da: Tensor) -> Tensor:
        """What each token's own change does to itself: the diagonal blocks over tokens."""
        layers = self.layers
        dq, dk, dv = (split_heads(part, layers.heads) for part in layers.qkv(da).chunk(3, -1))
        if layers.qk_norm:
            dq, dk = unit_rms_slope(dq, self.q, self.q_inverse), unit_rms_slope(dk, self.k, self.k_inverse)
        ds = self.weights * (dq @ self.k_scaled.mT)  # its query meets all keys
        own = self.weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # (..., H, T, 1): its key and value meet its own query
        shift = own * (self.q_scaled * dk).sum(-1, keepdim=True)
        moved = ds @ self.v - ds.sum(-1, keepdim=True) * self.mixed + shift * (self.v - self.mixed) + own * dv
        return layers.wo(merge_heads(moved))

    def _backward(self, u: Tensor) -> Tensor:
        """From the output back to q, k, v side by side: (..., T, C) -> (..., T, 3 C)."""
        do = split_heads(u @ self.layers.wo.weight, self.layers.heads)  # (..., H, T, D)
        # rowsum(weights * (do v^T)) = <do, mixed>, a sum over D instead of T
        ds = (do @ self.v.mT).sub_((do * self.mixed).sum(-1, keepdim=True)).mul_(self.weights)  # (..., H, T, T)
        dq, dk, dv = ds @ self.k_scaled, ds.mT @ self.q_scaled, self.weights.mT @ do
        if self.layers.qk_norm:
            dq, dk = unit_rms_slope(dq, self.q, self.q_inverse), unit_rms_slope(dk, self.k, self.k_inverse)
        return torch.cat([merge_heads(part) for part in (dq, dk, dv)], -1)

    def transposed(self, u: Tensor) -> Tensor:
        return self._back(u) @ self.layers.qkv.weight

    def contract(self, u: Tensor, a: Tensor) -> dict[str, Tensor]:
        """a: the input again, which is not kept: it is a product away from what its owner keeps."""
        return {"qkv.weight": outer(self._back(u), a), "wo.weight": outer(u, merge_heads(self.mixed))}


class LinearAttentionSlope(AttentionSlope):
    """The same for linear attention, o = q M / (q s) with the memory M = k^T v and s = sum k of features q, k."""

    def __init__(self, layers: Sublayers, a: Tensor):
        self.layers = layers
        q, k, self.v = (split_heads(part, layers.heads) for part in layers.qkv(a).chunk(3, -1))
        self.q, self.k = features(q), features(k)
        self.q_slope, self.k_slope = self.q.clamp(max=1), self.k.clamp(max=1)
        self.memory, self.total = self.k.mT @ self.v, self.k.sum(-2, keepdim=True)  # (..., H, D, D), (..., H, 1, D)
        self.inverse = 1 / (self.q * self.total).sum(-1, keepdim=True)
        self.mixed = self.q @ self.memory * self.inverse

    @property
    def weights(self) -> Tensor:  # type: ignore[override]  # made when asked for
        """The attention weights that it amounts to, (..., H, T, T)."""
        return self.q @ self.k.mT * self.inverse

    def _moved(self, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = self.layers
        dq, dk, dv = (split_heads(part, layers.heads) for part in layers.qkv(da).chunk(3, -1))
        return dq * self.q_slope, dk * self.k_slope, dv

    def product(self, da: Tensor) -> Tensor:
        dq, dk, dv = self._moved(da)
        up = dq @ self.memory + self.q @ (dk.mT @ self.v + self.k.mT @ dv)
        down = (dq * self.total + self.q * dk.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        return self.layers.wo(merge_heads((up - down * self.mixed) * self.inverse))

    def token_product(self, da: Tensor) -> Tensor:
        dq, dk, dv = self._moved(da)
        met, own = ((self.q * part).sum(-1, keepdim=True) for part in (dk, self.k))
        up = dq @ self.memory + met * self.v + own * dv
        down = (dq * self.total).sum(-1, keepdim=True) + met
        return self.layers.wo(merge_heads((up - down * self.mixed) * self.inverse))

    def _backward(self, u: Tensor) -> Tensor:
        up = split_heads(u @ self.layers.wo.weight, self.layers.heads) * self.inverse
        down = -(up * self.mixed).sum(-1, keepdim=True)
        memory, total = self.q.mT @ up, (self.q * down).sum(-2, keepdim=True)  # back to M and s
        dq = (up @ self.memory.mT + down * self.total) * self.q_slope
        dk = (self.v @ memory.mT + total) * self.k_slope
        return torch.cat([merge_heads(part) for part in (dq, dk, self.k @ memory)], -1)


def attention_slope(layers: Sublayers) -> type[AttentionSlope]:
    return LinearAttentionSlope if layers.linear else AttentionSlope


class NetworkSlope(Kept):
    """Derivative of FFN at its normalised input a (..., T, C)."""

    def __init__(self, layers: Sublayers, a: Tensor):
        self.layers = layers
        self.hidden = layers.w1(a)  # (..., T, expansion C)
        self.slope = gelu_slope(self.hidden)

    def product(self, da: Tensor) -> Tensor:
        return self.layers.w2(self.layers.w1(da) * self.slope)

    def _backward(self, u: Tensor) -> Tensor:
        return (u @ self.layers.w2.weight).mul_(self.slope)

    def transposed(self, u: Tensor) -> Tensor:
        return self._back(u) @ self.layers.w1.weight

    def contract(self, u: Tensor, a: Tensor) -> dict[str, Tensor]:
        return {"w1.weight": outer(self._back(u), a), "w2.weight": outer(u, gelu(self.hidden))}


class Normalised:
    """Derivative of n -> branch(n * gain + bias) at a standardised state n (..., T, C), gain and bias being those of a
    LayerNorm."""

    def __init__(self, branch: type, layers: Sublayers, name: str, n: Tensor):
        """branch: the derivative of what follows the LayerNorm `name` of the layers."""
        self.name, self.n, norm = name, n, getattr(layers, name)
        self.gain, self.bias = norm.weight, norm.bias
        self.branch = branch(layers, self._input())

    def _input(self) -> Tensor:
        return self.n * self.gain + self.bias

    def product(self, dn: Tensor) -> Tensor:
        return self.branch.product(dn * self.gain)

    def token_product(self, dn: Tensor) -> Tensor:
        return self.branch.token_product(dn * self.gain)

    def transposed(self, u: Tensor) -> Tensor:
        return self.branch.transposed(u) * self.gain

    def contract(self, u: Tensor) -> dict[str, Tensor]:
        da = self.branch.transposed(u)
        return {f"{self.name}.weight": positions(da * self.n), f"{self.name}.bias": positions(da)} \
            | self.branch.contract(u, self._input())


class MemorySlope(Kept):
    """Derivative of z -> dn/dz m at a state (..., T, C), m = W^T relu(W n), n = LN z without gain: minus the Hessian of a
    memory's energy, therefore symmetric, and of each token apart."""

    def __init__(self, weight: Tensor, n: Tensor, inverse: Tensor):
        """weight: W (expansion C, C). n, inverse: what `standardise` gives."""
        self.weight, self.n, self.inverse = weight, n, inverse
        self.hidden = functional.linear(n, weight).relu()  # (..., T, expansion C)
        self.open = (self.hidden > 0).to(n.dtype)
        self.m = self.hidden @ weight
        self.along, self.force = (n * self.m).mean(-1, keepdim=True), standardise_slope(self.m, n, inverse)

    def _backward(self, u: Tensor) -> Tensor:
        return functional.linear(standardise_slope(u, self.n, self.inverse), self.weight).mul_(self.open)

    def product(self, v: Tensor) -> Tensor:
        return self._onwards(v, self._backward(v))

    def transposed(self, u: Tensor) -> Tensor:
        return self._onwards(u, self._back(u))

    def _onwards(self, v: Tensor, dh: Tensor) -> Tensor:
        dn, dm = standardise_slope(v, self.n, self.inverse), dh @ self.weight
        turned = (self.n * v).mean(-1, keepdim=True) * self.force  # by the change of 1 / sigma
        turned = turned + self.along * dn + (dn * self.m).mean(-1, keepdim=True) * self.n
        return standardise_slope(dm, self.n, self.inverse) - self.inverse * turned

    def contract(self, u: Tensor) -> dict[str, Tensor]:
        du = standardise_slope(u, self.n, self.inverse)
        return {"memory.weight": outer(self.hidden, du) + outer(self._back(u), self.n)}


class ParallelSlope:
    """Derivative of z -> Attn(LN z) + FFN(LN z) at a state (..., T, C)."""

    def __init__(self, layers: Sublayers, z: Tensor):
        self.n, self.inverse = standardise(z)
        first = Normalised(attention_slope(layers), layers, "ln1", self.n)
        self.branches, self.attention = (first, Normalised(NetworkSlope, layers, "ln2", self.n)), first.branch

    def product(self, v: Tensor) -> Tensor:
        dn = standardise_slope(v, self.n, self.inverse)
        return self.branches[0].product(dn) + self.branches[1].product(dn)

    def token_product(self, v: Tensor) -> Tensor:
        dn = standardise_slope(v, self.n, self.inverse)
        return self.branches[0].token_product(dn) + self.branches[1].product(dn)  # the network sees one token at a time

    def transposed(self, u: Tensor) -> Tensor:
        return standardise_slope(self.branches[0].transposed(u) + self.branches[1].transposed(u), self.n, self.inverse)

    def contract(self, u: Tensor) -> dict[str, Tensor]:
        return self.branches[0].contract(u) | self.branches[1].contract(u)


class ThinSlope:
    """Derivative of z -> Attn(n) + dn/dz W^T relu(W n), n = LN z without gain, at a state (..., T, C)."""

    def __init__(self, block: Any, z: Tensor):
        """block: `blocks.ThinBlock`."""
        self.n, self.inverse = standardise(z)
        self.attention = AttentionSlope(block, self.n)
        self.memory = MemorySlope(block.memory.weight, self.n, self.inverse)

    def product(self, v: Tensor) -> Tensor:
        return self.attention.product(standardise_slope(v, self.n, self.inverse)) + self.memory.product(v)

    def token_product(self, v: Tensor) -> Tensor:
        return self.attention.token_product(standardise_slope(v, self.n, self.inverse)) + self.memory.product(v)

    def transposed(self, u: Tensor) -> Tensor:
        return standardise_slope(self.attention.transposed(u), self.n, self.inverse) + self.memory.transposed(u)

    def contract(self, u: Tensor) -> dict[str, Tensor]:
        return self.attention.contract(u, self.n) | self.memory.contract(u)


class SequentialSlope:
    """Derivative of one ordinary pre-LN layer, z -> y = z + Attn(LN z) -> y + FFN(LN y), at its input (..., T, C)."""

    def __init__(self, layers: Sublayers, z: Tensor):
        self.first, self.second = standardise(z), standardise(z + layers.attention(z))
        self.attention = Normalised(attention_slope(layers), layers, "ln1", self.first[0])
        self.network = Normalised(NetworkSlope, layers, "ln2", self.second[0])

    def product(self, v: Tensor) -> Tensor:
        v = v + self.attention.product(standardise_slope(v, *self.first))
        return v + self.network.product(standardise_slope(v, *self.second))

    def _middle(self, u: Tensor) -> Tensor:
        return u + standardise_slope(self.network.transposed(u), *self.second)

    def transposed(self, u: Tensor) -> Tensor:
        u = self._middle(u)
        return u + standardise_slope(self.attention.transposed(u), *self.first)

    def contract(self, u: Tensor) -> dict[str, Tensor]:
        return self.network.contract(u) | self.attention.contract(self._middle(u))


class Derivative:
    """J = dF/dz at a state z, as a block's `linearise(z, x)` gives it; a block of the user's own need not derive from this.

        product(v)         J v
        transposed(u)      J^T u
        contract(u)        gradient of <u, F>: {name in the block: tensor} in all weights that F depends on, and in the clamp x;
                           who asks for it may write to what is returned
        by_token           whether the diagonal blocks J_tt over tokens have all of J's eigenvalues, as in a causal block, and
        token_product(v)   J_tt v_t of every token t is there

    Directions have the shape of z; at a state (B, 1, ...) there may be K of them for each sample, (B, K, ...).
    """

    by_token = False

    def __init__(self, z: Tensor, x: Tensor, weights: Callable[[], Iterable[Tensor]] = tuple):
        """weights: gives those that products by hand go through."""
        self.at, self.clamped, self.weights = z.shape, x.shape, weights
        self.made_of = tuple(weights())  # kept alive, so that a replaced weight is seen by its address
        self.written = writes(self.made_of)

    def _along(self, v: Tensor, several: bool = True) -> Tensor:
        """The direction. Raises `ShapeError` for a shape that would be broadcast to mean something else, RuntimeError once the
        weights are others than at the linearisation."""
        if writes(self.weights()) != self.written:
            raise RuntimeError("the block's weights have changed since it was linearised; linearise it again")
        if v.dim() != len(self.at) or any(n != m and not (several and n == 1) for n, m in zip(self.at, v.shape, strict=True)):
            raise ShapeError(f"a direction {tuple(v.shape)} does not fit J at states {tuple(self.at)}; linearise at states "
                             "(B, 1, ...) for products with several directions of a sample, (B, K, ...)")
        return v


def uncompiled() -> Any:
    """A context in which modules that torch.compile made are computed as they are written."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def twice_differentiable(device: torch.device) -> Iterator[None]:
    """Within it, forces have graphs of which the backward pass is differentiable: without fused attention, in the state's own
    precision, and not through torch.compile."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, enabled=False), uncompiled():
        yield


def _backward(value: Tensor, to: list[Tensor], u: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """Gradients of <u, value>, zero where it does not depend on what they are taken in; keep: with a graph."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(one) for one in to)
    return torch.autograd.grad(value, to, u, retain_graph=True, create_graph=keep, allow_unused=True, materialize_grads=True)


class AutomaticSlope(Derivative):
    """J of any block by automatic differentiation, where none by hand fits.

    Two graphs are kept: of F, through which a product with J^T is one backward pass, and of J^T u, which is linear in u, so
    that a product with J is one too.
    """

    def __init__(self, block: nn.Module, z: Tensor, x: Tensor):
        super().__init__(z, x)
        self.block, self.z, self.x = block, z, x
        self.graphs: dict[torch.Size, tuple[Tensor, Tensor, Tensor]] = {}  # by the shape of the directions
        self.pulls: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def _force(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """z, x and F with its graph; made anew for whoever differentiates on, and so uses the graph up."""
        if torch.is_grad_enabled() or shape not in self.graphs:
            with twice_differentiable(self.z.device):
                z, x = (part.detach().requires_grad_() for part in (self.z.expand(shape), self.x))
                made = z, x, self.block(z, x)
            if torch.is_grad_enabled():
                return made
            self.graphs[shape] = made
        return self.graphs[shape]

    def _pull(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """u and J^T u with its graph."""
        if torch.is_grad_enabled() or shape not in self.pulls:
            z, _, force = self._force(shape)
            with torch.enable_grad():
                u = torch.zeros_like(force).requires_grad_()
                made = u, _backward(force, [z], u, keep=True)[0]
            if torch.is_grad_enabled():
                return made
            self.pulls[shape] = made
        return self.pulls[shape]

    def product(self, v: Tensor) -> Tensor:
        u, pulled = self._pull(self._along(v).shape)
        return _backward(pulled, [u], v, torch.is_grad_enabled())[0]

    def transposed(self, u: Tensor) -> Tensor:
        z, _, force = self._force(self._along(u).shape)
        return _backward(force, [z], u, torch.is_grad_enabled())[0]

    def contract(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        _, x, force = self._force(self._along(u, several=False).shape)
        parameters = {name: value for name, value in self.block.named_parameters() if value.requires_grad}
        found = _backward(force, [*parameters.values(), x], u, keep=False)
        return dict(zip(parameters, found, strict=False)), found[-1]
