"""E5's screen of controllers: what each arm holds, how far right its spectrum came all the same, and what it cost in loss."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import plotting
from ..config import sparse
from ..runconfig import RunConfig
from ..store import tables
from ..store.comparisons import mean_loss
from ..store.runs import Run
from ..verdicts import FEWEST
from . import stability, words

SECOND_HALF = 0.5
HELD = ("token", "token_two")  # one control, two ways to the gradient
SEEN = {0}  # the seeds whose results were known when the claims were written
COLUMNS = ["arm", "learning rate", "seeds", "validation loss", "settled (%)", "largest abscissa", "its frequency",
           "spectral radius", "excursions", "without gradient", "evaluations per step"]
SETTINGS = ["arm", "controller", "held below", "at step", "strength", "clipped", "step of the phases", "steps at most", "gate",
            "block"]
Arms = dict[str, list[Run]]


def rows(arms: Arms) -> list[list[Any]]:
    """A row of `COLUMNS` for each arm, the lowest loss first and those without a finite one last. Abscissas are of the second
    half of training, the radius that of the last weights: of the seeds the largest, and none where all phases diverged."""
    found = [[plotting.label(arm), some[0].config.optimiser.lr, len(some), mean_loss(arms, arm), tables.settled_cell(some),
              *_rightmost(some), stability.largest_rate(some), sum(run.metrics["excursions"] for run in some),
              sum(map(tables.without_gradient, some)), tables.evaluations_a_step(some)] for arm, some in arms.items()]
    return sorted(found, key=lambda row: (row[3] is None, row[3]))


def settings(arms: Arms) -> list[list[Any]]:
    """A row of `SETTINGS` for each arm that has phases: what it differs in from the others besides its name."""
    return [[plotting.label(arm), *_setting(some[0].config)] for arm, some in arms.items() if not some[0].config.model.explicit]


def missed(runs: Iterable[Run]) -> float | None:
    """The most by which the exact rate of a probe's map lay above what the probe saw; None where it was not measured."""
    gaps = [run.curve["rate_held"] - run.curve["rate_seen"] for run in runs if "rate_held" in run.curve]
    return max((float(gap) for each in gaps for gap in each if np.isfinite(gap)), default=None)


def summary(arms: Arms, whole: Arms) -> dict[str, Any]:
    """What the paper's text and claims read. `later_` is of the seeds that were not known when the claims were written,
    `whole_` of E3's whole runs."""
    held = {arm: some for arm, some in arms.items() if not some[0].config.model.explicit}
    later = {arm: [run for run in some if run.config.seed not in SEEN] for arm, some in arms.items()}
    return {
        "token_minus_backprop": tables.paired(arms, "token", "backprop"),
        "two_minus_backprop": tables.paired(arms, "token_two", "backprop"),
        "two_minus_linear": tables.paired(arms, "token_two", "token"),
        "token_minus_bptt": tables.paired(arms, "token", "token_bptt"),
        **{f"{arm}_abscissa": stability.crossing(some, SECOND_HALF) for arm, some in held.items()},
        **{f"{arm}_missed": missed(some) for arm, some in held.items()},
        **_of_the_held("later", later), **_of_the_held("whole", whole)}


def reading(found: dict[str, Any]) -> list[str]:
    """What a summary says, in sentences: the price of each way to the gradient, and where its spectrum ended."""
    said = []
    for name, arm, gap in (("EP by the linear response", "token", "token_minus_backprop"),
                           ("EP by two trajectories", "token_two", "two_minus_backprop")):
        edge = found.get(f"{arm}_abscissa") or {}
        said.append(words.difference(f"{name}, tokens held, minus backprop", found[gap], "nats", 4))
        if edge.get("value") is not None:
            said.append(f"{name}: the furthest right of the evaluated tokens is at {edge['value']:.3f}, and "
                        f"{edge['crossed']} of {edge['n']} runs came above zero in the second half of training.")
        if found.get(f"whole_{gap}", {}).get("n"):
            said.append(words.difference(f"In whole runs {name}, minus backprop", found[f"whole_{gap}"], "nats", 4))
    return said


def _of_the_held(name: str, arms: Arms) -> dict[str, Any]:
    """What the claims on the arms of `HELD` read: the lowest share that settled (%), the largest abscissa, the excursions
    (training steps and samples of the final evaluations), both minus backprop. Fewer seeds than `FEWEST` of an arm decide
    nothing."""
    runs = [run for arm in HELD for run in arms.get(arm, ())]
    if not runs:
        settled = abscissa = left = None
    else:
        seeds = min(len(arms.get(arm, ())) for arm in HELD)
        few = {"undecided": f"{seeds} of {FEWEST} seeds of both arms"} if seeds < FEWEST else {}
        settled = {"value": 100 * tables.least(map(tables.settled_cold, runs))[0], **few}
        abscissa = {**(stability.crossing(runs) or {}), **few}
        left = {"value": sum(run.metrics["excursions"] + run.metrics["final"]["excursions"] for run in runs), **few}
    return {f"{name}_settled": settled, f"{name}_abscissa": abscissa, f"{name}_excursions": left,
            f"{name}_token_minus_backprop": tables.paired(arms, "token", "backprop"),
            f"{name}_two_minus_backprop": tables.paired(arms, "token_two", "backprop")}


def _rightmost(some: list[Run]) -> tuple[float | None, float | None]:
    found = None if some[0].config.model.explicit else stability.crossing(some, SECOND_HALF)
    return (found["value"], found["frequency"]) if found else (None, None)


def _setting(config: RunConfig) -> list[Any]:
    solver: Any = config.solver
    most = solver.max_steps if config.estimator.equilibrium else getattr(config.estimator, "steps", None)
    parts = [_control(one, solver.step) for one in config.penalties] or [("none", "-", "-", "-")]
    return [*(" + ".join(words) for words in zip(*parts, strict=True)), config.optimiser.clipping if config.penalties else "-",
            config.plain_step, most, config.gate, _block(config)]


def _block(config: RunConfig) -> str:
    """What of the block is not as it is by default."""
    options = sparse(getattr(config.model, "block", config.model)).items()
    return ", ".join(name if value is True else f"{name} {value:g}" for name, value in options if name != "kind") or "-"


def _control(penalty: Any, step: float) -> tuple[str, str, str, str]:
    """Of a penalty: what it is, what it holds its quantity at, the step of the map that it looks at, its strength."""
    name = penalty.kind + (f", {penalty.probes} probes" if getattr(penalty, "probes", 1) > 1 else "")
    name += f" per {penalty.per}, {penalty.products} products" if hasattr(penalty, "per") else ""
    margin = getattr(penalty, "margin", None)
    bound = getattr(penalty, "target", getattr(penalty, "bound", None)) if margin is None else -margin
    own = f"{penalty.step or step:g}" if hasattr(penalty, "step") else "-"
    strength = "integrated" if getattr(penalty, "driven", None) else f"{penalty.strength:g}"
    return name, "-" if bound is None else f"{bound:g}", own, strength
