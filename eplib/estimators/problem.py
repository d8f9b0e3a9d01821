"""A model and a batch at a state: what an estimator may look at there, and the gradients of the parameters."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calculus import uncompiled
from ..dynamics import Dynamics
from ..intact import bare, compiled
from ..models import Model
from ..parallel import Part
from ..solvers import norm


class DerivativeError(RuntimeError):
    """A block's derivative that does not fit its parameters: the message names the parameter and what is asked of it."""


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


class Readout(NamedTuple):
    """At a state: the mean loss, g = d l_b / d z_b (B, ...), and the mean loss's gradient in each parameter that it reaches
    without the state."""

    loss: float
    slope: Tensor
    direct: dict[str, Tensor]


def counted(carried: dict[str, Tensor], key: str) -> int:
    """How often this was called before; the count is carried, so that a resumed run goes on with it."""
    count = int(carried.get(key, 0))
    carried[key] = torch.tensor(count + 1)
    return count


@dataclass(frozen=True)
class Problem:
    """One batch at a state, as a rule its free equilibrium. x (B, ...) and state (B, ...) without a graph.

    carried: tensors from the last call (random signs, feedback matrices), which an estimator may replace. dynamics: what
    computes the block, by default the model's block itself (`Model.dynamics`). part: which part of a larger batch it is, by
    default all of it; what has to be known of the whole is asked of it.
    """

    model: Model
    inputs: Tensor
    targets: Tensor
    x: Tensor
    state: Tensor
    carried: dict[str, Tensor] = field(default_factory=dict)
    dynamics: Dynamics = None  # type: ignore[assignment]  # the model's block, by __post_init__
    part: Part = None  # type: ignore[assignment]  # all of it, likewise

    def __post_init__(self) -> None:
        if self.dynamics is None:
            object.__setattr__(self, "dynamics", self.model.block)
        if self.part is None:
            object.__setattr__(self, "part", Part.alone(len(self.state)))

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The block's parameters that require a gradient, by the model's names."""
        inside = {id(value) for value in self.model.block.parameters()}
        return {name: value for name, value in trained(self.model).items() if id(value) in inside}

    def normal(self, generator: torch.Generator) -> Tensor:
        """A normal draw of the state's shape, the same whatever part of the batch is here."""
        return self.part.mine(lambda size: torch.randn(size, *self.state.shape[1:], generator=generator,
                                                       dtype=torch.float64)).to(self.state)

    def force(self, z: Tensor) -> Tensor:
        """F(z) for states (B, ...) or for several per sample, (B, K, ...)."""
        return self.dynamics(z, self._lift(z))

    def nudged(self, z: Tensor, pull: Tensor, rest: Tensor | float = 0.0) -> Tensor:
        """F(z) - rest under the loss's pull; a block whose state is held in a box takes the pull inside it."""
        within = getattr(bare(self.model.block), "nudged", None)
        return self.force(z) - rest - pull if within is None else within(z, self._lift(z), pull) - rest

    def loss_slope(self, z: Tensor) -> Tensor:
        """g = d l_b / d z_b, same shape as z; several states per sample (B, K, ...) share the sample's targets.

        For complex z the derivative of the loss's holomorphic extension. Raises TypeError where there is none.
        """
        many = z.dim() > self.state.dim()
        targets = self.targets.repeat_interleave(z.shape[1], 0) if many else self.targets
        with torch.enable_grad():
            flat = (z.flatten(0, 1) if many else z).detach().requires_grad_()
            losses = self.model.loss(self.model.block.output(flat), targets)
            slope, = torch.autograd.grad(losses, flat, torch.ones_like(losses))
        if z.is_complex() and not losses.is_complex():
            raise TypeError(f"the loss of {type(self.model).__name__} is real for complex states: it has no holomorphic "
                            "extension; use a real nudge")
        return slope.conj().resolve_conj().view_as(z)  # torch gives the conjugate of a holomorphic function's derivative

    @cached_property
    def readout(self) -> Readout:
        """By one backward pass."""
        parameters = trained(self.model)
        with torch.enable_grad():
            z = self.state.detach().requires_grad_()
            losses = self.model.loss(self.model.block.output(z), self.targets)
            slope, *grads = torch.autograd.grad(losses.sum(), (z, *parameters.values()), allow_unused=True)
        direct = {name: grad / len(losses) for name, grad in zip(parameters, grads, strict=True) if grad is not None}
        return Readout(losses.mean().item(), slope, direct)

    @property
    def slope(self) -> Tensor:
        """g at the state."""
        return self.readout.slope

    @cached_property
    def scale(self) -> Tensor:
        """||g|| of each sample at the state, in which residuals of a nudged phase are counted: (B,)."""
        return norm(self.slope).clamp_min(torch.finfo(self.state.dtype).tiny)

    def linearise(self, z: Tensor) -> Any:
        """J at z, kept without a graph."""
        with torch.no_grad():
            return self.dynamics.linearise(z, self._lift(z))

    @cached_property
    def jacobian(self) -> Any:
        """J at the state. Raises TypeError where torch.compile's version of the block is not that block: it may have been made
        before a hook was registered, or have hooks of its own."""
        if self.dynamics is self.model.block and compiled(self.dynamics):
            away = self.state / 2  # not at F = 0, where a hook's factor is not seen
            with torch.no_grad(), uncompiled():
                plain = bare(self.dynamics)(away, self.x)
            apart = norm(self.force(away) - plain) / norm(away)
            if apart.max() > torch.finfo(self.state.dtype).eps ** 0.5:
                raise TypeError(f"what torch.compile made of {self._kind} computes another force than the block, "
                                f"{apart.max():.1e} of the state's norm apart; register hooks on the block, then compile it")
        return self.linearise(self.state)

    def named(self, block: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values by the model's own names from {name in the block: value of the parameter's shape}, which is emptied; summed
        where the block has one parameter under several names. Raises `DerivativeError` for a name that the block does not
        have."""
        names = {id(value): name for name, value in self.model.named_parameters()}
        known = dict(bare(self.model.block).named_parameters(remove_duplicate=False))
        found: dict[str, Tensor] = {}
        while block:
            own, value = block.popitem()
            if own not in known or known[own].shape != value.shape:
                expected = f"a parameter of shape {tuple(known[own].shape)}" if own in known else "no parameter"
                raise DerivativeError(f"the derivative of {self._kind} gives {own!r} a gradient of shape {tuple(value.shape)}, "
                                      f"but {own!r} is {expected} of the block; contract returns one for each by its name")
            name = names[id(known[own])]
            found[name] = found[name] + value if name in found else value
        return found

    def gradient(self, block: dict[str, Tensor], into: Tensor) -> dict[str, Tensor]:
        """The mean loss's gradient in every parameter that requires one, through the dynamics and directly.

        block: its sums over the batch in the block's weights, which is emptied: no second copy of the size of the weights. into
        (B, ...): the same for the clamp x of each sample. Only what leads to x and from the state to the loss, embeddings and
        readout, is differentiated automatically. Raises `DerivativeError` for a weight that the force depends on and that got
        nothing.
        """
        batch, parameters, moved = self.state.shape[0], trained(self.model), self.named(block)
        with torch.enable_grad():
            x, weights = self.model.clamp(self.inputs), list(parameters.values())
            clamped = torch.autograd.grad((into * x).sum(), weights, allow_unused=True) if x.requires_grad else ()
        through = {name: value for name, value in zip(parameters, clamped, strict=False) if value is not None}
        self._refuse_lost(parameters.keys() - moved.keys() - through.keys())
        holders = Counter(value.untyped_storage().data_ptr() for part in (through, moved) for value in part.values())

        def mean(total: Tensor) -> Tensor:  # in place, but where another gradient, or another entry, may have the same memory
            apart = holders[total.untyped_storage().data_ptr()] == 1 and 0 not in total.stride()
            return total.div_(batch) if apart else total / batch

        grads: dict[str, Tensor] = {}
        for name, value in parameters.items():
            parts = [mean(part.pop(name)) for part in (through, moved) if name in part]
            parts += [self.readout.direct[name]] if name in self.readout.direct else []
            grads[name] = sum(parts[1:], parts[0]) if parts else torch.zeros_like(value)
        return grads

    def _refuse_lost(self, names: Iterable[str]) -> None:
        """Raises `DerivativeError` where the force, says autograd, depends on a weight of these names."""
        left = {name: value for name, value in self.weights.items() if name in names}
        if not left:
            return
        with torch.enable_grad():
            force = bare(self.model.block)(self.state, self.x)
            found = torch.autograd.grad(force.sum(), list(left.values()), allow_unused=True) if force.requires_grad else ()
        lost = [name for name, value in zip(left, found, strict=False) if value is not None]
        if lost:
            raise DerivativeError(f"the force of {self._kind} depends on {', '.join(lost)}, of which its derivative gives no "
                                  "gradient; contract must return one for each by its name in the block (or leave linearise to "
                                  "blocks.Dynamical)")

    @property
    def _kind(self) -> str:
        return type(bare(self.model.block)).__name__

    def _lift(self, z: Tensor) -> Tensor:
        return self.x.unsqueeze(1) if z.dim() > self.state.dim() else self.x
