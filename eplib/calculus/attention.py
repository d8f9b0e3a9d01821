"""Derivatives of attention by hand."""

import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .automatic import version
from .functions import (
    attend,
    attention_weights,
    contracted,
    features,
    matrix,
    merge_heads,
    outer,
    split_heads,
    unit_rms,
    unit_rms_slope,
)
from .layers import Sublayers

ROWS = 256  # queries whose attention weights are alive at once: those of as many tokens are kept, of more made anew when needed


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


def joined(blocks: list[Tensor]) -> Tensor:
    """Blocks of tokens, the last ones first, side by side; a single one as it is."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks[::-1], -2)


class AttentionSlope(Kept):
    """Derivative of Attn at its normalised input a (..., T, C), everything direction-independent cached, but for the attention
    weights of more than `ROWS` tokens: these are made anew by blocks of queries, so that memory grows as T and not as T^2."""

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
        self.kept = attention_weights(q, k, layers.causal) if q.shape[-2] <= ROWS else None
        self.mixed = attend(q, k, self.v, layers.causal) if self.kept is None else self.kept @ self.v  # (..., H, T, D)

    @property
    def weights(self) -> Tensor:
        """The attention weights, (..., H, T, T)."""
        return attention_weights(self.q, self.k, self.layers.causal) if self.kept is None else self.kept

    def _blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Queries, the keys that they see, and the weights between them, block by block: the last one first, which sees all."""
        tokens = self.q.shape[-2]
        if self.kept is not None:
            yield slice(tokens), slice(tokens), self.kept
        for first in reversed(range(0, tokens if self.kept is None else 0, ROWS)):
            rows = slice(first, min(first + ROWS, tokens))
            keys = slice(rows.stop if self.layers.causal else tokens)
            yield rows, keys, attention_weights(self.q[..., rows, :], self.k[..., keys, :], self.layers.causal, first)

    def product(self, da: Tensor) -> Tensor:
        layers = self.layers
        dq, dk, dv = (split_heads(part, layers.heads) for part in layers.qkv(da).chunk(3, -1))
        if layers.qk_norm:
            dq, dk = unit_rms_slope(dq, self.q, self.q_inverse), unit_rms_slope(dk, self.k, self.k_inverse)
        moved = []
        for rows, keys, weights in self._blocks():
            ds = weights * (dq[..., rows, :] @ self.k_scaled[..., keys, :].mT
                            + self.q_scaled[..., rows, :] @ dk[..., keys, :].mT)  # (..., H, R, T)
            # the softmax's slope is ds - weights * rowsum(ds), and weights @ v is known
            moved.append(ds @ self.v[..., keys, :] - ds.sum(-1, keepdim=True) * self.mixed[..., rows, :]
                         + weights @ dv[..., keys, :])
            del weights, ds  # before the next block makes its own
        return layers.wo(merge_heads(joined(moved)))

    def token_product(self, da: Tensor) -> Tensor:
        """What each token's own change does to itself: the diagonal blocks over tokens."""
        layers = self.layers
        dq, dk, dv = (split_heads(part, layers.heads) for part in layers.qkv(da).chunk(3, -1))
        if layers.qk_norm:
            dq, dk = unit_rms_slope(dq, self.q, self.q_inverse), unit_rms_slope(dk, self.k, self.k_inverse)
        moved = []
        for rows, keys, weights in self._blocks():
            ds = weights * (dq[..., rows, :] @ self.k_scaled[..., keys, :].mT)  # its query meets all keys
            # (..., H, R, 1): its key and value meet its own query
            own = weights.diagonal(rows.start or 0, dim1=-2, dim2=-1).unsqueeze(-1)
            shift = own * (self.q_scaled * dk)[..., rows, :].sum(-1, keepdim=True)
            mixed = self.mixed[..., rows, :]
            moved.append(ds @ self.v[..., keys, :] - ds.sum(-1, keepdim=True) * mixed + shift * (self.v[..., rows, :] - mixed)
                         + own * dv[..., rows, :])
            del weights, ds, own
        return layers.wo(merge_heads(joined(moved)))

    def _backward(self, u: Tensor) -> Tensor:
        """From the output back to q, k, v side by side: (..., T, C) -> (..., T, 3 C)."""
        do = split_heads(u @ matrix(self.layers.wo), self.layers.heads)  # (..., H, T, D)
        along, to_q = (do * self.mixed).sum(-1, keepdim=True), list[Tensor]()
        for rows, keys, weights in self._blocks():
            some = do[..., rows, :]
            # rowsum(weights * (do v^T)) = <do, mixed>, a sum over D instead of T
            ds = (some @ self.v[..., keys, :].mT).sub_(along[..., rows, :]).mul_(weights)  # (..., H, R, T)
            if not to_q:
                dk, dv = ds.mT @ self.q_scaled[..., rows, :], weights.mT @ some
            else:
                dk[..., keys, :] += ds.mT @ self.q_scaled[..., rows, :]
                dv[..., keys, :] += weights.mT @ some
            to_q.append(ds @ self.k_scaled[..., keys, :])
            del weights, ds  # before the next block makes its own
        dq = joined(to_q)
        if self.layers.qk_norm:
            dq, dk = unit_rms_slope(dq, self.q, self.q_inverse), unit_rms_slope(dk, self.k, self.k_inverse)
        return torch.cat([merge_heads(part) for part in (dq, dk, dv)], -1)

    def transposed(self, u: Tensor) -> Tensor:
        return self._back(u) @ self.layers.qkv.weight

    def contract(self, u: Tensor, a: Tensor) -> dict[str, Tensor]:
        """a: the input again, which is not kept: it is a product away from what its owner keeps."""
        return {"qkv.weight": outer(self._back(u), a)} | contracted("wo", self.layers.wo, outer(u, merge_heads(self.mixed)))


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
    def weights(self) -> Tensor:
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
        up = split_heads(u @ matrix(self.layers.wo), self.layers.heads) * self.inverse
        down = -(up * self.mixed).sum(-1, keepdim=True)
        memory, total = self.q.mT @ up, (self.q * down).sum(-2, keepdim=True)  # back to M and s
        dq = (up @ self.memory.mT + down * self.total) * self.q_slope
        dk = (self.v @ memory.mT + total) * self.k_slope
        return torch.cat([merge_heads(part) for part in (dq, dk, self.k @ memory)], -1)


def attention_slope(layers: Sublayers) -> type[AttentionSlope]:
    return LinearAttentionSlope if layers.linear else AttentionSlope
