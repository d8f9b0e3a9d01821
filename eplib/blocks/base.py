"""What all blocks are made of: a module with a force, its derivative, and the configuration that builds it."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from ..calculus import (
    AttentionSlope,
    AutomaticSlope,
    Derivative,
    ParallelSlope,
    Prefix,
    ThinSlope,
    positions,
)
from ..families import Family, owed


class Dynamical(nn.Module):
    """A block that relaxes from its clamped input: what the equilibrium blocks share."""

    explicit = False  # whether the start state is the answer
    damping = 0.0  # c of the term -c z

    @property
    def holomorphic(self) -> bool:
        """Whether the force takes complex states, as its holomorphic extension."""
        return False

    @property
    def state_decay(self) -> Any:
        """1 + c, a number, or one of every channel (C,)."""
        return 1 + self.damping

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
    names in the block; causal: whether a token's force depends on those before it only; decaying: whether the decay (C,) is
    learned, 1 + c e^l of the block's `log_damping` l."""

    def __init__(self, inner: ParallelSlope | ThinSlope, z: Tensor, x: Tensor, weights: Callable[[], Iterable[Tensor]],
                 decay: float | Tensor, owner: str, causal: bool, decaying: bool = False):
        super().__init__(z, x, weights)
        self.inner, self.decay, self.owner, self.by_token, self.decaying = inner, decay, owner, causal, z if decaying else None

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
        grads = {f"{self.owner}{name}": value for name, value in found.items()}
        if self.decaying is not None:
            grads["log_damping"] = (1 - self.decay) * positions(u * self.decaying)
        return grads, u.sum_to_size(self.clamped)


Damping = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(gt=0)]


class Block(Family):
    """Configuration of a block. explicit: its start state is its answer. clamp_shaped: its states have the clamp's shape."""

    explicit: ClassVar[bool] = False
    clamp_shaped: ClassVar[bool] = True

    if TYPE_CHECKING:

        @property
        def causal(self) -> bool:
            """Whether a token's force depends on those before it only: for text."""

    def build(self, width: int, heads: int, context: int) -> Dynamical:
        """The module for states (..., T <= context, width)."""
        raise owed(self, "build(width, heads, context)")
