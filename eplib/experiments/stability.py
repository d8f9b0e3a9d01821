"""What E5 says of training runs: how far right the spectrum of J went, in which mode, and how many of the runs crossed zero."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import plotting
from ..evaluation import EXCURSION
from ..runconfig import RunConfig
from ..spectra import CONVERGED
from ..store import tables
from ..store.comparisons import best_of_grid, differences, excursions
from ..store.runs import Run
from . import words

CONTROLLED = "rate_pair"
NAMES = {"uncontrolled": "uncontrolled", "controlled": CONTROLLED, "leading": "leading"}  # in the summary -> arm
RESIDUAL_SHOWN = 1e-2
STRENGTHS = ["controller", "strength", "recorded", "validation loss", "settled (%)", "excursions", "without gradient",
             "largest abscissa", "evaluations per step"]
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


def crossing(runs: Iterable[Run], since: float = 0.0) -> dict | None:
    """The rightmost mode of some runs after this share of their updates, as results files hold it: value and frequency of the
    same mode (None where every phase diverged), n runs, how many crossed zero, how many of these in a complex pair; `undecided`
    where some abscissas are no measurement. None without a run."""
    runs = list(runs)
    if not runs:
        return None
    modes = [rightmost(run, since) for run in runs]
    first = max(modes, key=lambda mode: -math.inf if math.isnan(mode.abscissa) else mode.abscissa)
    crossed = [mode for mode in modes if mode.crossed]
    why = _unmeasured(runs)
    known = not math.isnan(first.abscissa)
    return {"value": first.abscissa if known else None, "frequency": first.frequency if known else None, "n": len(modes),
            "crossed": len(crossed), "oscillating": sum(mode.oscillates for mode in crossed)} | (
                {"undecided": why} if why else {})


def largest_rate(runs: Iterable[Run]) -> float | None:
    """The largest spectral radius of some runs' maps at their last weights; None where every phase diverged there."""
    return max((rate for run in runs if (rate := run.metrics["rate_arnoldi"]) is not None), default=None)


def listed(runs: Iterable[Run], digits: int = 3) -> str:
    """Every run's rightmost mode as a table prints it: abscissa and, of a complex pair, its frequency."""
    return ", ".join(f"{mode.abscissa:.{digits}f}" + (f" (±{mode.frequency:.2f}i)" if mode.oscillates else "")
                     for mode in map(rightmost, runs))


def at_step(runs: Iterable[Run]) -> str:
    """The step of the rates of some runs, as a column or an axis prints it."""
    return " / ".join(f"{step:g}" for step in sorted({rate_step(run) for run in runs}))


def standard_error(values: Iterable[float | None]) -> float | None:
    """Of the mean of those values that are finite; None for fewer than two."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None


def strengths(planned: Iterable[RunConfig], runs: Sequence[Run]) -> list[list]:
    """A row of `STRENGTHS` for each planned run of seed 0 under one penalty of a controller that has several strengths, by
    controller and strength; a run that is not recorded has no numbers."""

    def strength(config: Any) -> Any:
        return getattr(config.penalties[0], "strength", None)

    single = [config for config in planned if config.seed == 0 and len(config.penalties) == 1]
    tried = {(config.arm, strength(config)) for config in single}
    found = []
    for config in single:
        if sum(arm == config.arm for arm, _ in tried) > 1:
            run = next((run for run in runs if run.config == config), None)
            cells = [None] * 6 if run is None else [
                run.metrics["final"]["loss"], tables.settled_cell([run]), run.metrics["excursions"],
                tables.without_gradient(run), rightmost(run).abscissa, tables.evaluations_a_step([run])]
            found.append([plotting.label(config.arm), strength(config), run is not None, *cells])
    return sorted(found, key=lambda row: row[:2])


@dataclass(frozen=True)
class Groups:
    """The runs of E5: from scratch at equal budget, with one factor changed, and on the grid of the gap; those of E3; and those
    of the controllers at other strengths."""

    stability: list[Run]
    robustness: list[Run]
    tuning: list[Run]
    language: list[Run]
    strengths: list[Run] = field(default_factory=list)

    @property
    def arms(self) -> dict[str, list[Run]]:
        return best_of_grid(self.stability)

    @property
    def rivals(self) -> list[Run]:
        """Backprop and the controlled arm on one grid of learning rates."""
        return [run for run in self.tuning or self.stability if run.config.arm in ("backprop", CONTROLLED)]

    @property
    def tuned(self) -> dict[str, list[Run]]:
        """The rivals at the best of the learning rates at which no run has an excursion."""
        lost = {(run.config.arm, run.config.optimiser.lr) for run in self.rivals if run.metrics["excursions"]}
        return best_of_grid([run for run in self.rivals if (run.config.arm, run.config.optimiser.lr) not in lost])

    def appearances(self, arm: str) -> dict[str, list[Run]]:
        """The arm's runs by group, and those of E3 whose dynamics are held in the very same way."""
        groups = {"stability": self.stability, "robustness": self.robustness, "tuning": self.tuning}
        mine = {name: [run for run in some if run.config.arm == arm] for name, some in groups.items()}
        ways = [_held_by(run.config) for run in mine["stability"] if run.config.penalties]
        return mine | {"shakespeare": [run for run in self.language if _held_by(run.config) in ways]}

    def everywhere(self, arm: str) -> list[Run]:
        return [run for some in self.appearances(arm).values() for run in some]


def summary(groups: Groups, like: RunConfig) -> dict[str, Any]:
    """What the paper's text and claims read; `like` has the setting whose seeds the crossing is asked of."""
    return {**_spectra(groups, like), **_losses(groups), **_shares(groups)}


