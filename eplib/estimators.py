"""Gradient estimators: from the free phase and a nudged (or adjoint) phase to one gradient per parameter.

Notation. The free phase settles F(z*; theta) = 0. Sample b has loss l_b(z), the mean over its own tokens; g = dl/dz. With the
adjoint state a = -J^-T g the loss gradient is

    dL/dtheta = mean_b [ d/dtheta <a_b, F(z*_b; theta)> + dl_b/dtheta ]      (implicit function theorem)

The estimators differ only in how they find a. The two-trajectory ones relax z_+ under F - beta g and z_- under F + beta g and
take a = (z_- - z_+) / (2 beta), whose bias is O(beta^2) (Laborieux et al. 2021). For J != J^T the contrast of the plain
field gives J^-1 instead of J^-T; the correction -(J - J^T)(z - z*) repairs it (Scurria et al. 2026). All are matrix-free, and
none stores a graph in a relaxation except BPTT, which is there to be compared with.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from .config import configuration
from .models import EquilibriumModel
from .solvers import Relaxation, Solution, Status, norm, relative_force

Beta = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Problem:
    """One batch at its free equilibrium: what an estimator may look at. x and state are (B, ...) without a graph."""

    model: EquilibriumModel
    inputs: Tensor
    targets: Tensor
    x: Tensor
    state: Tensor

    def force(self, z: Tensor) -> Tensor:
        """F(z) for states (B, ...) or for several per sample, (B, K, ...)."""
        return self.model.block(z, self._lift(self.x, z))

    def loss_slope(self, z: Tensor) -> Tensor:
        """g = d l_b / d z_b, same shape as z; several states per sample (B, K, ...) share the sample's targets."""
        many = z.dim() - self.state.dim()
        targets = self.targets.repeat_interleave(z.shape[1], 0) if many else self.targets
        with torch.enable_grad():
            flat = (z.flatten(0, 1) if many else z).detach().requires_grad_()
            total = self.model.loss(self.model.block.output(flat), targets).sum()
            slope, = torch.autograd.grad(total, flat)
        return slope.view_as(z)

    def linearise(self, z: Tensor) -> Any:
        """J at z, kept without a graph."""
        with torch.no_grad():
            return self.model.block.linearise(z, self._lift(self.x, z))

    def _lift(self, a: Tensor, z: Tensor) -> Tensor:
        return a.unsqueeze(1).expand(z.shape) if z.dim() > a.dim() else a


@dataclass(frozen=True)
class Adjoint:
    """a (B, ...) = -J^-T g as an estimator found it, the phase it came from, and the displacement ||z_beta - z*|| / ||z*||."""

    value: Tensor
    phase: Solution
    displacement: Tensor | None
    evaluations: int


@dataclass(frozen=True)
class Report:
    """What `gradient` returns.

    loss: mean loss at the free state, in nats. grads: {parameter name: tensor}, the gradient of the mean loss, or None if a
    phase diverged. free, nudged: Solutions (nudged is None for the backpropagating estimators; its residual is relative to
    the nudge). penalty_grads: gradient of the penalties, apart. measured: named scalars, `force_evaluations` among them (a
    product with J or J^T counts as one). state: what must be handed to the next call.
    """

    loss: float
    grads: dict[str, Tensor] | None
    free: Solution
    nudged: Solution | None
    penalty_grads: dict[str, Tensor]
    measured: dict[str, float]
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """The worse of the two phases."""
        phases = [self.free.status] + ([self.nudged.status] if self.nudged else [])
        return max(phases, key=list(Status).index)


def _contrast(problem: Problem, beta: float, solver: Relaxation, correction: Callable[[Tensor], Tensor] | None,
              cost: int) -> Adjoint:
    """Relaxes z_+ and z_- as one batch (B, 2, ...) under F -+ beta g - correction and contrasts them.

    The residual is that of the contrast, relative to the nudge: ||(F_+ - F_-) / 2|| / (beta ||g(z*)||). The free phase's own
    residual moves both trajectories alike and drops out of it.
    """
    sign = problem.state.new_tensor([1.0, -1.0]).view((1, 2) + (1,) * (problem.state.dim() - 1))
    scale = beta * norm(problem.loss_slope(problem.state)).clamp_min(torch.finfo(problem.state.dtype).tiny)

    def force(pair: Tensor) -> Tensor:
        push = problem.force(pair) - sign * (beta * problem.loss_slope(pair))
        return push if correction is None else push - correction(pair)

    def contrast_residual(push: Tensor, _: Tensor) -> Tensor:
        return norm(push[:, 0] - push[:, 1]) / (2 * scale)

    start = problem.state.unsqueeze(1).repeat_interleave(2, 1)  # (B, 2, ...)
    phase = solver.solve(force, start, contrast_residual)
    plus, minus = phase.value.unbind(1)
    displacement = norm(plus - problem.state) / norm(problem.state)
    return Adjoint((minus - plus) / (2 * beta), phase, displacement, phase.evaluations * cost)


