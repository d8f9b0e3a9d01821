"""E2: rows, verdicts and summary of the notebook `mnist`."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import plotting, verdicts
from ..store import tables
from ..store.comparisons import Comparison, compare, differences, excursions, mean_loss
from ..store.runs import Run
from ..verdicts import FAILS, FEWEST, HOLDS, UNDECIDED
from . import words
from .seeds import interval, judge, relation, shown
from .stability import largest_rate

MARGIN = 0.3  # points of test accuracy
CONTROLS = ("frozen", "shuffled", "flipped")  # negative controls, which do not follow the gradient
BEST = 0.22  # the reference's best nudge, within INTERVAL
INTERVAL = (0.2, 0.26)
ACCURACY = ["arm", "learning rate", "seeds", "test accuracy (%)", "standard deviation", "settled (%)", "at the fixed point (%)",
            "excursions", "without gradient", "minus backprop [95 %]", f"at {MARGIN} points"]
BETAS = ["estimator", "nudge strength", "seeds", "test accuracy (%)", "displacement", "largest nudged residual", "excursions",
         "without gradient", f"minus {BEST} [95 %]", f"at {MARGIN} points"]
Arms = dict[str, list[Run]]
Row = list[Any]


def accuracies(some: Iterable[Run]) -> list[float]:
    """The final test accuracy of each run, in percent."""
    return [run.metrics["final"]["accuracy"] for run in some]


def accuracy_rows(arms: Arms) -> list[Row]:
    """A row of `ACCURACY` for each arm."""
    rows = []
    for arm, chosen in arms.items():
        against = compare(differences(arms, arm, "backprop", "accuracy")) if arm != "backprop" else None
        found = accuracies(chosen)
        fixed = [tables.at_fixed_point(run, "accuracy") for run in chosen]
        rows.append([plotting.label(arm), chosen[0].config.optimiser.lr, len(chosen), statistics.fmean(found),
                     statistics.stdev(found) if len(found) > 1 else None, tables.settled_cell(chosen),
                     statistics.fmean(known) if len(known := [one for one in fixed if one is not None]) == len(fixed) else None,
                     sum(run.metrics["excursions"] for run in chosen), sum(map(tables.without_gradient, chosen)),
                     None if against is None else interval(against),
                     None if against is None else relation(against, [*chosen, *arms.get("backprop", ())], MARGIN)])
    return rows


def audits(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which a run audited its gradient, and what it found."""
    kept = np.isfinite(run.log["audit_cosine"])
    return run.log["step"][kept], run.log[f"audit_{key}"][kept]


