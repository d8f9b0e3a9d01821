"""E4: what the campaign asks of kept weights, gradient by gradient. The tables of its runs and the summary are in
`campaign_tables`."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor

from .. import spectra
from ..blocks import Jacobian
from ..diagnostics import agreement, attention_distance, fingerprint, triangulation
from ..estimators import BPTT, AsymEP, DyadicEP, Estimator, HolomorphicEP, Report, Tracking, gradient
from ..kernels import available
from ..models import Backend, Model
from ..solvers import Anderson, FixedHorizon, Homotopy, Relaxation, Snapshot, Solver
from ..store.runs import Run

Batch = tuple[Tensor, Tensor]
FRESH = 10_000  # number of the first batch that gradients are compared on: another draw of the training text than the run's
STEP = 0.25  # of plain relaxation and of BPTT: the map whose rate is held
HORIZONS = (80, 160)  # steps of BPTT: 20 and 40 units of time
PLAIN = Relaxation(step=STEP, max_steps=HORIZONS[1], tol=1e-5)
SETTLE, ANSWER = Anderson(step=0.5, max_steps=200, tol=1e-5), Anderson(step=0.5, max_steps=200, tol=1e-3)
UNSETTLED = 1e-2  # free residual of a batch above which a loss at the fixed point is none
RADIUS = 0.02  # of the reference's nudge


class Found(NamedTuple):
    """Gradients of one rule on several batches, flat, of block and embeddings; None where a phase diverged; and the reports."""

    vectors: list[Tensor | None]
    reports: list[Report]


def kept(run: Run) -> list[int]:
    """The steps of which a run's weights are here."""
    return [step for step in (*run.config.keep, run.config.steps) if run.has_weights(step)]


def batches(run: Run, count: int, sequences: int) -> list[Batch]:
    """Batches of the training text drawn apart from the run's, of so many sequences each."""
    task = run.task()
    return [(inputs[:sequences], targets[:sequences]) for inputs, targets in (task.batch(FRESH + k) for k in range(count))]


def held_out(run: Run, sequences: int) -> Batch:
    """The first validation sequences, at most so many of the first batch."""
    inputs, targets = next(iter(run.task().validation()))
    return inputs[:sequences], targets[:sequences]


def loss_near(run: Run, step: int) -> float:
    """The validation loss of the evaluation nearest to a step."""
    return float(run.curve["loss"][abs(run.curve["step"] - step).argmin()])


def backend_of(run: Run, estimator: Estimator) -> Backend:
    """What computes an estimator's phases on the run's block fastest."""
    return "compiled" if available() and estimator.compiled and run.config.model.in_kernel else "torch"


def taken(run: Run, step: int | None, some: Iterable[Batch], estimator: Estimator, solver: Solver = SETTLE,
          nudged: Solver | None = ANSWER) -> Found:
    """Gradients at a run's weights after so many steps (its last by default)."""
    model, second = run.model(step), nudged if estimator.second_phase else None
    reports = [gradient(model, *batch, estimator=estimator, solver=PLAIN if isinstance(estimator, BPTT) else solver,
                        nudged=second, backend=backend_of(run, estimator)) for batch in some]
    return Found([_flat(model, report) for report in reports], reports)


def _flat(model: Model, report: Report) -> Tensor | None:
    if report.grads is None:
        return None
    return torch.cat([g.flatten().double() for g in model.without_readout(report.grads).values()])


def cosine(a: Tensor | None, b: Tensor | None) -> float:
    """NaN without one of the two."""
    return math.nan if a is None or b is None else (a @ b / (a.norm() * b.norm())).item()


def own(run: Run) -> tuple[Estimator, Solver, Solver | None]:
    """The rule by which a run learned and its solvers."""
    return run.config.estimator, run.config.solver, run.config.nudged


def triangulated(run: Run, some: list[Batch]) -> list[tuple[int, dict[str, float]]]:
    """X1: at each of the kept weights the run's own rule against BPTT at both horizons (`diagnostics.triangulation`)."""
    estimator, solver, nudged = own(run)
    return [(step, triangulation(run.model(step), some, estimator, HORIZONS, solver, nudged, PLAIN, backend_of(run, estimator)))
            for step in kept(run)]


