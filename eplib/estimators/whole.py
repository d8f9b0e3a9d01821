"""What the reports of a batch's parts, on several ranks, say of the whole batch."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models import Model
from ..parallel import Part
from ..solvers import Solution, worst
from .report import Report

MEANS = ("force_evaluations", "penalty")  # of what is measured, besides names that end in _mean


def agreed(phase: Solution, part: Part) -> Solution:
    """The phase with the status of the worst sample of the whole batch: all ranks go on from it, or none does."""
    return phase if part.ranks == 1 else replace(phase, status=worst(part.pooled(phase.status)))


def whole(report: Report, model: Model, part: Part) -> Report:
    """The report of the whole batch. Loss and gradients are means over it, the gradient None where one of a part is, and
    absent where all are; residuals, steps and rates are those of all samples, while states stay those of the part. What was
    measured is the largest of the parts, a penalty's value and what ends in _mean their mean, force evaluations as well, and
    rounded up once."""
    if part.ranks == 1:
        return report
    own = (part.share, report.loss, None if report.grads is None else list(report.grads), list(report.penalty_grads),
           report.measured, _ends(report.free), report.nudged and _ends(report.nudged))
    shares, losses, tasks, penalties, measured, free, nudged = map(list, zip(*part.pooled(own), strict=True))
    task = [] if None in tasks else list(dict.fromkeys(name for names in tasks for name in names))
    beside = list(dict.fromkeys(name for names in penalties for name in names))
    parameters = dict(model.named_parameters())

    def mine(grads: dict[str, Tensor] | None, names: list[str]) -> list[Tensor]:
        there = grads or {}
        return [there[name] * part.share if name in there else torch.zeros_like(parameters[name]) for name in names]

    sums = part.total(*mine(report.grads, task), *mine(report.penalty_grads, beside))
    return replace(
        report, loss=_mean(shares, losses), grads=None if None in tasks else dict(zip(task, sums, strict=False)),
        penalty_grads=dict(zip(beside, sums[len(task):], strict=True)), measured=_measured(shares, measured),
        free=_joined(report.free, shares, free), nudged=report.nudged and _joined(report.nudged, shares, nudged))


def _ends(phase: Solution) -> tuple:
    return (phase.residual.cpu(), phase.steps.cpu(), phase.rate.cpu(), phase.evaluations, phase.status, phase.fallbacks)


def _joined(phase: Solution, shares: list[float], ends: list[Any]) -> Solution:
    residuals, steps, rates, evaluations, statuses, fallbacks = zip(*ends, strict=True)
    return Solution(phase.value, torch.cat(residuals), torch.cat(steps), torch.cat(rates), _up(_mean(shares, evaluations)),
                    worst(statuses), sum(fallbacks))


def _measured(shares: list[float], parts: list[dict[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part.get(name, math.nan) for part in parts]
        if name.split(".")[0] in MEANS or name.split(".")[0].endswith("_mean"):
            found[name] = _mean(shares, values)
        else:
            found[name] = math.nan if any(math.isnan(value) for value in values) else max(values)
    return found | {"force_evaluations": _up(found["force_evaluations"])}


def _mean(shares: list[float], values: Any) -> float:
    return sum(share * value for share, value in zip(shares, values, strict=True))


def _up(count: float) -> int:
    return math.ceil(count - 1e-9)
