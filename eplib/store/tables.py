"""What tables and claims say of runs besides their losses: steps without a task gradient, the share of samples whose phase
settled, and means over seeds with their interval.

Runs recorded before these were measured do not hold them. What their logs and metrics imply is read from there, what they do
not imply stays unknown.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np

from .. import plotting
from ..evaluation import EXCURSION
from .comparisons import compare, differences
from .records import CONVERGED
from .runs import Run

SETTLED_NOTE = "settled: of the validation samples, in percent; where it was not measured, what their residuals imply (≥, <, ?)"
ENOUGH = 0.99  # share of the validation samples that must settle before a loss enters a difference
USABLE = ("converged", "max_steps")  # a phase that ended otherwise gave no gradient


def of_today(run: Run) -> bool:
    """Whether a run counted its steps without a gradient itself: then its costs are in one unit, too."""
    return "without_gradient" in run.metrics


def audited_at_its_state(run: Run) -> bool:
    """Whether the audits of a run compare gradients at the step's own free state: older ones settled anew from the block's
    start, which ends elsewhere if the step's start was predicted."""
    return of_today(run) or run.config.start is None


def lost_steps(run: Run) -> np.ndarray:
    """Whether the task's gradient was not applied at a step (steps,): gated, from a phase that diverged, or not finite."""
    log = run.log
    if "task_gradient" in log:
        return log["task_gradient"] == 0
    return (log["gated"] > 0) | (log["skipped"] > 0) | ~np.isin(log["status"], USABLE)


def without_gradient(run: Run) -> int:
    """The number of `lost_steps`, which newer runs counted themselves."""
    return run.metrics["without_gradient"] if of_today(run) else int(lost_steps(run).sum())


def force_evaluations(run: Run) -> np.ndarray | None:
    """Force evaluations of each update step (steps,), in one unit: a backward pass counts as two of each that is in it, the
    contraction <a, dF/dtheta> as two.

    Older logs counted neither these nor the linearisation at the free state: they are added where the log says that they took
    place. An audited step, whose entry held the audit as well, counts as the one before it. None for penalties whose own count
    depends on how many samples they acted on, which the log does not say.
    """
    log, config, estimator = run.log, run.config, cast(Any, run.config.estimator)
    if of_today(run):
        return log["force_evaluations"]
    if any(penalty.kind not in ("ContractionRate", "JacobianNorm", "ResidualPenalty") or getattr(penalty, "probes", 1) > 1
           or getattr(penalty, "per", "sample") == "token" for penalty in config.penalties):
        return None
    contracted, probed = np.isin(log["status"], USABLE), np.isfinite(log["rate_probe"])
    if estimator.kind == "Backprop":
        missing = 2.0
    elif estimator.kind == "BPTT":
        missing = 2.0 * min(estimator.window or estimator.steps, estimator.steps) + probed
    else:
        nudged = log["nudged_iterations_max"] > 0  # else the free phase diverged, or there is no nudged phase
        own = 1 * nudged * (estimator.kind in ("AsymEP", "FlippedCorrection"))  # one more, for the trajectories
        linear = nudged & (estimator.kind in ("DyadicEP", "ShuffledNudge"))
        missing = own + (contracted | probed | linear) + 2 * contracted
    spent = log["force_evaluations"] + missing
    if config.audit_every:
        audited = np.arange(config.audit_every - 1, len(spent), config.audit_every)
        spent[audited] = spent[audited - 1]
    return spent


def evaluations_a_step(runs: Iterable[Run]) -> float | None:
    """Force evaluations of an update step, mean over runs of one arm; None where those of a run are not known in this unit."""
    logs = [force_evaluations(run) for run in runs]
    means = [float(spent.mean()) for spent in logs if spent is not None]
    return sum(means) / len(means) if logs and len(means) == len(logs) else None


def settled(evaluation: Mapping, tol: float) -> tuple[float, float]:
    """The least and the most share (0 to 1) of an evaluation's samples that ended at or below `tol`: equal where it was
    measured, else what the largest and the median residual imply."""
    if evaluation.get("settled") is not None:
        return evaluation["settled"], evaluation["settled"]
    median, largest = evaluation["residual_median"], evaluation["residual_max"]
    if median is None or largest is None:  # a residual was not finite
        return 0.0, 1.0
    return (1.0, 1.0) if largest <= tol else (0.0, 0.5) if median > tol else (0.5, 1.0)