def one_step(run: Run, step: int | None, batch: Batch, rates: Iterable[float]) -> dict[str, list[float | None]]:
    """X2: by how much the loss of the batch that a gradient was taken on changes in one plain step along it, at each rate, for
    BPTT, the run's rule, and that with its penalties as they begin; None where the moved weights have no settled state."""
    model, (estimator, solver, nudged) = run.model(step), own(run)
    found = {"BPTT": gradient(model, *batch, estimator=BPTT(steps=HORIZONS[1]), solver=PLAIN).grads}
    report = gradient(model, *batch, estimator=estimator, solver=solver, nudged=nudged, penalties=run.config.penalties)
    found["EP"] = report.grads
    if report.grads and report.penalty_grads:
        found["EP and penalty"] = report.total()
    before = loss_at(model, batch)
    return {name: [_change(model, grads, rate, batch, before) for rate in rates] for name, grads in found.items() if grads}


def _change(model: Model, grads: dict[str, Tensor], rate: float, batch: Batch, before: float | None) -> float | None:
    moved = deepcopy(model)
    with torch.no_grad():
        for name, value in moved.named_parameters():
            if name in grads:
                value.sub_(grads[name], alpha=rate)
    after = loss_at(moved, batch)
    return None if before is None or after is None else after - before


@torch.no_grad()
def loss_at(model: Model, batch: Batch) -> float | None:
    """The mean loss of a batch at its fixed point; None where the phase does not settle."""
    solution = model.settle(batch[0], SETTLE)
    if not (solution.residual.max() <= UNSETTLED):
        return None
    return model.loss(model.block.output(solution.value), batch[1]).mean().item()


def candidates() -> dict[str, tuple[Estimator, Solver]]:
    """X8: estimators and what solves their nudged phase: points on the circle, its radius, nudged steps, where J is taken.
    Eight units of time are the reference's 80 steps of 0.1."""
    return {
        "frozen, r = 0.02, N = 2": (AsymEP(beta=RADIUS), ANSWER),
        "frozen, r = 0.02, N = 4": (HolomorphicEP(beta=RADIUS, points=4), ANSWER),
        "frozen, r = 0.02, N = 8": (HolomorphicEP(beta=RADIUS, points=8), ANSWER),
        "frozen, r = 0.05": (AsymEP(beta=0.05), ANSWER), "frozen, r = 0.2": (AsymEP(beta=0.2), ANSWER),
        "frozen, 2 units of time": (AsymEP(beta=RADIUS), FixedHorizon(step=STEP, steps=8)),
        "frozen, 8 units of time": (AsymEP(beta=RADIUS), FixedHorizon(step=STEP, steps=32)),
        "frozen, snapshot of 8 units": (AsymEP(beta=RADIUS), Snapshot(step=STEP, max_steps=32)),
        "tracking, r = 0.02": (Tracking(beta=RADIUS), ANSWER), "tracking, r = 0.2": (Tracking(beta=0.2), ANSWER),
        "tracking, snapshot of 8 units": (Tracking(beta=RADIUS), Snapshot(step=STEP, max_steps=32)),
        "linear response": (DyadicEP(), ANSWER)}


def against(found: Found, exact: Found) -> list[float]:
    """Of some gradients the mean cosine with others on the same batches, the norm ratio, their cosine from batch to batch, and
    of the phases the largest displacement and the largest nudged residual."""
    pairs = list(zip(found.vectors, exact.vectors, strict=True))
    ratios = [(a.norm() / b.norm()).item() if a is not None and b is not None else math.nan for a, b in pairs]
    second = [report.nudged.residual.max().item() for report in found.reports if report.nudged]
    return [statistics.fmean(cosine(*pair) for pair in pairs), statistics.fmean(ratios),
            statistics.fmean(cosine(*pair) for pair in itertools.pairwise(found.vectors)),
            max(report.measured.get("displacement", math.nan) for report in found.reports), max(second, default=math.nan)]


def averaged(found: Found, exact: Found, counts: Iterable[int]) -> list[tuple[int, float, float]]:
    """X9: for each number of batches the cosine of the mean gradient with the mean of the exact ones, and that of one mean with
    the next; over all disjoint groups of so many batches, NaN for a cosine of which there is no pair."""
    rows = []
    for count in counts:
        ours, theirs = ([_mean(side[at:at + count]) for at in range(0, len(side) - count + 1, count)]
                        for side in (found.vectors, exact.vectors))
        mine = [cosine(*pair) for pair in zip(ours, theirs, strict=True)]
        own = [cosine(*pair) for pair in itertools.pairwise(ours)]
        rows.append((count, statistics.fmean(mine), statistics.fmean(own) if own else math.nan))
    return rows


