"""The functions that a transformer block is made of, with their slopes; of complex states too."""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

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


class Gated(nn.Linear):
    """W a without bias, every output channel times its gate gamma_max sigmoid(g), which no training takes beyond gamma_max. A
    gate is half open at first."""

    def __init__(self, inputs: int, outputs: int, largest: float):
        super().__init__(inputs, outputs, bias=False)
        self.largest, self.gate = largest, nn.Parameter(torch.zeros(outputs))

    def matrix(self) -> Tensor:
        """Gates and W as one matrix."""
        return self.largest * self.gate.sigmoid().unsqueeze(1) * self.weight

    def forward(self, a: Tensor) -> Tensor:
        return functional.linear(a, self.matrix())


def matrix(layer: nn.Linear) -> Tensor:
    """What the layer multiplies with."""
    return layer.matrix() if isinstance(layer, Gated) else layer.weight


def contracted(name: str, layer: nn.Linear, grad: Tensor) -> dict[str, Tensor]:
    """From the gradient in the matrix of the layer of that name to that in its parameters."""
    if not isinstance(layer, Gated):
        return {f"{name}.weight": grad}
    share = layer.gate.sigmoid()
    return {f"{name}.weight": layer.largest * share.unsqueeze(1) * grad,
            f"{name}.gate": layer.largest * share * (1 - share) * (grad * layer.weight).sum(1)}


def linear(layer: nn.Linear, a: Tensor) -> Tensor:
    """layer(a); of a complex input the real and the imaginary part go through the real weights apart."""
    if not a.is_complex():
        return layer(a)
    return torch.complex(layer(a.real), functional.linear(a.imag, matrix(layer)))


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


def attention_weights(q: Tensor, k: Tensor, causal: bool, first: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(D)) (..., H, R, T) of R queries, of which the first is that of token `first`; for complex q, k the
    ratio of exponentials, with a pole where their sum is zero."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    if not scores.is_complex():
        if causal:  # adding takes less time than filling
            future = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1 + first)
            scores = scores + future
        return scores.softmax(-1)
    if causal:
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1 + first)
        scores = scores.masked_fill(later, -torch.inf)
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
