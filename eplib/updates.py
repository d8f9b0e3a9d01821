"""What one update of a run makes of its gradients, and what the log says of the phases that they came from."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .estimators import Report, summed
from .log import Value
from .runconfig import Optimiser
from .solvers import Solver


def gates(report: Report, gate: float | None, second: Solver) -> tuple[bool, bool]:
    """Whether the free and the nudged phase, which `second` solved, ended too far from settled for the task's gradient to be
    applied. The nudged phase's bound is its own tolerance where that is above the gate: a phase that met its tolerance is never
    gated."""
    if gate is None:
        return False, False
    free, nudged = report.free, report.nudged
    return not free.residual.max() <= gate, nudged is not None and not nudged.residual.max() <= max(gate, second.tol)


@dataclass(frozen=True)
class Clipped:
    """The gradient of an update, {parameter name: tensor}; the norm that was held against the clip, of both gradients together
    or of the task's alone where the two are clipped apart; the penalties' norm, and the share that was left of it."""

    gradient: dict[str, Tensor]
    norm: float
    penalty_norm: float
    kept: float

    @property
    def usable(self) -> bool:
        return bool(self.gradient) and math.isfinite(self.norm) and math.isfinite(self.penalty_norm)


def clipped(task: dict[str, Tensor], penalties: dict[str, Tensor], rule: Optimiser) -> Clipped:
    """The sum of both gradients under the rule's clip (`Optimiser`)."""
    beside = _norm(penalties)
    if rule.clipping == "together":
        total = summed(task, penalties)
        norm = _norm(total)
        share = min(1.0, rule.clip / (norm + 1e-12))
        return Clipped(_scaled(total, share), norm, beside, share)
    norm = _norm(task)
    share = min(1.0, rule.clip / (norm + 1e-12))
    kept = min(1.0, (share * norm if task else rule.clip) / (beside + 1e-12))
    return Clipped(summed(_scaled(task, share), _scaled(penalties, kept)), norm, beside, kept)


def _scaled(grads: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: value * share for name, value in grads.items()}


def _norm(grads: dict[str, Tensor]) -> float:
    return torch.stack([value.norm() for value in grads.values()]).norm().item() if grads else 0.0


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the average towards the weights. A decay that is smaller at first lets it forget its start."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def phases(report: Report, solver: Solver, second: Solver) -> dict[str, Value]:
    """What the log says of a step's free phase and of its nudged one, where there is one."""
    free, nudged = report.free, report.nudged
    away = nudged.residual if nudged else torch.full((1,), torch.nan)
    return {"free_residual_median": free.residual.median().item(), "free_residual_max": free.residual.max().item(),
            "nudged_residual_median": away.median().item(), "nudged_residual_max": away.max().item(),
            "free_unsettled": (~(free.residual <= solver.tol)).double().mean().item(),
            "nudged_unsettled": (~(away <= second.tol)).double().mean().item() if nudged else math.nan,
            "iterations_mean": free.steps.double().mean().item(), "iterations_max": int(free.steps.max()),
            "nudged_iterations_max": int(nudged.steps.max()) if nudged else 0,
            "rate_tail": max(free.rate[free.rate.isfinite()].tolist(), default=math.nan),
            "fallbacks": free.fallbacks + (nudged.fallbacks if nudged else 0), "status": report.status.value}
