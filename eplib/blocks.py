"""Transformer blocks as dynamical systems dz/dt = F(z, x).

A block is configured by a frozen dataclass whose `build(width, heads, context)` gives the module. A module knows nothing of
learning; it offers

    drive(x) -> x             what clamps the dynamics, from the embedded input; the identity unless there is a backbone
    start(x) -> z             initial state
    forward(z, x) -> F        the force, same shape as z
    prefix()                  keys and values of settled tokens, where tokens settle one after the other
    output(z) -> h            (..., T, C), read out by the model
    linearise(z, x)           the Jacobian J = dF/dz at z: J v, J^T u, and the gradient of <u, F> in weights and x
                              (`calculus.Derivative`)
    nudged(z, x, pull)        the force under a pull of the loss, only where it is not F - pull: `energies.FromEnergy`, a block
                              of your own given by its energy alone

A derivative by hand is that of the block as it was built. A block that was altered since, by a hook, a parametrisation, an
adapter, a force of a subclass's own, is differentiated automatically, and its tokens do not settle one after the other.

States are (..., T, C), or (..., L, T, C) for a stack of L layers: any number of leading dimensions, so that several
trajectories run as one batch.
"""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor, nn

from .calculus import (
    AttentionSlope,
    AutomaticSlope,
    Derivative,
    Memory,
    ParallelSlope,
    Prefix,
    SequentialSlope,
    Sublayers,
    ThinSlope,
    attend,
    attention_weights,
    dividing,
    features,
    gelu,
    merge_heads,
    split_heads,
    standardise,
    standardise_slope,
)
from .config import configuration
from .families import Family
from .intact import alteration

GELU_STEEPEST = 1.129  # largest slope of tanh-GELU, 1.12897 near h = 1.42


class Dynamical(nn.Module):
    """A block that relaxes from its clamped input: what the equilibrium blocks share."""

    explicit = False  # whether the start state is the answer
    damping = 0.0  # c of the term -c z

    @property
    def holomorphic(self) -> bool:
        """Whether the force takes complex states, as its holomorphic extension."""
        return False

    def drive(self, x: Tensor) -> Tensor:
        return x

    def start(self, x: Tensor) -> Tensor:
        return x

    def output(self, z: Tensor) -> Tensor:
        return z

    def altered(self) -> str | None:
        """What of the block its derivative by hand does not know, in words; None if there is nothing."""
        return "it has no derivative by hand"

    def linearise(self, z: Tensor, x: Tensor) -> Derivative:
        """J at states z (B, ...) under the clamp x, (B, ...) or such that it broadcasts."""
        return AutomaticSlope(self, z, x) if self.altered() else self._by_hand(z, x)

    def _by_hand(self, z: Tensor, x: Tensor) -> Derivative:
        raise NotImplementedError

    def prefix(self) -> Prefix | None:
        """An empty past, under which the tokens of a causal block settle one after the other; None for blocks without one."""
        return None


