"""Contraction by construction."""

import math
from typing import Annotated

import torch
import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor, nn

from ..calculus import (
    attention_weights,
    dividing,
    gelu,
    split_heads,
    standardise,
)
from ..config import configuration
from .base import Block, Dynamical, Positive

GELU_STEEPEST = 1.129  # largest slope of tanh-GELU, 1.12897 near h = 1.42


class MonotoneBlock(Dynamical):
    """F(z) = -(z - x) + k/2 P(x) z V + k/2 W2 gelu(W1 z + b), contracting by construction (in the spirit of Winston & Kolter
    2020).

    P(x) are attention weights of the clamped input; V, and W2 W1 times the steepest slope of gelu, are scaled to spectral norm
    <= 1. In the norm max_t |z_t| a row-stochastic P does not expand, so the last two terms have Lipschitz constant k < 1: every
    eigenvalue of J lies within k of -1, whatever the weights, and relaxation at step s <= 1 contracts by 1 - s (1 - k).
    """

    def __init__(self, width: int, heads: int, expansion: int, causal: bool, bound: float):
        super().__init__()
        self.heads, self.causal, self.bound = heads, causal, bound
        self.qk, self.value = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, width, bias=False)
        self.w1, self.w2 = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width, bias=False)
        for layer in (self.qk, self.value, self.w1, self.w2):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        q, k = (split_heads(part, self.heads) for part in self.qk(standardise(x)[0]).chunk(2, -1))
        # one P for all of V z, the mean over the heads: with one P a head, the heads' parts could come from different tokens
        weights = attention_weights(q, k, self.causal).mean(-3)
        mixed = weights @ functional.linear(z, _at_most(self.value.weight, 1.0))
        w1, w2 = _at_most(self.w1.weight, 1.0), _at_most(self.w2.weight, 1 / GELU_STEEPEST)
        return x - z + self.bound / 2 * (mixed + functional.linear(gelu(functional.linear(z, w1, self.w1.bias)), w2))


def _at_most(weight: Tensor, largest: float) -> Tensor:
    """The weight, scaled down where a bound on its spectral norm exceeds `largest`.

    With G = W^T W (n, n): |W|^16 = |G^8| <= |G^8|_Frobenius, at most n^(1/32) too large, for three small products.
    """
    gram = weight.mT @ weight if weight.shape[0] > weight.shape[1] else weight @ weight.mT
    size = gram.norm()
    power = torch.linalg.matrix_power(gram / size, 8)
    bound = (size * power.norm() ** (1 / 8)).sqrt()
    return weight * (largest / bound.clamp_min(largest))


@configuration
class Monotone(Block):
    """Contraction by construction: eigenvalues of J within `bound` of -1."""

    bound: Annotated[float, Field(gt=0, lt=1)] = 0.9
    causal: bool = True
    expansion: Positive = 4

    def build(self, width: int, heads: int, context: int) -> MonotoneBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return MonotoneBlock(width, dividing(width, heads), self.expansion, self.causal, self.bound)
