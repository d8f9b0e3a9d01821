"""The estimators, and what calls them: one gradient per parameter from a free phase and a nudged (or adjoint) phase.

`propagation` holds those of equilibrium propagation and the notation, `baselines` and `horizons` what they are compared with.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..models import Backend, EquilibriumModel
from ..solvers import FixedHorizon, Solution, Solver, Status, norm
from ..starts import LinearStart
from .baselines import FeedbackAlignment, Implicit, OneStep
from .entry import check, first_state, refuse_start, second_phase
from .horizons import BPTT, Backprop, ForwardMode, finite_horizon
from .nudged import BACKWARD, LINEARISATION, Estimator, Problem
from .propagation import AsymEP, DyadicEP, FlippedCorrection, HolomorphicEP, ShuffledNudge, Tracking, VectorField

__all__ = ["BPTT", "AsymEP", "Backprop", "DyadicEP", "Estimator", "FeedbackAlignment", "FlippedCorrection", "ForwardMode",
           "GradientError", "HolomorphicEP", "Implicit", "OneStep", "Report", "ShuffledNudge", "Tracking", "VectorField",
           "asymmetry", "at_state", "gradient", "summed"]


class GradientError(RuntimeError):
    """A gradient was asked of a report, `report`, that has none: the message names what failed."""

    def __init__(self, report: "Report", said: str):
        super().__init__(said)
        self.report = report


@dataclass(frozen=True)
class Report:
    """What `gradient` returns.

    loss: mean loss at the free state, in nats. grads: {parameter name: tensor}, the gradient of the mean loss, or None where
    something failed. free, nudged: Solutions (nudged is None for estimators without a second phase; its residual is relative to
    the nudge). penalty_grads: gradient of all penalties together, apart. measured: named scalars: `force_evaluations` (in the
    unit of `estimators.FORCE`), `displacement`, and what the penalties saw: the sum of their values as `penalty`, each one's
    own as "penalty.<its class>" where there are several; all names of the second, third .. of a class end in ".2", ".3". state:
    what must be handed to the next call, where "penalty<i>." leads what the i-th penalty carries. adjoint: the adjoint state
    (B, ...), or None.
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
    def failed(self) -> Literal["free", "nudged", "gradient"] | None:
        """What left no gradient: a phase, or the gradient itself, in which something was not finite."""
        if self.grads is not None:
            return None
        if not self.free.status.usable:
            return "free"
        return "nudged" if self.nudged and not self.nudged.status.usable else "gradient"

    @property
    def status(self) -> Status:
        """The worse of the two phases; not finite where the gradient alone is that."""
        phases = [phase.status for phase in (self.free, self.nudged) if phase]
        return Status.NONFINITE if self.failed == "gradient" else max(phases, key=list(Status).index)

    def total(self, *, task: bool = True) -> dict[str, Tensor]:
        """The gradient of the mean loss plus that of all penalties, or of the penalties alone (task=False), {parameter name:
        tensor}. Raises `GradientError` where the task's failed or the penalties' is not finite."""
        if task and self.failed:
            what = "gradient" if self.failed == "gradient" else f"{self.failed} phase"
            ended = "is not finite" if self.status is Status.NONFINITE else "diverged"
            raise GradientError(self, f"the {what} {ended}, so there is no gradient of the task; a smaller learning rate or "
                                      "solver step, or a controller, keeps the phases settled. To take the penalties' gradient "
                                      "alone: report.assign(model, task=False)")
        total = summed((self.grads if task else None) or {}, self.penalty_grads)
        if total and _finite(total) is None:
            raise GradientError(self, "the gradient of the penalties is not finite; lower their strength or leave the step out")
        return total

    def assign(self, model: EquilibriumModel, *, task: bool = True) -> None:
        """Sets `.grad` of every parameter to a copy of its `total`, None where it has none, for any of PyTorch's optimisers.
        What was there is replaced; `eplib.ep_loss` accumulates.

        task: False for the gradient of the penalties alone. Raises `GradientError` as `total` does, and ValueError, before
        anything is set, for another model than that of the report.
        """
        total, parameters = self.total(task=task), dict(model.named_parameters())
        trained = {name: tuple(value.shape) for name, value in parameters.items() if value.requires_grad}
        for name, value in total.items():
            if trained.get(name) != tuple(value.shape):
                found = f"trains {trained[name]} there" if name in trained else "does not train it" if name in parameters else \
                    "has no such parameter"
                raise ValueError(f"the report has a gradient {tuple(value.shape)} of {name!r}, and the model {found}; give the "
                                 "model that the report is of")
        if left := [name for name in trained if task and name not in total]:
            raise ValueError(f"the model trains {', '.join(left)}, of which the report has no gradient; give the model that "
                             "the report is of, with the same parameters frozen")
        for name, parameter in parameters.items():
            parameter.grad = total[name].clone() if name in total else None  # what clips in place leaves the report as it is


