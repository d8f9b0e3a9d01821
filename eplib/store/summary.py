"""What is kept of a finished run: metrics over its steps and on the validation split, and its log in windows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy
from numpy import ndarray
from torch import Tensor

from ..log import Log, Progress
from ..solvers import Anderson, FixedHorizon, Solver
from ..training import EXCURSION, RunConfig, Trainer, evaluate

WINDOWS = 500  # of a recorded log, about
CONVERGED = {"tol": 1e-4, "max_steps": 200}  # of the training solver: "at the converged fixed point"


def windows(rows: Log) -> list[dict[str, float]]:
    """A log as results travel: about `WINDOWS` windows of equally many steps, single steps where there are not many more.

    `step` is a window's last. A column whose name ends with _max has the largest value, one of counts (ints) the sum, one of
    words such as status a column for each word with its count, any other the mean of what is finite, NaN where nothing is.
    `loss_last` is the loss of the last step itself: two runs of one seed can be compared step by step there.
    """
    starts = numpy.arange(0, len(rows), max(1, round(len(rows) / WINDOWS)))
    last = [*starts[1:] - 1, -1]
    found: dict[str, ndarray] = {}
    for name in rows.columns if len(rows) else ():
        values = rows.column(name)
        if name == "step":
            found[name] = values[last]
        elif name in rows.words:
            found |= {f"{name}_{word}": numpy.add.reduceat((values == place).astype(float), starts)
                      for place, word in enumerate(rows.words[name])}
        elif name.endswith("_max"):
            found[name] = numpy.fmax.reduceat(values, starts)
        else:
            there = numpy.isfinite(values)
            total, count = (numpy.add.reduceat(each, starts) for each in (numpy.where(there, values, 0), there.astype(float)))
            if name not in rows.whole:
                total /= numpy.maximum(count, 1)
            found[name] = numpy.where(count > 0, total, math.nan)
        if name == "loss":
            found["loss_last"] = values[last]
    return [dict(zip(found, row, strict=True)) for row in zip(*(column.tolist() for column in found.values()), strict=True)]


def evaluations(progress: Progress) -> tuple[list[dict], list[dict]]:
    """The curve, with the force evaluations that updates had spent up to each evaluation, and the seconds up to each, apart."""
    spent, seconds = numpy.cumsum(progress.rows.column("force_evaluations")), numpy.cumsum(progress.seconds)
    at = progress.curve.column("step").astype(int)
    rows = numpy.searchsorted(progress.rows.column("step"), at)
    curve = [row | {"force_evaluations": float(spent[index])} for row, index in zip(progress.curve, rows, strict=True)]
    return curve, [{"step": int(step), "seconds": float(seconds[index])} for step, index in zip(at, rows, strict=True)]


def over_training(columns: Mapping[str, ndarray], config: RunConfig) -> dict:
    """What tables say of the steps of training that no window of them holds, from the columns of the whole log (steps,): the
    mean loss since the last evaluation but one, the median displacement; and over the second half the mean loss, the shares of
    steps without a task gradient and with a penalty above zero, and medians (gradient norms of unpenalised steps apart)."""
    half = {name: column[len(column) // 2:] for name, column in columns.items() if column.dtype.kind != "U"}
    penalised = half["penalty"] > 0
    return {"loss": _finite(numpy.mean, columns["loss"][-config.evaluate_every:]),
            "displacement": _finite(numpy.median, columns["displacement"]),
            "second_half": {
                "loss": _finite(numpy.mean, half["loss"]), "without_gradient": float((half["task_gradient"] == 0).mean()),
                "penalised": float(penalised.mean()), "rate_probe": _finite(numpy.median, half["rate_probe"]),
                "free_residual_max": _finite(numpy.median, half["free_residual_max"]),
                "gradient_norm_penalised": _finite(numpy.median, half["gradient_norm"][penalised]),
                "gradient_norm_others": _finite(numpy.median, half["gradient_norm"][~penalised])}}


def _finite(of: Callable, values: ndarray) -> float | None:
    values = values[numpy.isfinite(values)]
    return float(of(values)) if len(values) else None


def summarise(trainer: Trainer, progress: Progress) -> dict:
    """The metrics of a finished run: counts over its steps; on the whole validation split what `evaluate` says with the
    training solver, from the training's predicted start where it has one, and at the converged fixed point; and the loss of the
    start state, the solver removed."""
    config, model, rows = trainer.config, trainer.average, progress.rows

    def evaluated(solver: Solver, start: Callable[[Tensor], Tensor | None] | None = None) -> dict:
        return evaluate(model, trainer.task, solver, backend=trainer.backend, start=start, part=trainer.part)

    first = config.first + 1
    above = ~(rows.column("free_residual_max") <= EXCURSION)
    best = min(progress.curve, key=lambda row: row["loss"] if math.isfinite(float(row["loss"])) else math.inf)
    rate = progress.curve.column("rate_arnoldi")[-1]  # of the last weights: none where their phase diverged
    counts = {name: int(rows.column(name).sum())
              for name in ("gated", "gated_nudged", "skipped", "force_evaluations", "audit_evaluations")}
    metrics = {"final": evaluated(config.solver), "best_loss": best["loss"], "best_step": best["step"],
               "excursions": int(above.sum()), "first_excursion": first + int(above.argmax()) if above.any() else None,
               "without_gradient": len(rows) - int(rows.column("task_gradient").sum())} | counts | {
               "rate_arnoldi": None if math.isnan(rate) else float(rate),
               "rate_step": None if math.isnan(rate) else config.solver.step,
               "parameters": sum(p.numel() for p in model.parameters()),
               "training": over_training({name: rows.column(name) for name in rows.columns}, config),
               "baselines": trainer.task.baselines()}
    if config.start:
        metrics["training_start"] = evaluated(config.solver, trainer.predicted_start)
    if not model.block.explicit:
        solver: Any = config.solver
        if not CONVERGED.keys() <= {field.name for field in fields(solver)}:  # it takes a fixed number of steps
            solver = Anderson(step=solver.step)
        metrics["converged"] = evaluated(replace(solver, **CONVERGED))
        metrics["solver_removed"] = evaluated(FixedHorizon(steps=0))["loss"]
    return metrics
