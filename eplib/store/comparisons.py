"""What recorded runs say of one another: the best of a grid of learning rates, differences seed by seed, equivalence."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .runs import Run


def best_of_grid(runs: list[Run]) -> dict[str, list[Run]]:
    """For each arm its runs, one per seed, at the learning rate with the lowest mean final loss; arms in the runs' order.

    A learning rate at which any seed ended without a finite loss is not chosen unless all did.
    """
    grid: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        grid.setdefault(run.config.arm, {}).setdefault(run.config.optimiser.lr, []).append(run)

    def score(chosen: list[Run]) -> float:
        losses = [run.metrics["final"]["loss"] for run in chosen]
        return math.inf if None in losses else sum(losses) / len(losses)

    return {arm: min(rates.values(), key=score) for arm, rates in grid.items()}


def excursions(runs: Iterable[Run], absent: Iterable[str] = ()) -> int | None:
    """Training steps with an excursion, over all runs. None without a run, or if there is none yet but an arm is `absent`: what
    never ran has not stayed stable."""
    found = [run.metrics["excursions"] for run in runs]
    return None if not found or (not sum(found) and list(absent)) else sum(found)


def mean_loss(arms: dict[str, list[Run]], arm: str, metric: str = "loss") -> float | None:
    """Mean of a final metric over an arm's seeds; None if the arm is missing or a run has no finite value."""
    values = [run.metrics["final"][metric] for run in arms.get(arm, ())]
    return None if not values or None in values else sum(values) / len(values)


def spread(arms: dict[str, list[Run]], arm: str, metric: str = "loss") -> float | None:
    """Standard deviation of a final metric over an arm's seeds; None below two seeds or if a run has no finite value."""
    values = [run.metrics["final"][metric] for run in arms.get(arm, ())]
    return None if len(values) < 2 or None in values else statistics.stdev(values)


def differences(arms: dict[str, list[Run]], ours: str, theirs: str, metric: str = "loss") -> list[float]:
    """Differences of a final metric, seed by seed, over the seeds that both arms have and that ended with a finite value."""
    seeds = [{run.config.seed: run.metrics["final"][metric] for run in arms.get(arm, ())} for arm in (ours, theirs)]
    return [seeds[0][seed] - seeds[1][seed] for seed in sorted(seeds[0])
            if seeds[0][seed] is not None and seeds[1].get(seed) is not None]


@dataclass(frozen=True)
class Comparison:
    """Of values over seeds, or of paired differences: how many, their mean and its 95 % interval [low, high] (Student's t),
    None where there are fewer than two."""

    pairs: int
    mean: float | None
    low: float | None = None
    high: float | None = None


def compare(values: list[float]) -> Comparison:
    """The mean of `values` with its interval."""
    from scipy import stats  # with the pipeline, not with the bare library

    if len(values) < 2:
        return Comparison(len(values), values[0] if values else None)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return Comparison(len(values), sum(values) / len(values), float(interval.low), float(interval.high))