def reading(found: dict[str, Any]) -> list[str]:
    """What a summary says, in sentences."""
    said = []
    for name in NAMES:
        if one := found[f"{name}_crossing"]:
            said.append(f"{name}: {one['crossed']} of {one['n']} runs above zero, {one['oscillating']} of these in a complex "
                        f"pair; furthest right {one['value']:.3f} at frequency {one['frequency']:.2f}"
                        + (f"; not decided: {one['undecided']}." if "undecided" in one else "."))
    said += [words.difference(name, found[key], "nats", 4) for key, name in (
        ("pair_minus_one", "Rate on a plane minus on one vector"), ("pair_minus_norm", "Rate on a plane minus Jacobian norm"),
        ("leading_minus_pair", "Leading mode minus rate on a plane"), ("damped_minus_not", "Rate on a plane, damped minus not"),
        ("ep_minus_bp", "EP held on a plane minus backprop, each at its best learning rate"))]
    return [*said, words.count(found["excursions_rate"], found["steps_rate"],
                               "Steps with an excursion, rate or leading mode held"),
            words.count(found["lost_controlled"], found["steps_controlled"], "Steps without a gradient, rate held on a plane"),
            *(f"Runs with an excursion under one changed factor, {name}: {100 * share:.0f} %." for name in NAMES
              if (share := found[f"share_{name}"]) is not None)]


def _spectra(groups: Groups, like: RunConfig) -> dict[str, Any]:
    arms = groups.arms
    found = {name: crossing(groups.everywhere(arm)) for name, arm in NAMES.items()}

    def edge(arm: str, key: str) -> float | None:
        # an evaluation whose phase diverged has none
        return max((float(one) for run in arms.get(arm, ()) for one in run.curve[key] if not math.isnan(one)), default=None)

    return {
        "uncontrolled_abscissa": over_seeds(groups.everywhere("uncontrolled"), like),
        **{f"{name}_crossing": one for name, one in found.items()},
        **{f"{name}_{key}": one and one[source] for name, one in found.items() for key, source in (
            ("frequency", "frequency"), ("crossed", "crossed"), ("oscillating", "oscillating"), ("runs", "n"))},
        "abscissa_exact": all(measured(run) for arm in NAMES.values() for run in groups.everywhere(arm)),
        **{f"{name}_rate": edge(arm, "rate_arnoldi") for name, arm in NAMES.items()},
        "rate_step": at_step(run for arm in NAMES.values() for run in arms.get(arm, ())),
        "controlled_numerical": edge(CONTROLLED, "numerical_abscissa")}


def _losses(groups: Groups) -> dict[str, Any]:
    arms, tuned, free = groups.arms, groups.tuned, best_of_grid(groups.rivals)
    ours = [run for run in groups.rivals if run.config.arm == CONTROLLED]
    pairs = {"leading_minus_pair": ("leading", "rate_pair"), "pair_minus_one": ("rate_pair", "rate"),
             "pair_minus_norm": ("rate_pair", "norm"), "damped_minus_not": ("rate_damped", "rate_pair")}
    return {
        "ep_minus_bp": tables.paired(tuned, CONTROLLED, "backprop"),
        "ep_minus_bp_worst": max(differences(tuned, CONTROLLED, "backprop"), default=None),
        "ep_minus_bp_any": tables.paired(free, CONTROLLED, "backprop"),
        "excursions_grid": excursions(ours), "grid_steps": sum(run.config.steps for run in ours),
        "steps": groups.rivals[0].config.steps if groups.rivals else None,
        **{f"{name}_rate": tuned[arm][0].config.optimiser.lr if arm in tuned else None
           for name, arm in (("ep", CONTROLLED), ("bp", "backprop"))},
        **{key: tables.paired(arms, *pair) for key, pair in pairs.items()}}


def _shares(groups: Groups) -> dict[str, Any]:
    arms, everywhere = groups.arms, groups.everywhere(CONTROLLED)
    held = [run for arm in arms if arm.startswith(("rate", "leading")) for run in groups.everywhere(arm)]
    held += [run for run in groups.strengths if run.config.arm.startswith(("rate", "leading"))]
    unstable = {name: [run.metrics["excursions"] > 0 for run in groups.robustness if run.config.arm == arm]
                for name, arm in NAMES.items()}
    unstable["controlled_everywhere"] = [run.metrics["excursions"] > 0 for run in everywhere]

    def lost(runs: Iterable[Run]) -> int:
        return sum(map(tables.without_gradient, runs))

    return {
        "excursion": EXCURSION, "residual_shown": RESIDUAL_SHOWN, "enough": round(100 * tables.ENOUGH),
        "excursions_rate": excursions(held), "runs_rate": len(held), "steps_rate": sum(run.config.steps for run in held),
        "excursions_uncontrolled": excursions(groups.everywhere("uncontrolled")),
        "lost_controlled": lost(everywhere), "steps_controlled": sum(run.config.steps for run in everywhere),
        "leading_lost": lost(arms.get("leading", ())), "leading_excursions": excursions(arms.get("leading", ())),
        "pair_lost": lost(arms.get(CONTROLLED, ())), "uncontrolled_lost": lost(arms.get("uncontrolled", ())),
        **{f"share_{name}": statistics.fmean(some) if some else None for name, some in unstable.items()}}


def _held_by(config: RunConfig) -> tuple:
    """What holds the free dynamics of a run: its penalties, on which block, at which step."""
    return config.penalties, getattr(config.model, "block", config.model), config.solver.step


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
