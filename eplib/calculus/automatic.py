"""What every derivative of a block is, and the derivative of any block by automatic differentiation."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .functions import ShapeError


def version(a: Tensor) -> Any:
    """How often a tensor was written to; of one that does not count that, never the same."""
    return object() if a.is_inference() else a._version


def writes(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """What changes when one of the weights is replaced or written to."""
    return [(value.data_ptr(), 0 if value.is_inference() else value._version) for value in weights]


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
