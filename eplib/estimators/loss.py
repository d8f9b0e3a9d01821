"""The gradient of an estimator as a scalar that PyTorch differentiates: for schedulers, gradient accumulation, loss scaling,
and whatever else calls `loss.backward()`."""

from typing import Any

import torch
from torch import Tensor

from ..models import Backend, EquilibriumModel
from ..solvers import Solver
from ..starts import LinearStart
from .base import Estimator
from .calls import gradient
from .report import Report


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


def ep_loss(model: EquilibriumModel, inputs: Tensor, targets: Tensor, *, estimator: Estimator, solver: Solver,
            nudged: Solver | None = None, penalties: tuple = (), state: dict | None = None,
            start: Tensor | LinearStart | None = None, backend: Backend = "torch") -> tuple[Tensor, Report]:
    """The mean loss, a scalar whose `backward()` gives every parameter the estimator's gradient, and the report of it.

    The arguments are those of `gradient`, which is called at once: the gradient is that at the weights of the call. It is the
    sum of the task's and the penalties' (`Report.total`), times the gradient that comes in, and torch.autograd accumulates it.
    The scalar's value is the task's loss alone, comparable with and without penalties, whose values are in `report.measured`.
    The report is returned beside it, since `report.state`, for the next call, and how well the phases settled would be lost on
    an attribute of the tensor with its first operation. There is no second derivative (RuntimeError for create_graph=True), and
    under torch.no_grad none at all. Raises as `gradient` does, and `estimators.GradientError`, which holds the report, where a
    phase diverged.
    """
    report = gradient(model, inputs, targets, estimator=estimator, solver=solver, nudged=nudged, penalties=penalties,
                      state=state, start=start, backend=backend)
    total, parameters = report.total(), dict(model.named_parameters())
    return _Estimated.apply(report, list(total.values()), *(parameters[name] for name in total)), report