def audits_of(some: list[Run], key: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Steps at which any of the runs has an audit, and each run's values there, NaN where a step had no gradient to audit."""
    kept = np.any([np.isfinite(run.log["audit_cosine"]) for run in some], axis=0)
    return some[0].log["step"][kept], [run.log[f"audit_{key}"][kept] for run in some]


def by_beta(swept: list[Run], arm: str) -> dict[float, dict[int, Run]]:
    """Nudge strength -> seed -> run of an arm."""
    found: dict[float, dict[int, Run]] = {}
    for run in swept:
        if run.config.arm == arm:
            estimator: Any = run.config.estimator
            found.setdefault(estimator.beta, {})[run.config.seed] = run
    return dict(sorted(found.items()))


def against_best(found: dict[float, dict[int, Run]], beta: float) -> tuple[Comparison, list[Run]]:
    """The accuracy at a nudge minus that at 0.22, seed by seed, and the runs compared."""
    some, base = found[beta], found.get(BEST, {})
    pairs = [run.metrics["final"]["accuracy"] - base[seed].metrics["final"]["accuracy"]
             for seed, run in some.items() if seed in base]
    return compare(pairs), [*some.values(), *base.values()]


def beta_rows(swept: list[Run], arm: str) -> list[Row]:
    """A row of `BETAS` for each nudge strength of an arm."""
    found, rows = by_beta(swept, arm), []
    for beta, some in found.items():
        against, compared = against_best(found, beta)
        rows.append([plotting.label(arm), beta, len(some), statistics.fmean(accuracies(some.values())),
                     statistics.fmean(run.metrics["training"]["displacement"] for run in some.values()),
                     max(float(run.log["nudged_residual_max"].max()) for run in some.values()),
                     sum(run.metrics["excursions"] for run in some.values()), sum(map(tables.without_gradient, some.values())),
                     *((None, None) if beta == BEST else (interval(against), relation(against, compared, MARGIN)))])
    return rows


def fall(run: Run) -> float:
    """How far the accuracy has fallen from its peak along the curve, in points."""
    return float(run.curve["accuracy"].max()) - float(run.curve["accuracy"][-1])


def annealing_rows(by_arm: Arms) -> list[Row]:
    """A row for each arm of the annealing: accuracy, largest fall, steps lost, rate and lowest cosine of the audits."""
    return [[plotting.label(arm), len(some), statistics.fmean(accuracies(some)), max(map(fall, some)),
             sum(run.metrics["excursions"] for run in some), sum(map(tables.without_gradient, some)),
             largest_rate(some), min(float(audits(run, "cosine")[1].min()) for run in some)]
            for arm, some in by_arm.items()]


@dataclass(frozen=True)
class Evidence:
    """What the reference's claims on MNIST are judged by."""

    arms: Arms
    wide: Arms  # at the reference's width and number of epochs
    swept: list[Run]  # over the nudge strength
    annealed: Arms
    grid: dict[tuple[float, float, float], float]  # (nudge, mixing, learning rate) -> accuracy
    counted: dict[str, list[dict]]  # arm -> for each seed the relaxation steps of the test images
    memory: list[Row]  # of T3b
    epochs: float
    phase_steps: int

    def behind(self, *names: str) -> list[Run]:
        return [run for name in names for run in self.arms.get(name, ())]

    def gap(self, ours: str) -> Comparison:
        return compare(differences(self.arms, ours, "backprop", "accuracy"))


def reference_claims(found: Evidence) -> list[Row]:
    """Each claim of the reference on MNIST: [claim, our evidence, verdict]."""
    return [*_of_accuracy(found), *_of_nudges(found), *_of_the_grid(found.grid), *_of_cost(found), _of_direction(found)]


def _enough(*some: list[Run]) -> bool:
    return all(len(part) >= FEWEST and not any(getattr(run.config.data, "limit", 0) for run in part) for part in some)


def _of_accuracy(found: Evidence) -> Iterator[Row]:
    gap = found.gap("ep_linear")
    yield ["EP on this network ends 3 to 5 points below backprop", f"corrected EP minus backprop {interval(gap)} points",
           judge(gap, found.behind("ep_linear", "backprop"), max=-3)]
    plain = found.gap("vector_field")
    yield ["the same, for the uncorrected estimator", f"vector field minus backprop {interval(plain)} points",
           judge(plain, found.behind("vector_field", "backprop"), max=-3)]
    theirs = {judge(compare(accuracies(some)), some, min=92, max=94)
              for some in (found.behind("reference"), found.wide.get("reference", []))}
    reference, ours, wide_reference, wide_ours = (
        shown(mean_loss(pool, arm, "accuracy")) for pool in (found.arms, found.wide) for arm in ("reference", "ep_linear"))
    reached = True if HOLDS in theirs else False if theirs == {FAILS} else None
    yield ["92 to 94 % is what EP reaches",
           f"reference {reference} %, corrected EP {ours} %; at width 256 "
           + ("not run" if not found.wide else f"{wide_reference} and {wide_ours} %"),
           verdicts.of(None if round(found.epochs) < 5 else reached)]
    free, held = (mean_loss(found.arms, arm, "accuracy") for arm in ("symmetric", "symmetric_controlled"))
    known = _enough(found.behind("symmetric"), found.behind("symmetric_controlled")) and free is not None and held is not None
    seen = "not run" if free is None and held is None else f"as it is {shown(free)} %, with the rate held {shown(held)} %"
    yield ["the symmetric form does not train (10.2 %)", seen, verdicts.of(max(held or 0, free or 0) < 20 if known else None)]


def _of_nudges(found: Evidence) -> Iterator[Row]:
    plain = by_beta(found.swept, "vector_field")
    inside = [against_best(plain, beta) for beta in plain if INTERVAL[0] <= beta <= INTERVAL[1] and beta != BEST]
    widest = max((one for one, _ in inside if one.mean is not None), key=lambda one: abs(one.mean or 0), default=None)
    equal = sum(judge(*one, max_abs=MARGIN) == HOLDS for one in inside)
    below, above = [judge(*one, below=0) == HOLDS for one in inside], [judge(*one, above=0) == HOLDS for one in inside]
    best = None if not inside else True if all(below) else False if equal == len(inside) or any(above) else None
    yield [f"{BEST} is the best nudge between 0.20 and 0.26",
           f"largest difference to {BEST} {interval(widest) if widest else '-'} points; equivalent at {MARGIN}: "
           f"{equal} of {len(inside)}", verdicts.of(best)]
    low = [run for beta, some in plain.items() if beta <= 0.2 for run in some.values()]
    fallen = [run for run in low if fall(run) > 5]
    yield ["nudges of 0.20 and below collapse", f"{len(fallen)} of {len(low)} runs at 0.20 and below fall by 5 points",
           verdicts.of(bool(fallen) if _enough(low) else None)]
    some = [found.annealed.get(arm, []) for arm in ("reference_annealed", "reference_fixed")]
    annealed, fixed = (max(map(fall, part), default=None) for part in some)
    known = _enough(*some) and annealed is not None and fixed is not None
    yield ["annealing 0.3 to 0.20 collapses, a fixed 0.20 does not", f"largest fall from the peak: annealed {shown(annealed)}, "
           f"fixed {shown(fixed)} points", verdicts.of((annealed or 0) > 5 >= (fixed or 0) if known else None)]


def _of_the_grid(grid: dict[tuple[float, float, float], float]) -> Iterator[Row]:
    for axis, name, better, worse in ((0, "nudge", 0.2, 0.05), (1, "mixing", 0.8, 0.95), (2, "learning rate", 2e-3, 1e-3)):
        others = {key: (*key[:axis], worse, *key[axis + 1:]) for key in grid if key[axis] == better}
        outcome = compare([grid[key] - grid[other] for key, other in others.items() if other in grid])
        yield [f"{name} {better:g} is better than {worse:g}", f"difference over the grid {interval(outcome)} points, one seed",
               UNDECIDED]


def _of_cost(found: Evidence) -> Iterator[Row]:
    fine = {arm: [one["clean"]["1e-05"] for one in some if "mean" in one["clean"]["1e-05"]]
            for arm, some in found.counted.items()}
    each = "; ".join(f"{plotting.label(arm)}: {min(one['least'] for one in some):.0f} to {max(one['most'] for one in some):.0f}"
                     for arm, some in fine.items() if some)
    equal = all(one["least"] == one["most"] for some in fine.values() for one in some)
    yield ["every image settles in exactly 10 iterations at 1e-5", each or "-",
           verdicts.of(equal if any(fine.values()) else None)]
    columns = [[row[place] for row in found.memory] for place in (7, 8, 9)]
    local, automatic, unrolled = (f"{min(column):.2f} to {max(column):.2f}" for column in columns)
    yield ["EP takes 1.04 to 1.12 times backprop's memory", f"derivatives by autograd {automatic} times",
           verdicts.of(all(1 <= row[8] <= 1.2 for row in found.memory))]
    yield ["a local update takes less than half of it (their target)",
           f"{local} times backprop through one layer; {unrolled} times BPTT through {found.phase_steps} steps",
           verdicts.of(all(row[7] < 0.5 for row in found.memory))]


def _of_direction(found: Evidence) -> Row:
    exact, wrong = ([float(end(audits(run, "cosine")[1])) for run in found.behind(arm) if run.config.audit_every]
                    for arm, end in (("symmetric_controlled", np.min), ("reference", np.max)))
    known = min(len(exact), len(wrong)) >= FEWEST
    symmetric = f"symmetric: lowest {shown(min(exact), 3)} along training" if exact else "symmetric: not run"
    free = f"free weights: highest {shown(max(wrong), 3)}" if wrong else "free weights: not run"
    seen = f"{symmetric}; {free}" if exact or wrong else "not run"
    return ["uncorrected EP has the gradient's direction in the symmetric form only (0.997, against 0.42)", seen,
            verdicts.of(min(exact) > 0.99 and max(wrong) < 0.99 if known else None)]


def summary(found: Evidence, runs: list[Run], followed: list[Run], audited: list[str], claims: list[Row]) -> dict[str, Any]:
    """What the paper's text and claims read; `followed` are the runs whose excursions count, `audited` the arms with audits."""
    arms, wide = found.arms, found.wide
    followed = [run for run in followed if run.config.penalties and run.config.arm not in CONTROLS]
    bptt: list[Any] = [run.config.estimator for run in arms.get("bptt", ())]
    pairs = {("ep", "bp"): ("ep_linear", "backprop"), ("ep", "bptt"): ("ep_linear", "bptt"),
             ("bptt", "bp"): ("bptt", "backprop"), ("vector_field", "ep"): ("vector_field", "ep_linear"),
             ("two", "bp"): ("ep", "backprop"), ("two", "bptt"): ("ep", "bptt")}

    def falls(arm: str) -> float | None:
        return max(map(fall, found.annealed.get(arm, [])), default=None)

    def share(arm: str) -> float | None:  # of an annealing arm's steps that have an excursion
        some = found.annealed.get(arm, [])
        return sum(run.metrics["excursions"] for run in some) / sum(run.config.steps for run in some) if some else None

    return {
        **{f"{name}_accuracy": tables.final(arms, arm, "accuracy")
           for name, arm in (("ep", "ep_linear"), ("two", "ep"), ("bp", "backprop"), ("vector_field", "vector_field"))},
        **{f"{ours}_minus_{other}": tables.paired(arms, *pair, "accuracy") for (ours, other), pair in pairs.items()},
        "without_gradient": sum(map(tables.without_gradient, runs)), "steps": sum(run.config.steps for run in runs),
        "excursions": excursions(followed), "steps_controlled": sum(run.config.steps for run in followed),
        **{f"excursions_{name}": excursions(run for run in followed if run.config.arm == arm)
           for name, arm in (("symmetric", "symmetric_controlled"), ("bptt", "bptt"))},
        "bptt_steps": max((estimator.steps for estimator in bptt), default=None),
        "excursions_controls": excursions(run for run in runs if run.config.arm in CONTROLS),
        **{f"cosine_{name}": tables.interval(float(audits(run, "cosine")[1][-1]) for run in arms[arm])
           if arm in audited else None for name, arm in (("vector_field", "vector_field"), ("ep", "ep_linear"))},
        "annealed_fall": falls("reference_annealed"), "corrected_fall": falls("corrected_annealed"),
        "corrected_fixed_fall": falls("corrected_fixed"),
        "annealed_excursions": share("reference_annealed"), "corrected_excursions": share("corrected_annealed"),
        **{f"wide_{name}_accuracy": tables.final(wide, arm, "accuracy")
           for name, arm in (("ep", "ep_linear"), ("bp", "backprop"), ("reference", "reference"))},
        "wide_reference_excursions": excursions(wide.get("reference", ())),
        "wide_ep_minus_bp": tables.paired(wide, "ep_linear", "backprop", "accuracy"),
        "epochs": found.epochs, "seeds": len({run.config.seed for run in arms.get("ep_linear", ())}),
        **{f"claims_{word}": sum(row[2] == verdict for row in claims)
           for word, verdict in (("failed", FAILS), ("held", HOLDS), ("open", UNDECIDED))},
    }


def reading(found: dict[str, Any]) -> list[str]:
    """What a summary says, in sentences."""
    said = [words.level(f"{name}, test accuracy", found[f"{key}_accuracy"], "%") for key, name in (
        ("ep", "EP, linear response"), ("two", "EP, two trajectories"), ("vector_field", "uncorrected EP"), ("bp", "backprop"))]
    said += [words.difference(name, found[key], "points") for key, name in (
        ("ep_minus_bptt", "Linear response minus BPTT, the price of the rule"),
        ("two_minus_bptt", "Two trajectories minus BPTT"),
        ("ep_minus_bp", "Linear response minus backprop"), ("vector_field_minus_ep", "Uncorrected minus corrected"),
        ("wide_ep_minus_bp", "At the reference's width, linear response minus backprop"))]
    said += [words.level(f"{name}, cosine with the exact gradient at the end", found[f"cosine_{key}"], "", 4)
             for key, name in (("ep", "Linear response"), ("vector_field", "uncorrected EP"))]
    return [*said, words.count(found["without_gradient"], found["steps"], "Updates without a gradient, all runs"),
            words.count(found["excursions"], found["steps_controlled"], "Updates with an excursion, runs under control"),
            f"Of the reference's claims {found['claims_held']} hold, {found['claims_failed']} fail and {found['claims_open']} "
            "are not decided."]