class Jacobian(Derivative):
    """J = dF/dz by hand of a block F = x - decay z + f(z), from the derivative `inner` of f. owner: prefix of its weights'
    names in the block; causal: whether a token's force depends on those before it only."""

    def __init__(self, inner: ParallelSlope | ThinSlope, z: Tensor, x: Tensor, weights: Callable[[], Iterable[Tensor]],
                 decay: float, owner: str, causal: bool):
        super().__init__(z, x, weights)
        self.inner, self.decay, self.owner, self.by_token = inner, decay, owner, causal

    @property
    def attention(self) -> AttentionSlope:
        """Derivative of the attention, which holds its `weights` (..., H, T, T)."""
        return self.inner.attention

    def product(self, v: Tensor) -> Tensor:
        return self.inner.product(self._along(v)) - self.decay * v

    def token_product(self, v: Tensor) -> Tensor:
        return self.inner.token_product(self._along(v)) - self.decay * v

    def transposed(self, u: Tensor) -> Tensor:
        return self.inner.transposed(self._along(u)) - self.decay * u

    def contract(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        found = self.inner.contract(self._along(u, several=False))
        return {f"{self.owner}{name}": value for name, value in found.items()}, u.sum_to_size(self.clamped)


class EquilibriumBlock(Dynamical):
    """F(z) = -(z - x) + Attn(LN z) + FFN(LN z) - c z: the transformer block of which the state is a fixed point."""

    def __init__(self, layers: Sublayers, damping: float):
        super().__init__()
        self.layers, self.damping = layers, damping

    @property
    def holomorphic(self) -> bool:
        """elu is no holomorphic function, and what altered the block may not be one."""
        return self.altered() is None and not self.layers.linear

    def altered(self) -> str | None:
        return alteration(self, EquilibriumBlock, {"layers": Sublayers})

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - (1 + self.damping) * z + self.layers.parallel(z)

    def _by_hand(self, z: Tensor, x: Tensor) -> Jacobian:
        layers = self.layers
        return Jacobian(ParallelSlope(layers, z), z, x, layers.parameters, 1 + self.damping, "layers.", layers.causal)

    def prefix(self) -> Prefix | None:
        whole = type(self).output is not Dynamical.output or "output" in vars(self)  # may read out several tokens together
        return None if whole or self.altered() is not None or not self.layers.causal else Prefix(self.layers, 1 + self.damping)


class StackJacobian(Derivative):
    """J of `LayeredBlock`: -1 on the diagonal, each layer's derivative below it."""

    def __init__(self, stack: Any, inputs: Tensor, x: Tensor):
        super().__init__(inputs, x, stack.parameters)
        self.layers = [SequentialSlope(layers, z) for layers, z in zip(stack, inputs.unbind(-3), strict=True)]

    def product(self, v: Tensor) -> Tensor:
        self._along(v)
        moved = [torch.zeros_like(v[..., 0, :, :])]
        moved += [layer.product(below) for layer, below in zip(self.layers[1:], v.unbind(-3)[:-1], strict=True)]
        return torch.stack(moved, -3) - v

    def transposed(self, u: Tensor) -> Tensor:
        self._along(u)
        moved = [layer.transposed(above) for layer, above in zip(self.layers[1:], u.unbind(-3)[1:], strict=True)]
        return torch.stack([*moved, torch.zeros_like(u[..., 0, :, :])], -3) - u

    def contract(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        self._along(u, several=False)
        each = (layer.contract(part) for layer, part in zip(self.layers, u.unbind(-3), strict=True))
        grads = {f"stack.{i}.{name}": value for i, found in enumerate(each) for name, value in found.items()}
        return grads, self.layers[0].transposed(u[..., 0, :, :]).sum_to_size(self.clamped)


class LayeredBlock(Dynamical):
    """An L-layer pre-LN transformer as one equilibrium state z = (z_1 .. z_L), F_l = layer_l(z_{l-1}) - z_l with z_0 = x.

    J is block lower-triangular with -1 on the diagonal, so all its eigenvalues are -1: at step 1 the free phase is exact after
    L sweeps and the adjoint after L more, and the corrected gradient is backpropagation's, layer by layer.
    """

    def __init__(self, stack: list[Sublayers]):
        super().__init__()
        self.stack: Any = nn.ModuleList(stack)  # iterated as the sublayers it holds

    def start(self, x: Tensor) -> Tensor:
        return torch.stack([x] * len(self.stack), -3)  # (..., T, C) -> (..., L, T, C)

    def _inputs(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.cat([x.unsqueeze(-3).expand_as(z[..., :1, :, :]), z[..., :-1, :, :]], -3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inputs = self._inputs(z, x).unbind(-3)
        return torch.stack([layers.sequential(below) for layers, below in zip(self.stack, inputs, strict=True)], -3) - z

    def output(self, z: Tensor) -> Tensor:
        return z[..., -1, :, :]

    def altered(self) -> str | None:
        return alteration(self, LayeredBlock, {f"stack.{i}": Sublayers for i in range(len(self.stack))})

    def _by_hand(self, z: Tensor, x: Tensor) -> StackJacobian:
        return StackJacobian(self.stack, self._inputs(z, x), x)


class FeedforwardBlock(Dynamical):
    """A stack of ordinary pre-LN transformer blocks: the backprop baseline of the same shape, with the weights of
    `LayeredBlock`.

    Its start state is its answer, F(z) = stack(x) - z is zero there, so every solver converges at once.
    """

    explicit = True

    def __init__(self, stack: list[Sublayers]):
        super().__init__()
        self.stack: Any = nn.ModuleList(stack)  # iterated as the sublayers it holds

    def start(self, x: Tensor) -> Tensor:
        for layers in self.stack:
            x = layers.sequential(x)
        return x

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.start(x) - z


class AttractorBlock(EquilibriumBlock):
    """A feedforward backbone proposes h; the equilibrium block, clamped to h, refines it to its fixed point (004, Attractor
    Models).

    Relaxation starts from the proposal, so `solvers.FixedHorizon(steps=0)` evaluates the network with the solver removed.
    """

    def __init__(self, backbone: list[Sublayers], layers: Sublayers, damping: float):
        super().__init__(layers, damping)
        self.backbone = FeedforwardBlock(backbone)

    def drive(self, x: Tensor) -> Tensor:
        return self.backbone.start(x)


class ThinBlock(Dynamical):
    """F(z) = -(z - x) + Attn(LN z) - dE_memory/dz - c z: attention as a raw force, the network as a memory's energy (002,
    "thin")."""

    qk_norm = False  # queries and keys enter as they are

    def __init__(self, width: int, heads: int, expansion: int, causal: bool, init: float, damping: float):
        super().__init__()
        self.heads, self.causal, self.damping = heads, causal, damping
        self.qkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        nn.init.normal_(self.qkv.weight, std=1 / math.sqrt(width))
        nn.init.normal_(self.wo.weight, std=init / math.sqrt(width))
        self.memory = Memory(width, expansion, init)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        n, inverse = standardise(z)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(n).chunk(3, -1))
        attention = self.wo(merge_heads(attend(q, k, v, self.causal)))
        return x - (1 + self.damping) * z + attention + standardise_slope(self.memory(n), n, inverse)

    def altered(self) -> str | None:
        return alteration(self, ThinBlock, {"qkv": nn.Linear, "wo": nn.Linear, "memory": Memory})

    def _by_hand(self, z: Tensor, x: Tensor) -> Jacobian:
        return Jacobian(ThinSlope(self, z), z, x, self.parameters, 1 + self.damping, "", self.causal)


class EnergyBlock(Dynamical):
    """F = -dE/dz of E(z) = |z - x|^2 / 2 + c |z|^2 / 2 + E_attention(LN z) + E_memory(LN z) (002, the energy route of CET).

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


Damping = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(gt=0)]


class Block(Family):
    """Configuration of a block."""

    if TYPE_CHECKING:

        @property
        def causal(self) -> bool:
            """Whether a token's force depends on those before it only: for text."""

    def build(self, width: int, heads: int, context: int) -> Dynamical:
        """The module for states (..., T <= context, width)."""
        raise NotImplementedError


@configuration
class Thick(Block):
    """Equilibrium block with full multi-head attention and a 4x network (002, section "thick"; F in DESIGN).

    damping: c >= 0. causal: True for language, False for images. qk_norm: q and k divided by their root mean square per head.
    init: scale of the two output weights at initialisation, in units of 1/sqrt(fan-in).
    """

    damping: Damping = 0.0
    causal: bool = True
    qk_norm: bool = False
    expansion: Positive = 4
    init: Scale = 0.1

    def build(self, width: int, heads: int, context: int) -> EquilibriumBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return EquilibriumBlock(Sublayers(width, heads, self.expansion, self.causal, self.qk_norm, self.init), self.damping)


@configuration
class _Stack(Block):
    layers: Positive = 1
    causal: bool = True
    qk_norm: bool = False
    expansion: Positive = 4
    init: Scale = 0.1

    def _sublayers(self, width: int, heads: int, count: int) -> list[Sublayers]:
        return [Sublayers(width, heads, self.expansion, self.causal, self.qk_norm, self.init) for _ in range(count)]


@configuration
class Feedforward(_Stack):
    """Ordinary pre-LN transformer (Vaswani 2017, pre-LN form) with the parameters of `Thick` in each of its layers."""


    def build(self, width: int, heads: int, context: int) -> FeedforwardBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return FeedforwardBlock(self._sublayers(width, heads, self.layers))


@configuration
class Layered(_Stack):
    """The same transformer, weight for weight, as one equilibrium state (..., layers, T, width)."""


    def build(self, width: int, heads: int, context: int) -> LayeredBlock:
        """The module for states (..., layers, T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return LayeredBlock(self._sublayers(width, heads, self.layers))


@configuration
class Attractor(_Stack):
    """Feedforward backbone of `layers` layers, and a `Thick` head that refines its output to a fixed point (004)."""

    damping: Damping = 0.0

    def build(self, width: int, heads: int, context: int) -> AttractorBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        *backbone, head = self._sublayers(width, heads, self.layers + 1)
        return AttractorBlock(backbone, head, self.damping)


@configuration
class Thin(Block):
    """Raw attention force with a modern-Hopfield memory, which needs its damping (002, "thin")."""

    damping: Damping = 1.0
    causal: bool = True
    expansion: Positive = 4
    init: Scale = 0.1

    def build(self, width: int, heads: int, context: int) -> ThinBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return ThinBlock(width, dividing(width, heads), self.expansion, self.causal, self.init, self.damping)


@configuration
class Energy(Block):
    """Gradient dynamics: log-sum-exp attention with tied value, confinement and memory (002, CET)."""

    damping: Damping = 0.0
    causal: bool = True
    expansion: Positive = 4
    init: Scale = 0.1

    def build(self, width: int, heads: int, context: int) -> EnergyBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return EnergyBlock(width, dividing(width, heads), self.expansion, self.causal, False, self.init, self.damping)


@configuration
class LinearAttention(Block):
    """The MNIST reference (001): linear attention over all tokens; symmetric: derived from an energy, else with free weights.

    The symmetric form settles only near its initial weights: from init 0.1 relaxation ends in a cycle.
    """

    symmetric: bool = False
    damping: Damping = 0.0
    causal: Literal[False] = False
    expansion: Positive = 4
    init: Scale = 0.03

    def build(self, width: int, heads: int, context: int) -> EquilibriumBlock | EnergyBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        if self.symmetric:
            return EnergyBlock(width, dividing(width, heads), self.expansion, False, True, self.init, self.damping)
        return EquilibriumBlock(Sublayers(width, heads, self.expansion, False, False, self.init, linear=True), self.damping)


@configuration
class Monotone(Block):
    """Contraction by construction: eigenvalues of J within `bound` of -1."""

    bound: Annotated[float, Field(gt=0, lt=1)] = 0.9
    causal: bool = True
    expansion: Positive = 4

    def build(self, width: int, heads: int, context: int) -> MonotoneBlock:
        """The module for states (..., T <= context, width). Raises `ShapeError` if heads do not divide the width."""
        return MonotoneBlock(width, dividing(width, heads), self.expansion, self.causal, self.bound)
