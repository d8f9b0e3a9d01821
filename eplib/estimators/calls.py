"""One gradient for each parameter: what calls the estimators and the penalties."""

from collections import Counter
from dataclasses import replace

from torch import Tensor

from ..models import Backend, EquilibriumModel
from ..solvers import FixedHorizon, Solver
from ..starts import LinearStart
from .base import LINEARISATION, Estimator
from .batch import Batch
from .entry import check, second_phase
from .problem import Problem
from .report import Report, summed


def gradient(model: EquilibriumModel, inputs: Tensor, targets: Tensor, *, estimator: Estimator, solver: Solver,
             nudged: Solver | None = None, penalties: tuple = (), state: dict | None = None,
             start: Tensor | LinearStart | None = None, backend: Backend = "torch") -> Report:
    """Gradient of the mean loss over the batch, with the sign, scale and reduction of torch.autograd.

    inputs, targets: what `model.clamp` and `model.loss` take, batch first. The nudged phase is solved by `nudged`, by default
    by `solver`, in at most the estimator's own number of steps where it has one. `start`: state from which the free phase
    starts, or how it is predicted, by default the block's. backend: "torch", or "compiled" for the kernel of `eplib.kernels`,
    which computes the phases, the products and BPTT's steps; what needs a graph is PyTorch's in either. Parameters that do not
    require a gradient get none. `.grad` is never touched. Raises TypeError if the estimator and the block do not fit,
    ValueError if anything else does not; a diverged phase is no exception but gives `grads=None`.
    """
    second = second_phase(estimator, solver, nudged)
    check(model, inputs, targets, estimator, backend, penalties, start)
    batch = Batch(model, inputs, targets, model.dynamics(backend), start, dict(state or {}))
    report = estimator.gradient(batch, solver, second)
    if not estimator.equilibrium:  # the kernel computes the steps alone, and keeps no linearisation that a penalty would share
        batch = replace(batch, dynamics=model.block)
    return _penalised(report, batch.at(report.free.value), penalties, solver.step)


def at_state(model: EquilibriumModel, inputs: Tensor, targets: Tensor, state: Tensor, estimator: Estimator,
             nudged: Solver | None = None, *, backend: Backend = "torch", carried: dict | None = None) -> Report:
    """The estimator's gradient at a given free state (B, ...), settled or not, without a free phase of its own: `report.free`
    is that state, evaluated once.

    nudged: the solver of the estimator's second phase. carried: the state of an earlier report. Raises as `gradient` does, and
    TypeError for an estimator without an equilibrium.
    """
    name = type(estimator).__name__
    if not estimator.equilibrium:
        raise TypeError(f"{name} differentiates a finite number of steps; it has none at a given state")
    if estimator.second_phase and nudged is None:
        raise ValueError(f"{name} has a second phase; give nudged, the solver of it")
    return gradient(model, inputs, targets, estimator=estimator, solver=FixedHorizon(steps=0), nudged=nudged, state=carried,
                    start=state, backend=backend)


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
