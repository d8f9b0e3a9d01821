"""What calls the estimators and the penalties: a gradient as a report, or as a scalar that PyTorch differentiates."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models import Backend, Model
from ..parallel import Part
from ..solvers import FixedHorizon, Solver
from ..starts import LinearStart
from .base import LINEARISATION, Estimator
from .batch import Batch
from .entry import refuse_misfits, second_phase
from .problem import Problem
from .report import Report, summed
from .whole import agreed, whole


def gradient(model: Model, inputs: Tensor, targets: Tensor, *, estimator: Estimator, solver: Solver,
             nudged: Solver | None = None, penalties: tuple = (), state: dict | None = None,
             start: Tensor | LinearStart | None = None, backend: Backend = "torch", part: Part | None = None) -> Report:
    """Gradient of the mean loss over the batch, with the sign, scale and reduction of torch.autograd.

    inputs, targets: what `model.clamp` and `model.loss` take, batch first. The nudged phase is solved by `nudged`, by default
    by `solver`, in at most the estimator's own number of steps where it has one. `start`: state from which the free phase
    starts, or how it is predicted, by default the block's. backend: "torch", or "compiled" for the kernel of `eplib.kernels`,
    which computes the phases, the products and BPTT's steps; what needs a graph is PyTorch's in either. part: which part of a
    batch that several ranks share inputs and targets are; the report is then that of the whole batch, on every rank.
    Parameters that do not require a gradient get none. `.grad` is never touched. Raises TypeError if the estimator and the
    block do not fit, ValueError if anything else does not; a diverged phase is no exception but gives `grads=None`.
    """
    second = second_phase(estimator, solver, nudged)
    refuse_misfits(model, inputs, targets, estimator, backend, penalties, start)
    part = part or Part.alone(len(inputs))
    if part.count != len(inputs):
        raise ValueError(f"inputs have {len(inputs)} samples, and the part of the batch {part.count}; give inputs[part.rows]")
    batch = Batch(model, inputs, targets, model.dynamics(backend), part, start, dict(state or {}))
    report = estimator.gradient(batch, solver, second)
    if not estimator.equilibrium:  # the kernel computes the steps alone, and keeps no linearisation that a penalty would share
        batch, report = replace(batch, dynamics=model.block), replace(report, free=agreed(report.free, part))
    return whole(_penalised(report, batch.at(report.free.value), penalties, solver.step), model, part)


def at_state(model: Model, inputs: Tensor, targets: Tensor, state: Tensor, estimator: Estimator,
             nudged: Solver | None = None, *, backend: Backend = "torch", carried: dict | None = None,
             part: Part | None = None) -> Report:
    """The estimator's gradient at a given free state (B, ...), settled or not, without a free phase of its own: `report.free`
    is that state, evaluated once.

    nudged: the solver of the estimator's second phase. carried: the state of an earlier report. part: as of `gradient`. Raises
    as `gradient` does, and TypeError for an estimator without an equilibrium.
    """
    name = type(estimator).__name__
    if not estimator.equilibrium:
        raise TypeError(f"{name} differentiates a finite number of steps; it has none at a given state")
    if estimator.second_phase and nudged is None:
        raise ValueError(f"{name} has a second phase; give nudged, the solver of it")
    return gradient(model, inputs, targets, estimator=estimator, solver=FixedHorizon(steps=0), nudged=nudged, state=carried,
                    start=state, backend=backend, part=part)


class _Estimated(torch.autograd.Function):
    """(report, its total gradient, the parameters of that) -> mean loss, whose derivative in the parameters is as given."""

    @staticmethod
    def forward(ctx: Any, report: Report, total: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*total)
        return report.free.value.new_tensor(report.loss)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True, which would take the gradient for a constant
            raise RuntimeError("the gradient of ep_loss has no derivative of its own; differentiate without create_graph=True")
        return None, None, *(incoming * value for value in ctx.saved_tensors)


def ep_loss(model: Model, inputs: Tensor, targets: Tensor, *, estimator: Estimator, solver: Solver,
            nudged: Solver | None = None, penalties: tuple = (), state: dict | None = None,
            start: Tensor | LinearStart | None = None, backend: Backend = "torch") -> tuple[Tensor, Report]:
    """The mean loss, a scalar whose `backward()` gives every parameter the estimator's gradient, and the report of it.

    The arguments are those of `gradient`, which is called at once: the gradient is that at the weights of the call, the sum of
    the task's and the penalties' (`Report.total`) times the gradient that comes in, and torch.autograd accumulates it. The
    scalar's value is the task's loss alone, comparable with and without penalties. The report is returned beside it, since an
    attribute of the tensor would be lost with its first operation. There is no second derivative (RuntimeError for
    create_graph=True), and under torch.no_grad none at all. Raises as `gradient` does, and `GradientError` where a phase
    diverged.
    """
    report = gradient(model, inputs, targets, estimator=estimator, solver=solver, nudged=nudged, penalties=penalties,
                      state=state, start=start, backend=backend)
    total, parameters = report.total(), dict(model.named_parameters())
    return _Estimated.apply(report, list(total.values()), *(parameters[name] for name in total)), report


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
    return replace(report, penalty_grads=grads, measured=measured, state=problem.carried)
