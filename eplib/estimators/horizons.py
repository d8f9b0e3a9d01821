"""Gradients of the loss after a finite number of solver steps, settled or not: what equilibrium propagation is compared
with."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import configuration
from ..models import Backend, EquilibriumModel
from ..solvers import Solution, Solver, Status, norm, relative_force
from .nudged import BACKWARD, FORCE, Estimator, Problem, Steps

Differentiated = tuple[float, dict[str, Tensor] | None, Tensor]  # loss, gradient (None if the loss is not finite), last state


class FiniteHorizon(Estimator):
    """What these estimators share: no equilibrium, so no second phase, and plain steps of the solver's size from the block's
    own start."""

    equilibrium = second_phase = False

    def cost(self, model: EquilibriumModel) -> int:
        """In force evaluations."""
        raise NotImplementedError

    def unroll(self, model: EquilibriumModel, x: Tensor, solver: Solver) -> Tensor:
        """The last state, with the graph that leads to it."""
        raise NotImplementedError

    def differentiate(self, model: EquilibriumModel, inputs: Tensor, targets: Tensor, solver: Solver,
                      dynamics: Any) -> Differentiated:
        """By PyTorch, through a graph of everything that `unroll` computes."""
        with torch.enable_grad():
            z = self.unroll(model, model.clamp(inputs), solver)
            total = model.loss(model.block.output(z), targets).mean()
            grads = named_gradient(model, total) if total.isfinite() else None
        return total.item(), grads, z.detach()


@configuration
class BPTT(FiniteHorizon):
    """Backpropagation through exactly `steps` Euler steps from the block's start state; memory grows with them.

    The free state of the report is the unrolled state, settled or not: the gradient is that of the finite horizon. `window`
    truncates it to the last so many steps. Of the solver only its step counts, and its tol for the report's status.
    """

    steps: Steps = 64
    window: Steps | None = None

    def cost(self, model: EquilibriumModel) -> int:
        return FORCE * self.steps + BACKWARD * min(self.window or self.steps, self.steps)

    def unroll(self, model: EquilibriumModel, x: Tensor, solver: Solver) -> Tensor:
        z, cut = model.block.start(x), -1 if self.window is None else self.steps - self.window
        with torch.no_grad():
            for _ in range(cut):
                z = z + solver.step * model.block(z, x)
        z = z if cut < 0 else z.detach()
        for _ in range(max(0, cut), self.steps):
            z = z + solver.step * model.block(z, x)
        return z

    def differentiate(self, model: EquilibriumModel, inputs: Tensor, targets: Tensor, solver: Solver,
                      dynamics: Any) -> Differentiated:
        by_hand = hasattr(dynamics, "force_and_jacobian")  # dynamics that linearise as they go
        return (self._by_hand if by_hand else super().differentiate)(model, inputs, targets, solver, dynamics)

    @torch.no_grad()
    def _by_hand(self, model: EquilibriumModel, inputs: Tensor, targets: Tensor, solver: Solver,
                 dynamics: Any) -> Differentiated:
        """By the chain rule written out, without a graph: u_k-1 = u_k + step J(z_k-1)^T u_k from u = g at the last state, each
        u_k contracted with what z_k-1 makes of the weights."""
        x = model.clamp(inputs)
        z, kept, into = dynamics.start(x), [], torch.zeros_like(x)
        total: dict[str, Tensor] = {}
        for step in range(self.steps):
            if self.window is not None and step < self.steps - self.window:
                z = z + solver.step * dynamics(z, x)
            else:
                push, jacobian = dynamics.force_and_jacobian(z, x)
                kept.append(jacobian)
                z = z + solver.step * push
        problem = Problem(model, inputs, targets, x, z, dynamics=dynamics)
        loss, u, _ = problem.readout
        while kept:
            moved, block, to_x = kept.pop().transposed_and_contracted(u)
            for name, value in block.items():
                total[name] = total[name].add_(value, alpha=solver.step) if name in total else solver.step * value
            into += solver.step * to_x
            u = u + solver.step * moved
        if self.window is None or self.window > self.steps:
            into += u  # the start state is x
        return loss, problem.gradient(total, into), z


@configuration
class ForwardMode(FiniteHorizon):
    """The same finite-horizon gradient by forward-mode differentiation, one tangent for each parameter (real-time recurrent
    learning, Williams & Zipser 1989). Nothing is stored over time, but the cost grows with the number of parameters: small
    systems only."""

    steps: Steps = 64
    compiled = False

    def cost(self, model: EquilibriumModel) -> int:
        """In force evaluations: the state once apart and once under the tangents, of which each takes a product a step."""
        return FORCE * self.steps * (2 + sum(value.numel() for value in _trained(model).values()))

    @torch.no_grad()
    def differentiate(self, model: EquilibriumModel, inputs: Tensor, targets: Tensor, solver: Solver,
                      dynamics: Any) -> Differentiated:
        unrolled = _Unrolled(model, self.steps, solver)
        loss, z = unrolled(inputs, targets)
        if not loss.isfinite():
            return loss.item(), None, z

        def score(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(unrolled, {f"model.{name}": value for name, value in values.items()},
                                              (inputs, targets))[0]

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward derivative
            values = {name: value.detach() for name, value in _trained(model).items()}
            return loss.item(), torch.func.jacfwd(score)(values), z


class _Unrolled(nn.Module):
    """(inputs, targets) -> mean loss and state after so many steps, for `torch.func`."""

    def __init__(self, model: EquilibriumModel, steps: int, solver: Solver):
        super().__init__()
        self.model, self.steps, self.solver = model, steps, solver

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        z = BPTT(steps=self.steps).unroll(self.model, self.model.clamp(inputs), self.solver)
        return self.model.loss(self.model.block.output(z), targets).mean(), z


@configuration
class Backprop(FiniteHorizon):
    """Ordinary backpropagation, for a block that is not a dynamical system (`blocks.Feedforward`)."""

    compiled = False
    explicit = True

    def cost(self, model: EquilibriumModel) -> int:
        """In force evaluations: forward once, and back."""
        return FORCE + BACKWARD

    def unroll(self, model: EquilibriumModel, x: Tensor, solver: Solver) -> Tensor:
        return model.block.start(x)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def named_gradient(model: EquilibriumModel, total: Tensor) -> dict[str, Tensor]:
    """Gradient of a scalar in every parameter that requires one, zero where it does not enter."""
    trained = _trained(model)
    grads = torch.autograd.grad(total, list(trained.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(trained, grads, strict=True))


def finite_horizon(model: EquilibriumModel, inputs: Tensor, targets: Tensor, estimator: FiniteHorizon, solver: Solver,
                   backend: Backend = "torch") -> tuple[float, dict[str, Tensor] | None, Solution]:
    """Loss, gradient (None if the loss or the last state is not finite) and last state after a finite number of steps. In the
    compiled backend BPTT is computed by hand."""
    dynamics = model.dynamics(backend)
    loss, grads, state = estimator.differentiate(model, inputs, targets, solver, dynamics)
    if model.block.explicit:
        residual = norm(state) * 0
    else:
        with torch.no_grad():
            residual = relative_force(dynamics(state, model.clamp(inputs)), state)
    taken = getattr(estimator, "steps", 1)
    finite = bool(residual.isfinite().all()) and math.isfinite(loss) and grads is not None
    status = Status.NONFINITE if not finite else (
        Status.CONVERGED if bool((residual <= solver.tol).all()) else Status.MAX_STEPS)
    steps = torch.full_like(residual, taken, dtype=torch.long)
    return loss, grads if finite else None, Solution(state, residual, steps, residual * torch.nan, taken, status)
