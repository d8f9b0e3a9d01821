"""Gradient estimators: from the free phase and a nudged (or adjoint) phase to one gradient per parameter.

Notation. The free phase settles F(z*; theta) = 0. Sample b has loss l_b(z), the mean over its own tokens; g = dl/dz. With the
adjoint state a = -J^-T g the loss gradient is

    dL/dtheta = mean_b [ d/dtheta <a_b, F(z*_b; theta)> + dl_b/dtheta ]      (implicit function theorem)

The estimators differ only in how they find a. The contrasting ones relax states z_k under F - beta_k g and combine them into
a = -dz/dbeta at beta = 0: two points +-beta leave a bias O(beta^2) (Laborieux et al. 2021), N points on a complex circle of
radius r one of O(r^N) (Laborieux & Zenke 2022). For J != J^T the plain field gives J^-1 instead of J^-T; the correction
-(J - J^T)(z - z*) repairs it (Scurria et al. 2026). All are matrix-free, and none stores a graph in a relaxation except BPTT
and the forward mode, which are there to be compared with.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from .config import configuration
from .contrast import Adjoint, Nudging, Problem, asymmetric, contrast, lanes, real_points
from .horizons import BPTT, Backprop, ForwardMode, Steps, finite_horizon
from .models import Backend, EquilibriumModel
from .solvers import Solution, Solver, Status, norm
from .starts import LinearStart

Beta = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Report:
    """What `gradient` returns.

    loss: mean loss at the free state, in nats. grads: {parameter name: tensor}, the gradient of the mean loss, or None if a
    phase diverged. free, nudged: Solutions (nudged is None for estimators without a second phase; its residual is relative to
    the nudge). penalty_grads: gradient of the penalties, apart. measured: named scalars: `force_evaluations` (a product with J
    or J^T counts as one), `displacement`, and what the penalties saw. state: what must be handed to the next call. adjoint: the
    adjoint state (B, ...), or None.
    """

    loss: float
    grads: dict[str, Tensor] | None
    free: Solution
    nudged: Solution | None
    penalty_grads: dict[str, Tensor]
    measured: dict[str, float]
    state: dict[str, Any] = field(default_factory=dict)
    adjoint: Tensor | None = None

    @property
    def status(self) -> Status:
        """The worse of the two phases."""
        phases = [self.free.status] + ([self.nudged.status] if self.nudged else [])
        return max(phases, key=list(Status).index)


@configuration
class VectorField:
    """Plain EP on the vector field, uncorrected: a = -J^-1 g, exact only where J = J^T (Scellier & Bengio 2017)."""

    kind: Literal["VectorField"] = "VectorField"
    beta: Beta = 0.2
    steps: Steps = 20
    nudging: Nudging = "symmetric"

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        points = real_points(problem, self.beta, self.nudging)
        return contrast(problem, *points, solver, None, cost=points[0].shape[1])[0]


@configuration
class AsymEP:
    """Corrected EP, the correction -(J - J^T)(z - z*) frozen at the free state (Scurria et al. 2026)."""

    kind: Literal["AsymEP"] = "AsymEP"
    beta: Beta = 0.2
    steps: Steps = 20
    nudging: Nudging = "symmetric"

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        points, centre = real_points(problem, self.beta, self.nudging), problem.state.unsqueeze(1)
        jacobian = problem.linearise(centre)
        return contrast(problem, *points, solver, lambda states: asymmetric(jacobian, states - centre),
                         cost=3 * points[0].shape[1], held=jacobian)[0]


@configuration
class HolomorphicEP:
    """Corrected EP on `points` nudges r e^(2 pi i k / N): a = -Re (1 / N r) sum_k e^(-2 pi i k / N) (z_k - z*), the Cauchy
    integral for dz/dbeta, biased by O(r^N) (Laborieux & Zenke 2022; with the correction 002, section "Holomorphic EP").

    z at the conjugate nudge is the conjugate of z, so the lower half of the circle is not computed. Within the radius of
    convergence the mean of the z_k is z*: `measured["aliasing"]` is its distance relative to the displacement, and
    `measured["imaginary_leakage"]` the imaginary part of the states at the two real nudges, which is zero in exact arithmetic.
    N = 2 is symmetric nudging. Raises TypeError for a block without a complex extension.
    """

    kind: Literal["HolomorphicEP"] = "HolomorphicEP"
    beta: Beta = 0.2
    points: Annotated[int, Field(ge=2, multiple_of=2)] = 4
    steps: Steps = 20

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        if not problem.model.block.holomorphic:
            raise TypeError(f"{type(problem.model.block).__name__} has no complex extension; use blocks.Thick, or a real nudge")
        half = self.points // 2
        centre = problem.state.unsqueeze(1)
        jacobian = problem.linearise(centre)
        turns = torch.arange(half + 1, dtype=torch.float64) / self.points  # upper half: 0, 1/N, .. 1/2
        circle = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
        circle[0], circle[half] = 1, -1  # exactly real, so that their states stay so
        # a conjugate pair counts twice, in its real part
        double = torch.where((turns == 0) | (turns == 0.5), 1, 2).to(torch.float64)
        dtype = torch.promote_types(problem.state.dtype, torch.complex32)
        nudges, weights = ((value[None]).to(problem.state.device, dtype) for value in (
            self.beta * circle, double * circle.conj() / (self.points * self.beta)))
        found, states = contrast(problem, nudges, weights, solver, lambda z: asymmetric(jacobian, z - centre),
                                  cost=6 * (half + 1))
        moved = torch.stack([norm(one) for one in (states - centre).unbind(1)]).amax(0).clamp_min(torch.finfo(dtype).tiny)
        mean = (lanes(double.to(problem.state)[None], problem.state) * states.real).sum(1) / self.points
        leak = norm(torch.cat([states[:, 0].imag, states[:, half].imag], 1))
        measured = {"aliasing": (norm(mean - problem.state) / moved).max().item(),
                    "imaginary_leakage": (leak / moved).max().item()}
        return Adjoint(found.value, found.phase, found.displacement, found.evaluations, measured)


@configuration
class Tracking:
    """Corrected EP re-linearised at the moving common mode m = (z_+ + z_-) / 2, both trajectories in lockstep (002).

    The correction is odd, +-(J(m) - J(m)^T) d with d = (z_+ - z_-) / 2, so it is computed once for the pair; there is no
    one-sided form. held: m stays at z*, which saves the linearisations. warm: the pair starts at its linear response z* -+ beta
    a, J^T a = -g being solved first to half the tolerance, and then only has to confirm it.
    """

    kind: Literal["Tracking"] = "Tracking"
    beta: Beta = 0.2
    steps: Steps = 20
    held: bool = False
    warm: bool = False

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        def correction(pair: Tensor) -> Tensor:
            plus, minus = pair.unbind(1)
            jacobian = problem.jacobian if self.held else problem.linearise((plus + minus) / 2)
            odd = asymmetric(jacobian, (plus - minus) / 2)
            return torch.stack([odd, -odd], 1)

        linear = None
        if self.warm:
            linear = replace(solver, tol=solver.tol / 2).adjoint(problem.jacobian, problem.slope, problem.scale)
        found = contrast(problem, *real_points(problem, self.beta, "symmetric"), solver, correction, cost=4 if self.held else 5,
                         response=linear and linear.value, held=problem.jacobian if self.held else None)[0]
        return replace(found, evaluations=found.evaluations + linear.evaluations) if linear else found


@configuration
class DyadicEP:
    """Dyadic EP: midpoint m' = F(m) and difference d' = J(m)^T d - beta g(m), a = -d / beta (Scurria et al. 2026).

    held: m stays at z*, which makes it the linear response of corrected EP: J^T a = -g is solved by one transposed product per
    step, without a bias in beta, which then only sets the displacement that is reported. Otherwise m and d relax together as
    one state (B, 2, ...).
    """

    kind: Literal["DyadicEP"] = "DyadicEP"
    beta: Beta = 0.2
    steps: Steps = 20
    held: bool = True

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        if self.held:
            phase = solver.adjoint(problem.jacobian, problem.slope, problem.scale)
            return Adjoint(phase.value, phase, self.beta * norm(phase.value) / norm(problem.state), phase.evaluations)
        nudge, scale = self.beta * problem.slope, self.beta * problem.scale

        def force(pair: Tensor) -> Tensor:
            middle, half = pair.unbind(1)
            push = problem.linearise(middle).transposed(half) - self.beta * problem.loss_slope(middle)
            return torch.stack([problem.force(middle), push], 1)

        phase = solver.solve(force, torch.stack([problem.state, torch.zeros_like(nudge)], 1),
                             lambda push, _: norm(push[:, 1]) / scale)
        half = phase.value[:, 1]
        return Adjoint(-half / self.beta, phase, norm(half) / norm(problem.state), phase.evaluations * 3)


@configuration
class Implicit:
    """Implicit differentiation: solves J^T a = -g with any solver, J^T by autograd (Bai et al. 2019).

    `nudged=solvers.Anderson()` makes it GMRES-like. Independent of the hand-written linearisation, so it checks it.
    """

    kind: Literal["Implicit"] = "Implicit"
    steps: Steps = 64

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        with torch.enable_grad():
            state = problem.state.detach().requires_grad_()
            push = problem.model.block(state, problem.x)  # with a graph, whatever computes the phases

        def force(a: Tensor) -> Tensor:
            return torch.autograd.grad(push, state, a, retain_graph=True)[0] + problem.slope

        phase = solver.solve(force, torch.zeros_like(problem.slope), lambda f, _: norm(f) / problem.scale)
        return Adjoint(phase.value, phase, None, phase.evaluations)


@configuration
class OneStep:
    """One-step gradient: J^-T taken as -1, a = g; backpropagation through the last application of the block only (Fung et al.
    2022)."""

    kind: Literal["OneStep"] = "OneStep"
    steps: Literal[1] = 1

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        return Adjoint(problem.slope, None, None, 0)


@configuration
class FeedbackAlignment:
    """Direct feedback alignment: a = e R, the error e = dl/dlogits through a fixed random matrix (Nokland 2016).

    R, one for each layer of the state, has entries of variance 1 / C, is drawn from seed 0 at the first call and carried in the
    report's state.
    """

    kind: Literal["FeedbackAlignment"] = "FeedbackAlignment"
    steps: Literal[1] = 1

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        model, z = problem.model, problem.state
        with torch.enable_grad():
            logits = model.logits(model.block.output(z)).detach().requires_grad_()
            error, = torch.autograd.grad(model.loss_of(logits, problem.targets).sum(), logits)  # (B, T, V) or (B, V)
        if "feedback" not in problem.carried:
            shape = (*z.shape[1:-2], error.shape[-1], z.shape[-1])  # (V, C), for a stack (L, V, C)
            draw = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / math.sqrt(z.shape[-1])
            problem.carried["feedback"] = draw.to(z)
        if error.dim() == 2:  # one error for the image, shared by its tokens
            error = error.unsqueeze(1) / z.shape[-2]
        error = error.view(error.shape[0], *(1,) * (z.dim() - 3), *error.shape[1:])
        return Adjoint((error @ problem.carried["feedback"]).expand_as(z), None, None, 0)


@configuration
class ShuffledNudge:
    """Negative control: the linear response to targets from half a batch away, a = -J^-T g'; the readout learns the right
    ones."""

    kind: Literal["ShuffledNudge"] = "ShuffledNudge"
    steps: Steps = 20

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        targets = problem.targets
        wrong = targets.flatten().roll(targets.numel() // 2).view_as(targets)
        return DyadicEP(steps=self.steps).adjoint(replace(problem, targets=wrong), solver)


class _Swapped:
    """A linearisation with J and J^T exchanged."""

    def __init__(self, jacobian: Any):
        self.product, self.transposed = jacobian.transposed, jacobian.product


class _SwappedProblem(Problem):
    def linearise(self, z: Tensor) -> _Swapped:
        return _Swapped(super().linearise(z))


@configuration
class FlippedCorrection:
    """Negative control: `AsymEP` whose correction has the wrong sign, +(J - J^T)(z - z*)."""

    kind: Literal["FlippedCorrection"] = "FlippedCorrection"
    beta: Beta = 0.2
    steps: Steps = 20

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        swapped = _SwappedProblem(**{part.name: getattr(problem, part.name) for part in fields(problem)})
        return AsymEP(beta=self.beta, steps=self.steps).adjoint(swapped, solver)


Estimator = Annotated[VectorField | AsymEP | HolomorphicEP | Tracking | DyadicEP | Implicit | OneStep | FeedbackAlignment
                      | ShuffledNudge | FlippedCorrection | BPTT | ForwardMode | Backprop, Field(discriminator="kind")]


def gradient(model: EquilibriumModel, inputs: Tensor, targets: Tensor, *, estimator: Estimator, solver: Solver,
             nudged: Solver | None = None, penalties: tuple = (), state: dict | None = None,
             start: Tensor | LinearStart | None = None, backend: Backend = "torch") -> Report:
    """Gradient of the mean loss over the batch, with the sign, scale and reduction of torch.autograd.

    inputs, targets: what `model.clamp` and `model.loss` take, batch first. The nudged phase is solved by `nudged`, by default
    `solver` with the estimator's own number of steps. `start`: state from which the free phase starts, or how it is predicted,
    by default the block's. backend: "torch", or "compiled" for the kernel of `eplib.kernels`, which computes the phases, the
    products and BPTT's steps; what needs a graph is PyTorch's in either. Parameters that do not require a gradient get none. `.grad` is never
    touched. Raises TypeError if the estimator and the block do not fit, ValueError if every parameter is frozen; a diverged
    phase is no exception but gives `grads=None`.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("every parameter of the model is frozen; set requires_grad on those that are to be trained")
    state = dict(state or {})
    measured: dict[str, float] = {}
    nudged_phase = problem = found = None
    if isinstance(estimator, BPTT | Backprop | ForwardMode):
        loss, grads, free = finite_horizon(model, inputs, targets, estimator, solver, backend)
        evaluations = estimator.steps
        if penalties and free.status.usable:
            with torch.no_grad():
                problem = Problem(model, inputs, targets, model.clamp(inputs), free.value, state)
    else:
        if model.block.explicit:
            raise TypeError(f"{type(estimator).__name__} needs an equilibrium block; train blocks.Feedforward with Backprop")
        grads, loss = None, float("nan")
        with torch.no_grad():
            x, dynamics = model.clamp(inputs), model.dynamics(backend)
            free = solver.settle(dynamics, x, start(x, state) if isinstance(start, LinearStart) else start)
            evaluations = free.evaluations
            if free.status.usable:
                if isinstance(start, LinearStart):
                    start.learn(x, free.value, state)
                problem = Problem(model, inputs, targets, x, free.value, state, dynamics)
                found = estimator.adjoint(problem, nudged or solver.limited(estimator.steps))
        if found:
            usable = found.phase is None or found.phase.status.usable
            nudged_phase, evaluations = found.phase, evaluations + found.evaluations
            measured |= found.measured
            if found.displacement is not None:
                measured["displacement"] = found.displacement.max().item()
            loss, grads = problem.readout[0], _read_out(problem, found.value) if usable else None
    penalty_grads: dict[str, Tensor] = {}
    if problem:
        for penalty in penalties:
            outcome = penalty(problem, solver.step)
            together = {name: measured[name] + outcome.measured[name] for name in ("penalty",)
                        if name in measured and name in outcome.measured}
            measured |= outcome.measured | together
            evaluations += outcome.evaluations
            for name, value in outcome.grads.items():
                penalty_grads[name] = penalty_grads[name] + value if name in penalty_grads else value
    measured["force_evaluations"] = evaluations
    return Report(loss, grads, free, nudged_phase, penalty_grads, measured, state, found.value if found else None)


def asymmetry(jacobian: Any, v: Tensor) -> float:
    """||J v - J^T v|| / ||J v||, the largest of the batch: along the adjoint state, what the correction acts on."""
    with torch.no_grad():
        moved = jacobian.product(v)
        return (norm(moved - jacobian.transposed(v)) / norm(moved).clamp_min(torch.finfo(v.dtype).tiny)).max().item()


def _read_out(problem: Problem, adjoint: Tensor) -> dict[str, Tensor]:
    """d/dtheta of mean_b <a_b, F(z*_b; theta)> + l_b at the free state.

    The block's part is contracted by hand where its derivative is (`calculus`): outer products of quantities local to each
    weight.
    """
    with torch.no_grad():
        block, into = problem.jacobian.contract(adjoint)  # of the very tensor that the solver returned: its pass may be kept
    return problem.gradient(block, into)
