"""What solvers, estimators and controllers ask of whatever computes a block: PyTorch, or the compiled kernel."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from .solvers import Solution, Solver


class Linearisation(Protocol):
    """J = dF/dz at states z (B, ...)."""

    def product(self, v: Tensor, /) -> Tensor:
        """J v, of the shape of v: that of the states, or several directions for each, (B, K, ...)."""
        ...

    def transposed(self, u: Tensor, /) -> Tensor:
        """J^T u."""
        ...

    def contract(self, u: Tensor, /) -> tuple[dict[str, Tensor], Tensor]:
        """The gradient of <u, F>: its sums over the batch in the block's parameters, by their names there, and that in the
        clamp x of each sample. Who asks for it may write to what is returned."""
        ...


class Dynamics(Protocol):
    """dz/dt = F(z, x) for states z (B, ...), or several for each sample, (B, K, ...), under clamps x that broadcast."""

    def start(self, x: Tensor) -> Tensor:
        """The state in which the free phase begins."""
        ...

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        """The force F, of the shape of z."""
        ...

    def linearise(self, z: Tensor, x: Tensor) -> Any:  # a `Linearisation`, of which each kind offers more
        """J at z, without a graph where the call has none."""
        ...


@runtime_checkable
class InKernel(Dynamics, Protocol):
    """Dynamics with a loop of their own for a whole phase."""

    def relax(self, solver: "Solver", x: Tensor, start: Tensor, scale: Tensor | None = None) -> "Solution":
        """The phase from `start`; residuals count in units of ||z||, or of scale (B,)."""
        ...

    def force_and_jacobian(self, z: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        """F and J at z, in one pass."""
        ...


@runtime_checkable
class LinearInKernel(Linearisation, Protocol):
    """A linearisation with loops of its own, for the adjoint phase and for a probe of every token."""

    def relax(self, solver: "Solver", slope: Tensor, scale: Tensor) -> "Solution":
        """Solves J^T a = -slope; residuals count in units of scale (B,)."""
        ...

    def token_probe(self, v: Tensor, step: float, products: int) -> tuple[Tensor, Tensor]:
        """Every token's probe v (B, T, C), refined by so many products v <- (I + step J_tt) v scaled to norm 1, and what one
        more makes of it."""
        ...

    def transposed_and_contracted(self, u: Tensor, /) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """J^T u, and what `contract` gives for u, by one pass."""
        ...


class Projected(Protocol):
    """Dynamics whose states are held in a set, a box say. The force is to be zero where it holds them, and to take the loss's
    pull inside (`nudged`), as `blocks.FromEnergy` does: a residual counts what the force says."""

    def project(self, z: Tensor, /) -> Tensor:
        """The state of the set that is nearest to z, (B, ...) or (B, K, ...)."""
        ...


def projection(dynamics: Any) -> Callable[[Tensor], Tensor] | None:
    """What holds the states of these dynamics in their set, if anything does: a method `project` (`Projected`), not a layer of
    that name."""
    found = getattr(dynamics, "project", None)
    return found if inspect.ismethod(found) else None
