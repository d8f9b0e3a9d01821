"""Derivatives of the network, of a memory, and of whole blocks, by hand."""

from typing import Any

import torch.nn.functional as functional
from torch import Tensor

from .attention import AttentionSlope, Kept, attention_slope
from .functions import contracted, gelu, gelu_slope, matrix, outer, positions, standardise, standardise_slope
from .layers import Sublayers


class NetworkSlope(Kept):
    """Derivative of FFN at its normalised input a (..., T, C)."""

    def __init__(self, layers: Sublayers, a: Tensor):
        self.layers = layers
        self.hidden = layers.w1(a)  # (..., T, expansion C)
        self.slope = gelu_slope(self.hidden)

    def product(self, da: Tensor) -> Tensor:
        return self.layers.w2(self.layers.w1(da) * self.slope)

    def _backward(self, u: Tensor) -> Tensor:
        return (u @ matrix(self.layers.w2)).mul_(self.slope)

    def transposed(self, u: Tensor) -> Tensor:
        return self._back(u) @ self.layers.w1.weight

    def contract(self, u: Tensor, a: Tensor) -> dict[str, Tensor]:
        return {"w1.weight": outer(self._back(u), a)} | contracted("w2", self.layers.w2, outer(u, gelu(self.hidden)))


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
