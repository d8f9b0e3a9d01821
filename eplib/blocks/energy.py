"""Gradient dynamics: attention with an energy."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..calculus import (
    Memory,
    attention_weights,
    dividing,
    features,
    merge_heads,
    split_heads,
    standardise,
    standardise_slope,
)
from ..config import configuration
from .base import Block, Damping, Dynamical, Positive, Scale


class EnergyBlock(Dynamical):
    """F = -dE/dz of E(z) = |z - x|^2 / 2 + c |z|^2 / 2 + E_attention(LN z) + E_memory(LN z) (CET of Hao 2026).

    Softmax attention is the log-sum-exp energy -sqrt(D) sum_t log sum_s exp(q_t k_s / sqrt(D)), whose force ties the value to
    the key; linear attention is -sum_st (f_s f_t)^2 / (4 D T) with features f = elu(W n) + 1. A symmetric J cannot be causal
    unless it is diagonal in the tokens (J_ts = 0 for s > t, so J_st = 0 too): a causal block therefore takes its keys from the
    clamped input.
    """

    def __init__(self, width: int, heads: int, expansion: int, causal: bool, linear: bool, init: float, damping: float):
        super().__init__()
        self.heads, self.causal, self.linear, self.damping = heads, causal, linear, damping
        self.wq, keys = (nn.Linear(width, width, bias=False) for _ in range(2))
        for layer in (self.wq, keys):
            nn.init.normal_(layer.weight, std=math.sqrt(init / width))
        self.wk: Any = None if linear else keys
        self.memory = Memory(width, expansion, init)

    def energy(self, z: Tensor, x: Tensor) -> Tensor:
        """E of each sample, (..., T, C) -> (...)."""
        n = standardise(z)[0]
        if self.linear:
            f = features(split_heads(self.wq(n), self.heads))
            attention = -(f @ f.mT).square().sum((-3, -2, -1)) / (4 * f.shape[-1] * f.shape[-2])
        else:
            keys = self.wk(standardise(x)[0] if self.causal else n)
            q, k = split_heads(self.wq(n), self.heads), split_heads(keys, self.heads)
            root = math.sqrt(q.shape[-1])
            scores = q @ k.mT / root
            if self.causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            attention = -root * scores.logsumexp(-1).sum((-2, -1))
        spring = (z - x).square().sum((-2, -1)) / 2 + self.damping * z.square().sum((-2, -1)) / 2
        return spring + attention + self.memory.energy(n)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        n, inverse = standardise(z)
        h = split_heads(self.wq(n), self.heads)  # (..., H, T, D)
        if self.linear:
            f = features(h)
            pull = merge_heads(f.clamp(max=1) * (f @ (f.mT @ f)) / (f.shape[-1] * f.shape[-2])) @ self.wq.weight
        else:
            k = split_heads(self.wk(standardise(x)[0] if self.causal else n), self.heads)
            weights = attention_weights(h, k, self.causal)
            pull = merge_heads(weights @ k) @ self.wq.weight
            if not self.causal:  # the keys feel the queries as well
                pull = pull + merge_heads(weights.mT @ h) @ self.wk.weight
        return x - (1 + self.damping) * z + standardise_slope(pull + self.memory(n), n, inverse)


@configuration
class Energy(Block):
    """Gradient dynamics: log-sum-exp attention with tied value, confinement and memory (Hao 2026, CET)."""

    damping: Damping = 0.0
    causal: bool = True
    expansion: Positive = 4
    init: Scale = 0.1

    def build(self, width: int, heads: int, context: int) -> EnergyBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return EnergyBlock(width, dividing(width, heads), self.expansion, self.causal, False, self.init, self.damping)