def settled_cold(run: Run) -> tuple[float, float]:
    """`settled` of the final evaluation, whose phases start as the solver says; a network without phases has settled."""
    return (1.0, 1.0) if _explicit(run) else settled(run.metrics["final"], run.config.solver.tol)


def settled_as_trained(run: Run) -> tuple[float, float]:
    """`settled` of the final evaluation with the start that training predicts, unknown where it was not measured."""
    if run.config.start is None:
        return settled_cold(run)
    found = run.metrics.get("training_start")
    return settled(found, run.config.solver.tol) if found else (0.0, 1.0)


def evaluated_excursions(runs: Iterable[Run]) -> str | None:
    """Samples of the final evaluations of an arm whose residual is an excursion, as a table prints them; where older runs did
    not count them, whether there are any."""
    runs = list(runs)
    if any(map(_explicit, runs)):
        return None
    finals = [run.metrics["final"] for run in runs]
    if any("excursions" not in final and final["residual_max"] is None for final in finals):
        return "?"
    counts = [final["excursions"] if "excursions" in final else int(final["residual_max"] > EXCURSION) for final in finals]
    exact = all("excursions" in final or final["residual_max"] <= EXCURSION for final in finals)
    return f"{'' if exact else '≥ '}{sum(counts)}"


def at_fixed_point(run: Run, metric: str = "loss") -> float | None:
    """The final metric at the converged fixed point; None for a network without phases, and where it is not known that enough
    samples settled: where the phases do not end there is no fixed point to speak of."""
    found = run.metrics.get("converged")
    return found[metric] if found and settled(found, CONVERGED.tol)[0] >= ENOUGH else None


def least(shares: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Bounds on the lowest of several shares, all settled where there is none."""
    shares = list(shares)
    return min((low for low, _ in shares), default=1.0), min((high for _, high in shares), default=1.0)


def percent(share: tuple[float, float]) -> str:
    """A share between bounds in percent: "99.2", "< 50", "≥ 50" or "?"."""
    low, high = share
    if low == high:
        return f"{math.floor(1000 * low) / 10:g}"  # never rounded up to what did not settle
    if low > 0.0:
        return f"≥ {100 * low:g}"
    return "?" if high > 0.5 else f"{'<' if high == 0.5 else '≤'} {100 * high:g}"


def settled_cell(runs: Iterable[Run], of: Callable[[Run], tuple[float, float]] = settled_cold) -> str | None:
    """The lowest share over some runs of one arm as a table prints it; None for a network without phases."""
    runs = list(runs)
    return None if any(map(_explicit, runs)) else percent(least(map(of, runs)))


def interval(values: Iterable[float], undecided: str | None = None) -> dict:
    """A mean over seeds as results files hold it and `pipelines.claims` decides it: {mean, low, high, n}, the 95 % interval by
    Student's t, None where there are too few; with `undecided`, why it decides nothing."""
    found = compare(list(values))
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": found.pairs} | (
        {"undecided": undecided} if undecided else {})


def final(arms: Mapping[str, list[Run]], arm: str, metric: str = "loss") -> dict:
    """`interval` of a final metric over an arm's seeds."""
    values = [run.metrics["final"][metric] for run in arms.get(arm, ())]
    return interval([value for value in values if value is not None], _lost(values))


def paired(arms: Mapping[str, list[Run]], ours: str, theirs: str, metric: str = "loss") -> dict:
    """`interval` of the differences of a final metric, seed by seed; it decides nothing unless enough validation samples of
    both arms settled."""
    both = [run for arm in (ours, theirs) for run in arms.get(arm, ())]
    short = {arm: share for arm in (ours, theirs) if (share := least(map(settled_cold, arms.get(arm, ()))))[0] < ENOUGH}
    words = ", ".join(f"{plotting.label(arm)} {f'{shown} %' if (shown := percent(share)) != '?' else 'unknown'}"
                      for arm, share in short.items())
    return interval(differences(dict(arms), ours, theirs, metric), _lost([run.metrics["final"][metric] for run in both])
                    or (f"samples that settled: {words}" if words else None))


def _lost(values: list[float | None]) -> str | None:
    lost = sum(value is None for value in values)
    return f"{lost} of {len(values)} runs ended without a finite value" if lost else None


def _explicit(run: Run) -> bool:
    return run.config.model.block.kind == "Feedforward"
