"""Gradients of the loss after a finite number of steps, settled or not: what equilibrium propagation is compared with."""

import math
from typing import NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import configuration
from ..dynamics import InKernel, projection
from ..families import owed
from ..models import Model
from ..solvers import Solution, Solver, Status, norm, relative_force
from ..solvers.base import Step
from .base import BACKWARD, FORCE, Estimator, Steps
from .batch import Batch
from .problem import trained
from .report import Report, finite


class Unrolled(NamedTuple):
    """Mean loss, its gradient {parameter name: tensor} (None if the loss is not finite), and the last state (B, ...)."""

    loss: float
    grads: dict[str, Tensor] | None
    state: Tensor


class FiniteHorizon(Estimator):
    """An estimator without an equilibrium: plain steps, as a rule of the solver's size, from the block's own start, and no
    second phase. Of the solver only its step counts, and its tol for the status of the report's free state, the last one."""

    equilibrium = second_phase = False
    steps: int = 1

    def cost(self, model: Model) -> int:
        """In force evaluations."""
        raise owed(self, "cost(model)")

    def unroll(self, model: Model, x: Tensor, solver: Solver) -> Tensor:
        """The last state, with the graph that leads to it."""
        raise owed(self, "unroll(model, x, solver)")

    def differentiate(self, batch: Batch, solver: Solver) -> Unrolled:
        """By PyTorch, through a graph of everything that `unroll` computes."""
        model, parameters = batch.model, trained(batch.model)
        with torch.enable_grad():
            z = self.unroll(model, model.clamp(batch.inputs), solver)
            total = model.loss(model.block.output(z), batch.targets).mean()
            if not total.isfinite():
                return Unrolled(total.item(), None, z.detach())
            grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return Unrolled(total.item(), dict(zip(parameters, grads, strict=True)), z.detach())

    def gradient(self, batch: Batch, solver: Solver, nudged: Solver | None) -> Report:
        loss, grads, state = self.differentiate(batch, solver)
        if batch.model.block.explicit:
            residual = norm(state) * 0
        else:
            with torch.no_grad():
                residual = relative_force(batch.dynamics(state, batch.x), state)
        settled = Status.CONVERGED if bool((residual <= solver.tol).all()) else Status.MAX_STEPS
        usable = bool(residual.isfinite().all()) and math.isfinite(loss) and grads is not None
        free = Solution(state, residual, torch.full_like(residual, self.steps, dtype=torch.long), residual * torch.nan,
                        self.steps, settled if usable else Status.NONFINITE)
        return Report(loss, finite(grads) if usable else None, free, None, {"force_evaluations": self.cost(batch.model)})


@configuration
class BPTT(FiniteHorizon):
    """Backpropagation through exactly `steps` Euler steps from the block's start state; memory grows with them. `window`
    truncates it to the last so many: the state that they set out from counts as given, the start state too.

    step: the solver's by default. Plain steps may have to be smaller than those of an accelerated solver; with a size of their
    own the solver, with which the model is evaluated, can be that of the methods it is compared with.
    """

    steps: Steps = 64
    window: Steps | None = None
    step: Step | None = None

    @model_validator(mode="after")
    def _fits(self) -> "BPTT":
        if (self.window or 0) > self.steps:
            raise ValueError(f"window={self.window} goes back further than the {self.steps} steps there are; leave it out for "
                             "all of them and the start state's own gradient")
        return self

    def cost(self, model: Model) -> int:
        return FORCE * self.steps + BACKWARD * (self.window or self.steps)

    @property
    def _before(self) -> int:
        """Steps ahead of the window, -1 without one: then the start state is differentiated as well."""
        return -1 if self.window is None else self.steps - self.window

    def unroll(self, model: Model, x: Tensor, solver: Solver) -> Tensor:
        z, project, graph = model.block.start(x), projection(model.block), torch.is_grad_enabled()
        step = self.step or solver.step
        for count in range(self.steps):
            with torch.set_grad_enabled(graph and count >= self._before):
                z = z.detach() if count == self._before else z
                z = z + step * model.block(z, x)
                z = z if project is None else project(z)
        return z

    def differentiate(self, batch: Batch, solver: Solver) -> Unrolled:
        if isinstance(batch.dynamics, InKernel):
            return self._by_hand(batch, batch.dynamics, solver)
        return super().differentiate(batch, solver)

    @torch.no_grad()
    def _by_hand(self, batch: Batch, dynamics: InKernel, solver: Solver) -> Unrolled:
        """By the chain rule written out, without a graph: u_k-1 = u_k + step J(z_k-1)^T u_k from u = g at the last state, each
        u_k contracted with what z_k-1 makes of the weights."""
        x, kept, step = batch.x, [], self.step or solver.step
        z, into = dynamics.start(x), torch.zeros_like(x)
        total: dict[str, Tensor] = {}
        for count in range(self.steps):
            if count < self._before:
                z = z + step * dynamics(z, x)
            else:
                push, jacobian = dynamics.force_and_jacobian(z, x)
                kept.append(jacobian)
                z = z + step * push
        problem = batch.at(z)
        u = problem.slope
        while kept:
            moved, block, to_x = kept.pop().transposed_and_contracted(u)
            for name, value in block.items():
                total[name] = total[name].add_(value, alpha=step) if name in total else step * value
            into += step * to_x
            u = u + step * moved
        if self._before < 0:
            into += u  # the start state is x
        return Unrolled(problem.readout.loss, problem.gradient(total, into), z)


@configuration
class Backprop(FiniteHorizon):
    """Ordinary backpropagation, for a block that is not a dynamical system (`blocks.Feedforward`)."""

    compiled = False
    explicit = True

    def cost(self, model: Model) -> int:
        """In force evaluations: forward once, and back."""
        return FORCE + BACKWARD

    def unroll(self, model: Model, x: Tensor, solver: Solver) -> Tensor:
        return model.block.start(x)


@configuration
class ForwardMode(FiniteHorizon):
    """The same gradient as `BPTT`, by one tangent for each parameter (real-time recurrent learning, Williams & Zipser 1989).
    Nothing is stored over time, but the cost grows with the number of parameters: small systems only."""

    steps: Steps = 64
    compiled = False

    def cost(self, model: Model) -> int:
        """In force evaluations: the state once apart and once under the tangents, of which each takes a product a step."""
        return FORCE * self.steps * (2 + sum(value.numel() for value in trained(model).values()))

    @torch.no_grad()
    def differentiate(self, batch: Batch, solver: Solver) -> Unrolled:
        relaxed, asked = _Relaxed(batch.model, self.steps, solver), (batch.inputs, batch.targets)
        loss, z = relaxed(*asked)
        if not loss.isfinite():
            return Unrolled(loss.item(), None, z)

        def score(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(relaxed, {f"model.{name}": value for name, value in values.items()}, asked)[0]

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward derivative
            values = {name: value.detach() for name, value in trained(batch.model).items()}
            return Unrolled(loss.item(), torch.func.jacfwd(score)(values), z)


class _Relaxed(nn.Module):
    """(inputs, targets) -> mean loss and state after so many steps, for `torch.func`."""

    def __init__(self, model: Model, steps: int, solver: Solver):
        super().__init__()
        self.model, self.steps, self.solver = model, steps, solver

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        z = BPTT(steps=self.steps).unroll(self.model, self.model.clamp(inputs), self.solver)
        return self.model.loss(self.model.block.output(z), targets).mean(), z
