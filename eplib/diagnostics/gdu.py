"""Equilibrium propagation along its nudged relaxation, step by step against backpropagation through time (BPTT).

The gradient-descending updates of Ernoult et al. (2019): at the settled state z* the update of every step of the nudged phase
is BPTT's gradient through one more of its last steps. They prove it for J = J^T. For explicit Euler z <- z + s F(z) and any J,
BPTT through the last k steps, all of them at z*, contracts dF/dtheta with

    a_k = s sum_{j < k} (I + s J^T)^j g ,                                                     g = dl/dz at z*,

and a nudged phase whose linearisation is J^T, that of corrected EP, has moved by -beta a_k + O(beta^2) after k steps from z*.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..estimators import BPTT, Estimator, gradient
from ..models import Model
from ..solvers import FixedHorizon, Relaxation
from .gradients import agreement

Gradients = list[dict[str, Tensor] | None]


def nudged_sums(model: Model, inputs: Tensor, targets: Tensor, estimator: Estimator, counts: Iterable[int],
                solver: Relaxation) -> Gradients:
    """An estimator's gradient, {parameter name: tensor}, after each of `counts` steps of its nudged phase.

    solver: of the free phase; the nudged phase starts where that ended and takes its Euler step. None where it diverged.
    """
    return [gradient(model, inputs, targets, estimator=estimator, solver=solver,
                     nudged=FixedHorizon(step=solver.step, steps=count)).grads for count in counts]


def bptt_sums(model: Model, inputs: Tensor, targets: Tensor, counts: Iterable[int], solver: Relaxation) -> Gradients:
    """BPTT's gradient, {parameter name: tensor}, through each of `counts` last steps of a relaxation that had settled before.

    Raises ValueError if `solver` does not settle every sample: its last steps are not at z* then.
    """
    free = model.settle(inputs, solver)
    if (free.residual > solver.tol).any():
        raise ValueError(f"the free phase ended at a residual of {free.residual.max():.1e}, above tol = {solver.tol:g}, after "
                         f"{solver.max_steps} steps; BPTT's last steps are at the fixed point only once it has settled: allow "
                         "more")
    settled = int(free.steps.max())
    return [gradient(model, inputs, targets, estimator=BPTT(steps=settled + count, window=count), solver=solver).grads
            for count in counts]


def step_by_step(model: Model, ours: Gradients, theirs: Gradients) -> list[dict[str, float] | None]:
    """How an estimator's sums compare with BPTT's over block and embeddings, for each number of steps.

    None where ours diverged. update, update_bptt: norms of what the steps since the number before added to ours and to theirs.
    cosine and error, ||g - r|| / ||r||, of the sums. The readout's gradient ignores the adjoint state and is left out.
    """
    rows: list[dict[str, float] | None] = []
    last: list[Tensor] | None = None
    for mine, exact in zip(ours, theirs, strict=True):
        if mine is None or exact is None:
            rows.append(None)
            continue
        parts = [model.without_readout(grads) for grads in (mine, exact)]
        found = agreement(*parts)["total"]
        flat = [torch.cat([value.flatten() for value in part.values()]) for part in parts]
        added = flat if last is None else [now - then for now, then in zip(flat, last, strict=True)]
        rows.append({"update": added[0].norm().item(), "update_bptt": added[1].norm().item(), "cosine": found.cosine,
                     "error": found.error})
        last = flat
    return rows
