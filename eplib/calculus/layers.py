"""The weights of a transformer block, and its way through tokens that settle one after the other."""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .functions import (
    EPS,
    Gated,
    ShapeError,
    attend,
    dividing,
    features,
    gelu,
    linear,
    merge_heads,
    normalise,
    split_heads,
    unit_rms,
)


class Memory(nn.Module):
    """Modern-Hopfield memory, energy -|relu(W n)|^2 / 2 (Hao 2026): its force W^T relu(W n) is a network with tied weights."""

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
    gated: gamma_max of the gates of both outputs (`Gated`), None for outputs without.
    """

    def __init__(self, width: int, heads: int, expansion: int, causal: bool, qk_norm: bool, init: float,
                 linear: bool = False, gated: float | None = None):
        super().__init__()
        if linear and causal:
            raise ShapeError("linear attention is over all tokens, got causal=True; choose causal=False")
        self.width, self.heads, self.causal, self.qk_norm, self.linear = width, dividing(width, heads), causal, qk_norm, linear
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = Gated(width, width, gated) if gated else nn.Linear(width, width, bias=False)
        self.w1 = nn.Linear(width, expansion * width, bias=False)
        self.w2 = Gated(expansion * width, width, gated) if gated else nn.Linear(expansion * width, width, bias=False)
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

    def __init__(self, layers: Sublayers, decay: float | Tensor):
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
