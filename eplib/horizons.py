"""Gradients of the loss after a finite number of solver steps, settled or not: what equilibrium propagation is compared
with."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config import configuration
from .contrast import Problem
from .models import Backend, EquilibriumModel
from .solvers import Solution, Solver, Status, norm, relative_force

Steps = Annotated[int, Field(ge=1)]


@configuration
class BPTT:
    """Backpropagation through exactly `steps` solver steps from the start state; memory grows with them.

    The free state of the report is the unrolled state, settled or not: the gradient is that of the finite horizon. `window`
    truncates it to the last so many steps.
    """

    kind: Literal["BPTT"] = "BPTT"
    steps: Steps = 64
    window: Steps | None = None

    def unroll(self, model: EquilibriumModel, x: Tensor, solver: Solver) -> Tensor:
        z = model.block.start(x)
        for step in range(self.steps):
            if self.window is not None and step == self.steps - self.window:
                z = z.detach()
            with torch.set_grad_enabled(self.window is None or step >= self.steps - self.window):
                z = z + solver.step * model.block(z, x)
        return z

    @torch.no_grad()
    def by_hand(self, model: EquilibriumModel, inputs: Tensor, targets: Tensor, solver: Solver,
                dynamics: Any) -> tuple[float, dict[str, Tensor], Tensor]:
        """Loss, gradient and last state by the chain rule written out, without a graph, on dynamics that linearise as they go:
        u_k-1 = u_k + step J(z_k-1)^T u_k from u = g at the last state, each u_k contracted with what z_k-1 makes of the
        weights."""
        x = model.clamp(inputs)
        z, kept, total, into = dynamics.start(x), [], {}, torch.zeros_like(x)
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
class ForwardMode:
    """The same finite-horizon gradient by forward-mode differentiation, one tangent for each parameter (real-time recurrent
    learning, Williams & Zipser 1989). Nothing is stored over time, but the cost grows with the number of parameters: small
    systems only."""

    kind: Literal["ForwardMode"] = "ForwardMode"
    steps: Steps = 64

    def gradient(self, model: EquilibriumModel, inputs: Tensor, targets: Tensor, solver: Solver) -> dict[str, Tensor]:
        unrolled, parameters = _Unrolled(model, self.steps, solver), dict(model.named_parameters())

        def loss(values: dict[str, Tensor]) -> Tensor:
            renamed = {f"model.{name}": value for name, value in values.items()}
            return torch.func.functional_call(unrolled, renamed, (inputs, targets))

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward derivative
            return torch.func.jacfwd(loss)({name: value.detach() for name, value in parameters.items()})


class _Unrolled(nn.Module):
    """(inputs, targets) -> mean loss after so many steps, for `torch.func`."""

    def __init__(self, model: EquilibriumModel, steps: int, solver: Solver):
        super().__init__()
        self.model, self.steps, self.solver = model, steps, solver

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.model.clamp(inputs)
        z = BPTT(steps=self.steps).unroll(self.model, x, self.solver)
        return self.model.loss(self.model.block.output(z), targets).mean()


@configuration
class Backprop:
    """Ordinary backpropagation, for a block that is not a dynamical system (`blocks.Feedforward`)."""

    kind: Literal["Backprop"] = "Backprop"
    steps: Literal[1] = 1

    def unroll(self, model: EquilibriumModel, x: Tensor, solver: Solver) -> Tensor:
        if not model.block.explicit:
            raise TypeError(f"Backprop needs a feedforward block, got {type(model.block).__name__}; use BPTT(steps=...) to "
                            "backpropagate through a relaxation")
        return model.block.start(x)


def named_gradient(model: EquilibriumModel, total: Tensor) -> dict[str, Tensor]:
    """Gradient of a scalar in every parameter, zero where it does not enter."""
    names, values = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad(total, values, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def finite_horizon(model: EquilibriumModel, inputs: Tensor, targets: Tensor, estimator: BPTT | Backprop | ForwardMode,
                   solver: Solver, backend: Backend = "torch") -> tuple[float, dict[str, Tensor] | None, Solution]:
    """Loss, gradient (None if it is not finite) and last state of an objective after a finite number of steps. In the compiled
    backend BPTT is computed by hand; the other two are PyTorch's in either."""
    dynamics = model.block
    if backend == "compiled" and isinstance(estimator, BPTT):
        dynamics = model.dynamics(backend)
        loss, grads, state = estimator.by_hand(model, inputs, targets, solver, dynamics)
    else:
        forward, grads = isinstance(estimator, ForwardMode), None
        with torch.set_grad_enabled(not forward):
            x = model.clamp(inputs)
            z = (BPTT(steps=estimator.steps) if forward else estimator).unroll(model, x, solver)
            total = model.loss(model.block.output(z), targets).mean()
        if total.isfinite():
            grads = estimator.gradient(model, inputs, targets, solver) if forward else named_gradient(model, total)
        loss, state = total.item(), z.detach()
    if model.block.explicit:
        residual = norm(state) * 0
    else:
        with torch.no_grad():
            residual = relative_force(dynamics(state, model.clamp(inputs)), state)
    steps = torch.full_like(residual, estimator.steps, dtype=torch.long)
    finite = bool(residual.isfinite().all()) and math.isfinite(loss) and grads is not None
    status = Status.NONFINITE if not finite else (
        Status.CONVERGED if bool((residual <= solver.tol).all()) else Status.MAX_STEPS)
    return loss, grads if finite else None, Solution(state, residual, steps, residual * torch.nan, estimator.steps, status)