@configuration
class VectorField:
    """Plain EP on the vector field, uncorrected: a = -J^-1 g, exact only where J = J^T (Scellier & Bengio 2017)."""

    kind: Literal["VectorField"] = "VectorField"
    beta: Beta = 0.2
    steps: Steps = 20

    def adjoint(self, problem: Problem, solver: Relaxation) -> Adjoint:
        return _contrast(problem, self.beta, solver, None, cost=2)


@configuration
class AsymEP:
    """Corrected EP, the correction -(J - J^T)(z - z*) frozen at the free state (Scurria et al. 2026)."""

    kind: Literal["AsymEP"] = "AsymEP"
    beta: Beta = 0.2
    steps: Steps = 20

    def adjoint(self, problem: Problem, solver: Relaxation) -> Adjoint:
        centre = problem.state.unsqueeze(1)  # (B, 1, ...)
        jacobian = problem.linearise(centre)

        def correction(pair: Tensor) -> Tensor:
            away = pair - centre
            return jacobian.product(away) - jacobian.transposed(away)

        return _contrast(problem, self.beta, solver, correction, cost=6)


@configuration
class Tracking:
    """Corrected EP re-linearised at the moving common mode m = (z_+ + z_-) / 2, both trajectories in lockstep (002).

    The correction is odd, +-(J(m) - J(m)^T) d with d = (z_+ - z_-) / 2, so it is computed once for the pair.
    """

    kind: Literal["Tracking"] = "Tracking"
    beta: Beta = 0.2
    steps: Steps = 20

    def adjoint(self, problem: Problem, solver: Relaxation) -> Adjoint:
        def correction(pair: Tensor) -> Tensor:
            plus, minus = pair.unbind(1)
            jacobian, half = problem.linearise((plus + minus) / 2), (plus - minus) / 2
            odd = jacobian.product(half) - jacobian.transposed(half)
            return torch.stack([odd, -odd], 1)

        return _contrast(problem, self.beta, solver, correction, cost=5)


@configuration
class DyadicEP:
    """Dyadic EP: midpoint m' = F(m) and difference d' = J(m)^T d - beta g(m), a = -d / beta (Scurria et al. 2026).

    held: m stays at z*, which makes it the linear response of corrected EP: one transposed product per step, and no bias in
    beta, which then only sets the scale of d. Otherwise m and d relax together as one state (B, 2, ...).
    """

    kind: Literal["DyadicEP"] = "DyadicEP"
    beta: Beta = 0.2
    steps: Steps = 20
    held: bool = True

    def adjoint(self, problem: Problem, solver: Relaxation) -> Adjoint:
        nudge = self.beta * problem.loss_slope(problem.state)
        scale = norm(nudge).clamp_min(torch.finfo(nudge.dtype).tiny)
        if self.held:
            jacobian = problem.linearise(problem.state)
            phase = solver.solve(lambda d: jacobian.transposed(d) - nudge, torch.zeros_like(nudge),
                                 lambda push, _: norm(push) / scale)
            difference, cost = phase.value, 1
        else:
            def force(pair: Tensor) -> Tensor:
                middle, half = pair.unbind(1)
                push = problem.linearise(middle).transposed(half) - self.beta * problem.loss_slope(middle)
                return torch.stack([problem.force(middle), push], 1)

            phase = solver.solve(force, torch.stack([problem.state, torch.zeros_like(nudge)], 1),
                                 lambda push, _: norm(push[:, 1]) / scale)
            difference, cost = phase.value[:, 1], 3
        return Adjoint(-difference / self.beta, phase, norm(difference) / norm(problem.state), phase.evaluations * cost)


@configuration
class Implicit:
    """Implicit differentiation: solves J^T a = -g by the same fixed-point iteration, J^T by autograd (Bai et al. 2019).

    Independent of the hand-written linearisation, so it checks it.
    """

    kind: Literal["Implicit"] = "Implicit"
    steps: Steps = 64

    def adjoint(self, problem: Problem, solver: Relaxation) -> Adjoint:
        slope = problem.loss_slope(problem.state)
        scale = norm(slope).clamp_min(torch.finfo(slope.dtype).tiny)
        with torch.enable_grad():
            state = problem.state.detach().requires_grad_()
            push = problem.force(state)

        def force(a: Tensor) -> Tensor:
            return torch.autograd.grad(push, state, a, retain_graph=True)[0] + slope

        phase = solver.solve(force, torch.zeros_like(slope), lambda f, _: norm(f) / scale)
        return Adjoint(phase.value, phase, None, phase.evaluations)


@configuration
class BPTT:
    """Backpropagation through exactly `steps` solver steps from the start state; memory grows with `steps`.

    The free state of the report is the unrolled state, settled or not: the gradient is that of the finite horizon.
    """

    kind: Literal["BPTT"] = "BPTT"
    steps: Steps = 64

    def unroll(self, model: EquilibriumModel, x: Tensor, solver: Relaxation) -> Tensor:
        z = model.block.start(x)
        for _ in range(self.steps):
            z = z + solver.step * model.block(z, x)
        return z