def gradient(model: EquilibriumModel, inputs: Tensor, targets: Tensor, *, estimator: Estimator, solver: Solver,
             nudged: Solver | None = None, penalties: tuple = (), state: dict | None = None,
             start: Tensor | LinearStart | None = None, backend: Backend = "torch") -> Report:
    """Gradient of the mean loss over the batch, with the sign, scale and reduction of torch.autograd.

    inputs, targets: what `model.clamp` and `model.loss` take, batch first. The nudged phase is solved by `nudged`, by default
    by `solver`, in at most the estimator's own number of steps where it has one. `start`: state from which the free phase
    starts, or how it is predicted, by default the block's. backend: "torch", or "compiled" for the kernel of `eplib.kernels`,
    which computes the phases, the products and BPTT's steps; what needs a graph is PyTorch's in either. Parameters that do not
    require a gradient get none. `.grad` is never touched. Raises TypeError if the estimator and the block do not fit,
    ValueError if anything else does not (`entry`); a diverged phase is no exception but gives `grads=None`.
    """
    second = second_phase(estimator, solver, nudged)
    check(model, inputs, targets, estimator, backend, penalties)
    state = dict(state or {})
    if not estimator.equilibrium:
        refuse_start(estimator, start)
        report, problem = _unrolled(model, inputs, targets, estimator, solver, state, backend)
    else:
        with torch.no_grad():
            x, dynamics = model.clamp(inputs), model.dynamics(backend)
            free = solver.settle(dynamics, x, first_state(start, model.block, x, state))
            if isinstance(start, LinearStart) and free.status.usable:
                start.learn(x, free.value, state)
        problem = Problem(model, inputs, targets, x, free.value, state, dynamics)
        report = _estimated(problem, free, estimator, second)
    return _penalised(report, problem, penalties, solver.step)


def at_state(model: EquilibriumModel, inputs: Tensor, targets: Tensor, state: Tensor, estimator: Estimator,
             nudged: Solver | None = None, *, backend: Backend = "torch", carried: dict | None = None) -> Report:
    """The estimator's gradient at a given free state (B, ...), settled or not, without a free phase of its own: `report.free`
    is that state, evaluated once.

    nudged: the solver of the estimator's second phase. carried: the state of an earlier report. Raises as `gradient` does, and
    TypeError for an estimator without an equilibrium.
    """
    if not estimator.equilibrium:
        raise TypeError(f"{type(estimator).__name__} differentiates a finite number of steps; it has none at a given state")
    second = second_phase(estimator, None, nudged)
    check(model, inputs, targets, estimator, backend)
    with torch.no_grad():
        x, dynamics = model.clamp(inputs), model.dynamics(backend)
        free = FixedHorizon(steps=0).settle(dynamics, x, first_state(state, model.block, x, {}))
    problem = Problem(model, inputs, targets, x, free.value, dict(carried or {}), dynamics)
    return _penalised(_estimated(problem, free, estimator, second), problem, (), 0.0)


def _unrolled(model: EquilibriumModel, inputs: Tensor, targets: Tensor, estimator: Any, solver: Solver, state: dict,
              backend: Backend) -> tuple[Report, Problem]:
    """The task's part of the report of an estimator without an equilibrium."""
    loss, grads, free = finite_horizon(model, inputs, targets, estimator, solver, backend)
    with torch.no_grad():
        problem = Problem(model, inputs, targets, model.clamp(inputs), free.value, state)
    return Report(loss, _finite(grads), free, None, {}, {"force_evaluations": estimator.cost(model)}, state), problem


def _estimated(problem: Problem, free: Solution, estimator: Any, solver: Solver | None) -> Report:
    """The task's part of the report at a free state."""
    if not free.status.usable:
        return Report(math.nan, None, free, None, {}, {"force_evaluations": free.evaluations}, problem.carried)
    with torch.no_grad():
        found = estimator.adjoint(problem, solver)
    usable = found.phase is None or found.phase.status.usable
    grads = _finite(_read_out(problem, found.value)) if usable else None
    measured = found.measured | {"force_evaluations": free.evaluations + found.evaluations + BACKWARD * usable}
    if found.displacement is not None:
        measured["displacement"] = found.displacement.max().item()
    return Report(problem.readout[0], grads, free, found.phase, {}, measured, problem.carried, found.value)


def summed(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of gradients, {parameter name: tensor}; of a name that is in one of them alone, its own tensor."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def _finite(grads: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The gradient, None if anything in it is not finite; by the largest entries, which need no copy of the gradient."""
    largest = [torch.linalg.vector_norm(value, torch.inf) for value in (grads or {}).values() if value.numel()]
    return grads if largest and bool(torch.stack(largest).isfinite().all()) else None


def _penalised(report: Report, problem: Problem, penalties: tuple, step: float) -> Report:
    """With the penalties' gradients, measurements and carried tensors, and everything counted; a free phase that failed has
    none."""
    measured, owner = dict(report.measured), dict.fromkeys(report.measured, "the estimator")
    grads: dict[str, Tensor] = {}
    kinds: Counter[str] = Counter()
    for index, penalty in enumerate(penalties if report.free.status.usable else (), 1):
        kind, own = type(penalty).__name__, f"penalty{index}."
        kinds[kind] += 1
        carried = {key.removeprefix(own): value for key, value in problem.carried.items() if key.startswith(own)}
        outcome = penalty(problem, step, carried)
        problem.carried.update({own + key: value for key, value in carried.items()})
        suffix = f".{kinds[kind]}" if kinds[kind] > 1 else ""
        for name, value in outcome.measured.items():
            if name == "penalty":
                measured["penalty"] = measured.get("penalty", 0.0) + value
                if len(penalties) > 1:
                    measured[f"penalty.{kind}{suffix}"] = value
            elif owner.setdefault(name, kind) == kind:
                measured[name + suffix] = value
            else:
                raise ValueError(f"{kind} and {owner[name]} both measure {name!r}; rename it in one of them")
        measured["force_evaluations"] += outcome.evaluations
        grads = summed(grads, outcome.grads)
    measured["force_evaluations"] += LINEARISATION * ("jacobian" in vars(problem))  # at the free state, which all share
    return replace(report, penalty_grads=grads, measured=measured)


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
