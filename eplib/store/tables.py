"""What tables and claims say of runs besides their losses: the share of samples whose phase settled, and means over seeds with
their interval.

Runs recorded before the settled share and the excursions of an evaluation were counted hold what their residuals imply of them:
a share as [least, most], no count (null) where there is an excursion.
"""

import math
from collections.abc import Callable, Iterable, Mapping

from .. import plotting
from .comparisons import compare, differences
from .runs import Run

SETTLED_NOTE = "settled: of the validation samples, in percent; where it was not measured, what their residuals imply (≥, <, ?)"
ENOUGH = 0.99  # share of the validation samples that must settle before a loss enters a difference


def without_gradient(run: Run) -> int:
    """The number of steps at which the task's gradient was not applied: gated, from a phase that diverged, or not finite."""
    return run.metrics["without_gradient"]


def evaluations_a_step(runs: Iterable[Run]) -> float | None:
    """Force evaluations of an update step, mean over runs of one arm; None where a run's are not known."""
    runs = list(runs)
    means = [spent / (run.config.steps - run.config.first) for run in runs
             if (spent := run.metrics["force_evaluations"]) is not None]
    return sum(means) / len(means) if runs and len(means) == len(runs) else None


def settled(evaluation: Mapping) -> tuple[float, float]:
    """The least and the most share (0 to 1) of an evaluation's samples that ended at or below its solver's tolerance, equal
    where it was measured."""
    share = evaluation["settled"]
    return (share, share) if isinstance(share, int | float) else (share[0], share[1])


def settled_cold(run: Run) -> tuple[float, float]:
    """`settled` of the final evaluation, whose phases start as the solver says; a network without phases has settled."""
    return (1.0, 1.0) if _explicit(run) else settled(run.metrics["final"])


def settled_as_trained(run: Run) -> tuple[float, float]:
    """`settled` of the final evaluation with the start that training predicts, unknown where it was not measured."""
    if run.config.start is None:
        return settled_cold(run)
    found = run.metrics.get("training_start")
    return settled(found) if found else (0.0, 1.0)


def evaluated_excursions(runs: Iterable[Run]) -> str | None:
    """Samples of the final evaluations of an arm whose residual is an excursion, as a table prints them; where older runs that
    had some did not count them, at least one each."""
    runs = list(runs)
    if any(map(_explicit, runs)):
        return None
    counts = [run.metrics["final"]["excursions"] for run in runs]
    return f"{'≥ ' if None in counts else ''}{sum(1 if count is None else count for count in counts)}"


def at_fixed_point(run: Run, metric: str = "loss") -> float | None:
    """The final metric at the converged fixed point; None for a network without phases, and where it is not known that enough
    samples settled: where the phases do not end there is no fixed point to speak of."""
    found = run.metrics.get("converged")
    return found[metric] if found and settled(found)[0] >= ENOUGH else None


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
    """`interval` of a final metric over an arm's seeds; that of an accuracy ends where accuracies do, at 0 and 100 %."""
    values = [run.metrics["final"][metric] for run in arms.get(arm, ())]
    found = interval([value for value in values if value is not None], _lost(values))
    if metric == "accuracy" and found["low"] is not None:
        found |= {"low": max(0.0, found["low"]), "high": min(100.0, found["high"])}
    return found


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
    return run.config.model.explicit