@configuration
class Backprop:
    """Ordinary backpropagation, for a block that is not a dynamical system (`blocks.Feedforward`)."""

    kind: Literal["Backprop"] = "Backprop"
    steps: Literal[1] = 1

    def unroll(self, model: EquilibriumModel, x: Tensor, solver: Relaxation) -> Tensor:
        if not model.block.explicit:
            raise TypeError(f"Backprop needs a feedforward block, got {type(model.block).__name__}; use BPTT(steps=...) to "
                            "backpropagate through a relaxation")
        return model.block.start(x)


Estimator = Annotated[VectorField | AsymEP | Tracking | DyadicEP | Implicit | BPTT | Backprop, Field(discriminator="kind")]


def gradient(model: EquilibriumModel, inputs: Tensor, targets: Tensor, *, estimator: Estimator, solver: Relaxation,
             nudged: Relaxation | None = None, penalties: tuple = (), state: dict | None = None) -> Report:
    """Gradient of the mean loss over the batch, with the sign, scale and reduction of torch.autograd.

    inputs, targets: what `model.clamp` and `model.loss` take, batch first. The nudged phase is solved by `nudged`, by default
    `solver` with the estimator's own number of steps. `.grad` is never touched. Raises TypeError if the estimator and the
    block do not fit; a diverged phase is no exception but gives `grads=None`.
    """
    state = dict(state or {})
    if isinstance(estimator, BPTT | Backprop):
        loss, grads, free = _backpropagated(model, inputs, targets, estimator, solver)
        found, evaluations = None, estimator.steps
    else:
        if model.block.explicit:
            raise TypeError(f"{type(estimator).__name__} needs an equilibrium block; train blocks.Feedforward with Backprop")
        free = model.settle(inputs, solver)
        found, evaluations, grads, loss = None, free.evaluations, None, float("nan")
        if free.status.usable:
            with torch.no_grad():
                problem = Problem(model, inputs, targets, model.clamp(inputs), free.value)
                found = estimator.adjoint(problem, nudged or replace(solver, max_steps=estimator.steps))
            evaluations += found.evaluations
            loss, grads = _read_out(problem, found)
    measured = {}
    penalty_grads: dict[str, Tensor] = {}
    if free.status.usable:
        for penalty in penalties:
            outcome = penalty(model, inputs, free.value, solver.step, state)
            state |= outcome.state
            measured |= outcome.measured
            evaluations += outcome.evaluations
            for name, value in outcome.grads.items():
                penalty_grads[name] = penalty_grads[name] + value if name in penalty_grads else value
    if found is not None and found.displacement is not None:
        measured["displacement"] = found.displacement.max().item()
    measured["force_evaluations"] = evaluations
    return Report(loss, grads, free, found.phase if found else None, penalty_grads, measured, state)


def _named(model: EquilibriumModel, total: Tensor) -> dict[str, Tensor]:
    """Gradient of a scalar in every parameter, zero where it does not enter."""
    names, values = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad(total, values, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def _read_out(problem: Problem, found: Adjoint) -> tuple[float, dict[str, Tensor] | None]:
    """The loss at the free state, and d/dtheta of mean_b <a_b, F(z*_b; theta)> + l_b, one graph of depth one."""
    model = problem.model
    with torch.enable_grad():
        push = model.block(problem.state, model.clamp(problem.inputs))
        loss = model.loss(model.block.output(problem.state), problem.targets).mean()
        if not found.phase.status.usable:
            return loss.item(), None
        total = (found.value * push).sum() / problem.state.shape[0] + loss
        return loss.item(), _named(model, total)


def _backpropagated(model: EquilibriumModel, inputs: Tensor, targets: Tensor, estimator: BPTT | Backprop,
                    solver: Relaxation) -> tuple[float, dict[str, Tensor] | None, Solution]:
    with torch.enable_grad():
        x = model.clamp(inputs)
        z = estimator.unroll(model, x, solver)
        loss = model.loss(model.block.output(z), targets).mean()
        grads = _named(model, loss) if loss.isfinite() else None
    state = z.detach()
    if model.block.explicit:
        residual = norm(state) * 0
    else:
        with torch.no_grad():
            residual = relative_force(model.block(state, x.detach()), state)
    steps = torch.full_like(residual, estimator.steps, dtype=torch.long)
    finite = bool(residual.isfinite().all()) and grads is not None
    status = Status.NONFINITE if not finite else (
        Status.CONVERGED if bool((residual <= solver.tol).all()) else Status.MAX_STEPS)
    return loss.item(), grads if finite else None, Solution(state, residual, steps, residual * torch.nan, estimator.steps,
                                                            status)
