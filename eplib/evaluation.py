"""What a run's weights are worth on the validation split, and where the spectrum at their fixed point ends."""

from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor, nn

from . import spectra
from .controllers import ContractionRate
from .estimators import Problem
from .models import Backend, Model
from .parallel import ALONE, Part
from .solvers import Relaxation, Solver
from .tasks import Dataset

EXCURSION = 1e-1  # free residual above which a sample, and a step by the largest of its batch, counts as an excursion
# Sequences of the first training batch at whose fixed point an evaluation takes the spectrum. One costs as much as 3 training
# steps at C=64 T=64 B=16, as 5 at C=128 T=128: 1 % of a run that is evaluated every 500 steps, 5 % of one every 50 or 100.
SEQUENCES = 1
TAIL = 64  # steps of plain relaxation at an evaluation, at most, the last of which gives `rate_tail`


def moved(model: nn.Module, a: Tensor) -> Tensor:
    """A tensor where the model's weights are."""
    return a.to(next(model.parameters()).device)


@torch.no_grad()
def evaluate(model: Model, task: Dataset, solver: Solver, batches: int | None = None, backend: Backend = "torch",
             start: Callable[[Tensor], Tensor | None] | None = None, part: Part = ALONE) -> dict:
    """Loss (nats) and accuracy (percent) over the targets that count of the validation split or its first `batches` batches;
    of the free phase residual and steps, `settled`, the share of samples that ended at or below the solver's tolerance, and
    `excursions`, the number of those above `EXCURSION`.

    start: predicts the start state from the clamp x (None: the block's own, as without it). A sample whose phase diverged
    counts with the state it was left in. part: of a run on several ranks, which take the batches in turn; the result is the
    same on each.
    """
    rows, dynamics = [], model.dynamics(backend)
    for count, (inputs, targets) in enumerate(task.validation()):
        if count == batches:
            break
        if count % part.ranks != part.rank:
            continue
        inputs, targets = moved(model, inputs), moved(model, targets)
        x = model.clamp(inputs)
        solution = solver.settle(dynamics, x, start(x) if start else None)
        predictions, counted = model.predict(model.block.output(solution.value)), model.counted(targets)
        rows.append((count, model.loss_of(predictions, targets)[counted > 0].cpu(), int(counted.sum()),
                     int(model.correct(predictions, targets).sum()), solution.residual.cpu(), solution.steps.cpu()))
    everything = sorted((row for found in part.pooled(rows) for row in found), key=itemgetter(0))
    _, losses, totals, right, residuals, steps = zip(*everything, strict=True)
    residual = torch.cat(residuals)
    return {"loss": torch.cat(losses).double().mean().item(), "accuracy": 100 * sum(right) / sum(totals),
            "residual_median": residual.median().item(), "residual_max": residual.max().item(),
            "settled": (residual <= solver.tol).double().mean().item(),
            "excursions": int((~(residual <= EXCURSION)).sum()), "iterations": torch.cat(steps).double().mean().item()}


def edges(model: Model, inputs: Tensor, solver: Solver, penalties: tuple = ()) -> dict[str, float]:
    """The spectrum's ends (`spectra.edges`) and the numerical abscissa at the states in which the first `SEQUENCES` of inputs
    end, `edges_residual` being the largest residual there, and the rate at which plain relaxation at the solver's step ends;
    nothing where the free phase diverges or is none.

    Of the first ContractionRate among the penalties what it sees there, `rate_seen`, and the spectral radius `rate_held` of
    I + held_step J that it is to see.
    """
    if model.block.explicit:
        return {}
    inputs, step = moved(model, inputs[:SEQUENCES]), solver.step
    solution = model.settle(inputs, solver)
    if not solution.status.usable:
        return {}
    with torch.no_grad():
        z, x = solution.value, model.clamp(inputs)
        jacobian = model.block.linearise(z, x)
    relaxed = model.settle(inputs, Relaxation(step=step, max_steps=TAIL, tol=1e-5))
    held = next((one for one in penalties if isinstance(one, ContractionRate)), None)
    seen = {} if held is None else {
        "rate_seen": held.rates(Problem(model, inputs, inputs, x, z), step).max().item(), "held_step": held.step or step}
    return spectra.edges(model.block, z, x, step, seen.get("held_step")) | seen | {
        "edges_residual": solution.residual.max().item(),
        "numerical_abscissa": spectra.numerical_abscissa(jacobian, z).max().item(), "rate_tail": relaxed.rate.max().item()}
