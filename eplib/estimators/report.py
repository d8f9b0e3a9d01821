"""What a gradient is reported as."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..models import Model
from ..solvers import Solution, Status, worst


class GradientError(RuntimeError):
    """A gradient was asked of a report, `report`, that has none: the message names what failed."""

    def __init__(self, report: "Report", said: str):
        super().__init__(said)
        self.report = report


@dataclass(frozen=True)
class Report:
    """What `gradient` returns.

    loss: mean loss at the free state, in nats. grads: {parameter name: tensor}, the gradient of the mean loss, or None where
    something failed. free, nudged: Solutions (nudged is None for estimators without a second phase; its residual is relative
    to the nudge). measured: named scalars: `force_evaluations` (in the unit of `estimators.FORCE`), `displacement`, and what
    the penalties saw: the sum of their values as `penalty`, each one's own as "penalty.<its class>" where there are several;
    all names of the second, third .. of a class end in ".2", ".3". adjoint: the adjoint state (B, ...), or None. state: what
    the next call is to be given, where "penalty<i>." leads what the i-th penalty carries. penalty_grads: gradient of all
    penalties together, apart.
    """

    loss: float
    grads: dict[str, Tensor] | None
    free: Solution
    nudged: Solution | None
    measured: dict[str, float]
    adjoint: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)
    penalty_grads: dict[str, Tensor] = field(default_factory=dict)

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
        return Status.NONFINITE if self.failed == "gradient" else worst(phases)

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
        if total and finite(total) is None:
            raise GradientError(self, "the gradient of the penalties is not finite; lower their strength or leave the step out")
        return total

    def assign(self, model: Model, *, task: bool = True) -> None:
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


def summed(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of gradients, {parameter name: tensor}; of a name that is in one of them alone, its own tensor."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def finite(grads: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The gradient, None if anything in it is not finite; by the largest entries, which need no copy of the gradient."""
    largest = [torch.linalg.vector_norm(value, torch.inf) for value in (grads or {}).values() if value.numel()]
    return grads if largest and bool(torch.stack(largest).isfinite().all()) else None