def _mean(some: Sequence[Tensor | None]) -> Tensor | None:
    there = [one for one in some if one is not None]
    return torch.stack(there).mean(0) if len(there) == len(some) else None


def share_of_bias(found: Found, exact: Found) -> float:
    """X9: the share of the mean square of the error e that is the square of its mean, without the part that n draws have of it
    by chance, (|sum e|^2 - sum |e|^2) / ((n - 1) sum |e|^2): 0 for noise alone, 1 for a bias alone."""
    pairs = [(a, b) for a, b in zip(found.vectors, exact.vectors, strict=True) if a is not None and b is not None]
    errors = torch.stack([a - b for a, b in pairs])
    each = errors.square().sum()
    return ((errors.sum(0).square().sum() - each) / ((len(errors) - 1) * each)).item()


def by_group(run: Run, step: int | None, batch: Batch) -> dict[str, float]:
    """X10: the cosine of the run's own rule with BPTT in every parameter group."""
    estimator, solver, nudged = own(run)
    ours, exact = (taken(run, step, [batch], kind, solver, nudged).reports[0] for kind in (estimator, BPTT(steps=HORIZONS[1])))
    if ours.grads is None or exact.grads is None:
        return {}
    return {group: one.cosine for group, one in agreement(ours.grads, exact.grads).items()}


@torch.no_grad()
def mixing(run: Run, step: int | None, batch: Batch) -> dict[str, Tensor | float]:
    """X7: the loss at each position (T,) and, of an equilibrium block, the effective attention distance in tokens and the
    spectral radius of I + STEP J over the batch's first two sequences."""
    model, (inputs, targets) = run.model(step), batch
    z, x = model.settle(inputs, SETTLE).value, model.clamp(inputs)
    logits = model.predict(model.block.output(z))
    found: dict[str, Tensor | float] = {"loss": torch.nn.functional.cross_entropy(
        logits.mT, targets, reduction="none").mean(0), "distance": math.nan, "rate": math.nan}
    if not model.block.explicit:
        jacobian = model.block.linearise(z, x)
        if isinstance(jacobian, Jacobian):
            found["distance"] = attention_distance(jacobian).mean().item()
        found["rate"] = spectra.edges(model.block, z[:2], x[:2], STEP)["rate_arnoldi"]
    return found


def quarters(loss: Tensor) -> list[float]:
    """The mean loss over each quarter of the positions, of (T,)."""
    return [part.mean().item() for part in loss.tensor_split(4)]


def fingerprints(run: Run, batch: Batch) -> list[tuple[int, dict[str, float]]]:
    """F11: at each of the kept weights the fingerprint, and the finite-time Lyapunov exponent of the way to the fixed point."""
    inputs = batch[0]
    rows = []
    for step in kept(run):
        model = run.model(step)
        with torch.no_grad():
            exponent = spectra.lyapunov(model.block, model.clamp(inputs), STEP, HORIZONS[0]).max().item()
        rows.append((step, fingerprint(model, *batch, SETTLE, STEP) | {"lyapunov": exponent}))
    return rows


@torch.no_grad()
def solved(model: Model, inputs: Tensor, tol: float = 1e-4, most: int = 64) -> dict[str, tuple[float, float, float]]:
    """For each solver the share of sequences that it settles from the clamp, its force evaluations and the median residual; the
    last is Anderson's method, and from the clamp again by homotopy where that did not settle."""
    solvers: dict[str, Solver] = {
        "Relaxation": Relaxation(step=0.5, max_steps=most, tol=tol), "Anderson": Anderson(step=0.5, max_steps=most, tol=tol),
        "Homotopy": Homotopy(step=0.5, max_steps=most, tol=tol)}
    x, found = model.clamp(inputs), {}
    ends: dict[str, Tensor] = {}
    for name, solver in solvers.items():
        solution = solver.settle(model.block, x)
        ends[name] = solution.residual
        found[name] = _settled(solution.residual, tol, solution.evaluations)
    stalled = ~(ends["Anderson"] <= tol)
    residual = torch.where(stalled, torch.fmin(ends["Anderson"], ends["Homotopy"]), ends["Anderson"])
    spent = found["Anderson"][1] + (found["Homotopy"][1] * stalled.double().mean().item() if stalled.any() else 0)
    found["Anderson, then Homotopy"] = _settled(residual, tol, spent)
    return found


def _settled(residual: Tensor, tol: float, spent: float) -> tuple[float, float, float]:
    return (residual <= tol).double().mean().item(), spent, residual.median().item()
