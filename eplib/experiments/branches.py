"""The branch experiment: from one kept state, with the same moments and batches, so many updates by each rule.

Whole runs by two rules drift apart by more than the rules differ. Branches of one state differ by their rule alone, so that the
spread of their difference over seeds is that of the rule.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from .. import plotting
from ..store import tables
from ..store.comparisons import compare, differences
from ..store.runs import Run
from . import words
from .seeds import interval, relation


def by_step(runs: Iterable[Run]) -> dict[int, dict[str, list[Run]]]:
    """The branches among some runs: by the update that they began after, and by arm."""
    found: dict[int, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.config.branch:
            found[run.config.branch.step][run.config.arm].append(run)
    return {step: dict(found[step]) for step in sorted(found)}


def rows(runs: Iterable[Run], against: str, margin: float) -> list[list]:
    """A row for each step and rule among the branches: the model's width, step, label, seeds, how far its final loss is from
    that of the rule `against`, seed by seed, with its interval, whether they are equivalent within the margin (nats), the share
    that settled, how far the losses at the fixed points are apart, and the updates without a task gradient."""
    found = []
    for step, arms in by_step(runs).items():
        for arm in arms.keys() - {against}:
            model: Any = arms[arm][0].config.model
            seen = compare(differences(arms, arm, against))
            found.append([model.width, step, plotting.label(arm), seen.pairs, interval(seen, 4),
                          relation(seen, [*arms[arm], *arms.get(against, [])], margin), tables.settled_cell(arms[arm]),
                          interval(compare(_settled(arms[arm], arms.get(against, []))), 4),
                          sum(map(tables.without_gradient, arms[arm]))])
    return sorted(found, key=lambda row: row[:3])


def _settled(ours: Iterable[Run], theirs: Iterable[Run]) -> list[float]:
    """Differences of the losses at the converged fixed points, over the seeds that both have where enough samples settle."""
    found: list[dict[int, float]] = [
        {run.config.seed: loss for run in some if (loss := tables.at_fixed_point(run)) is not None} for some in (ours, theirs)]
    return [found[0][seed] - found[1][seed] for seed in sorted(found[0].keys() & found[1].keys())]


def reading(found: dict[str, dict], against: str) -> list[str]:
    """What a summary says, in sentences."""
    said = []
    for key, gap in found.items():
        arm, _, place = key.replace(f"_minus_{against}_", " ").partition(" ")
        step, _, fixed = place.partition("_")
        if gap["mean"] is not None:
            name = f"After {int(step):,} updates, {plotting.label(arm)} minus {plotting.label(against)}"
            said.append(words.difference(name + (", at the converged fixed points" if fixed else ""), gap, "nats", 4))
    return said


def summary(runs: Iterable[Run], against: str) -> dict[str, dict]:
    """For each rule and each update that branches began after how far its final loss is from that of the rule `against`, as
    results files hold it (`tables.paired`): {"two_minus_linear_2000": {mean, low, high, n}, ...}; and, under the same name with
    `_fixed`, the same at the converged fixed points, over the seeds where enough samples settle in both arms."""
    found = {}
    for step, arms in by_step(runs).items():
        for arm in sorted(arms.keys() - {against}):
            found[f"{arm}_minus_{against}_{step}"] = tables.paired(arms, arm, against)
            found[f"{arm}_minus_{against}_{step}_fixed"] = tables.interval(_settled(arms[arm], arms.get(against, [])))
    return found
