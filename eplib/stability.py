"""What E5 says of training runs: how far right the spectrum of J went, in which mode, and how many of the runs crossed zero."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .runconfig import RunConfig
from .spectra import CONVERGED
from .store import tables
from .store.runs import Run

UNCONVERGED = "Ritz values that had not converged at the right edge"


@dataclass(frozen=True)
class Mode:
    """The eigenvalue of J furthest right in a run: abscissa, its real part; frequency, its imaginary part, 0 for a real mode;
    and the update step at which it was found."""

    abscissa: float
    frequency: float
    step: int

    @property
    def crossed(self) -> bool:
        return self.abscissa > 0

    @property
    def oscillates(self) -> bool:
        """Whether it is one of a complex pair, which crosses as a Hopf bifurcation; a real one is a fold or a pitchfork."""
        return self.frequency > 0


def measured(run: Run) -> bool:
    """Whether the abscissas along a run are exact or from Ritz pairs that had converged. Runs recorded before the residual was
    logged hold Ritz values of 40 Arnoldi vectors, which may lie left of the edge, or right of it where J is far from normal."""
    residual = run.curve.get("abscissa_residual")
    return residual is not None and bool((residual <= CONVERGED)[~np.isnan(_abscissas(run))].all())


def rightmost(run: Run, since: float = 0.0) -> Mode:
    """The rightmost mode over a run's evaluations after this share of its updates: value and frequency are those of one mode;
    NaN where the phase diverged in all of them."""
    curve = run.curve
    found = np.where(curve["step"] > since * run.config.steps, _abscissas(run), np.nan)
    if np.isnan(found).all():
        return Mode(math.nan, math.nan, 0)
    at = int(np.nanargmax(found))
    return Mode(float(curve["abscissa"][at]), float(curve["frequency"][at]), int(curve["step"][at]))


def rate_step(run: Run) -> float:
    """The step s of the map I + s J whose spectral radius a run's rate_arnoldi is."""
    steps = run.curve.get("rate_step", np.array([]))
    steps = steps[~np.isnan(steps)]
    return float(steps[-1]) if len(steps) else run.config.solver.step


def over_seeds(runs: Iterable[Run], like: RunConfig) -> dict:
    """Mean over seeds of a run's largest abscissa, as results files hold it (`tables.interval`).

    Of the runs that have the setting of `like` (learning rate, width, context, number of steps); those of one seed are averaged
    first, since only seeds are draws. `undecided` where some abscissas are no measurement.
    """
    chosen = [run for run in runs if _setting(run.config) == _setting(like)]
    seeds: dict[int, list[float]] = {}
    for run in chosen:
        seeds.setdefault(run.config.seed, []).append(rightmost(run).abscissa)
    return tables.interval(map(statistics.fmean, seeds.values()), _unmeasured(chosen))


def crossing(runs: Iterable[Run]) -> dict | None:
    """The rightmost mode of some runs as results files hold it: value, frequency of the same mode, n runs, how many crossed
    zero, how many of these in a complex pair; `undecided` where some abscissas are no measurement. None without a run."""
    runs = list(runs)
    if not runs:
        return None
    modes = [rightmost(run) for run in runs]
    first = max(modes, key=lambda mode: -math.inf if math.isnan(mode.abscissa) else mode.abscissa)
    crossed = [mode for mode in modes if mode.crossed]
    why = _unmeasured(runs)
    return {"value": first.abscissa, "frequency": first.frequency, "n": len(modes), "crossed": len(crossed),
            "oscillating": sum(mode.oscillates for mode in crossed)} | ({"undecided": why} if why else {})


def listed(runs: Iterable[Run], digits: int = 3) -> str:
    """Every run's rightmost mode as a table prints it: abscissa and, of a complex pair, its frequency."""
    return ", ".join(f"{mode.abscissa:.{digits}f}" + (f" (±{mode.frequency:.2f}i)" if mode.oscillates else "")
                     for mode in map(rightmost, runs))


def _setting(config: RunConfig) -> tuple:
    shape = tuple(value for name, value in vars(config.model).items() if name != "block")
    return config.optimiser.lr, shape, config.steps


def _unmeasured(runs: Sequence[Run]) -> str | None:
    """Why the abscissas of some runs decide nothing, None where all are measurements."""
    lost = sum(bool(np.isnan(_abscissas(run)).any()) for run in runs)
    if lost:
        return f"in {lost} of {len(runs)} runs the phase diverged at an evaluation, which then has no spectrum"
    guessed = sum(not measured(run) for run in runs)
    return f"{guessed} of {len(runs)} runs hold {UNCONVERGED}" if guessed else None


def _abscissas(run: Run) -> np.ndarray:
    """One for each evaluation (n,), NaN where its phase diverged: then there is no fixed point to take it at."""
    return run.curve.get("abscissa", np.full(len(run.curve["step"]), np.nan))
