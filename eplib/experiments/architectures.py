"""E3, architectures: how far Layered by EP and its twin by backpropagation are apart, and the summary of the notebook."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import plotting
from ..store import tables
from ..store.comparisons import excursions, spread
from ..store.runs import Run
from . import words

TWIN = "layered_backprop"
SAME = 1e-5  # nats: a difference of the training loss below it is that of round-off
Arms = dict[str, list[Run]]


def apart(arms: Arms, arm: str) -> list[np.ndarray]:
    """For each run of an arm with a twin of its seed, how far apart their training losses are at the last step of each window
    of the log (windows,)."""
    taught = {run.config.seed: run.log["loss_last"] for run in arms.get(TWIN, ())}
    return [abs(run.log["loss_last"] - taught[run.config.seed]) for run in arms.get(arm, ()) if run.config.seed in taught]


def logged(arms: Arms) -> np.ndarray:
    """The last step of each window of the twins' logs (windows,), none without a twin."""
    return next((run.log["step"] for run in arms.get(TWIN, ())), np.array([], dtype=int))


def same_steps(gap: np.ndarray, steps: np.ndarray) -> int:
    """The number of steps over which two runs are the same, by what is logged of them."""
    differ = np.flatnonzero(gap > SAME)
    return int(steps[-1]) if not len(differ) else int(steps[differ[0] - 1]) if differ[0] else 0


def summary(arms: Arms, runs: Iterable[Run], absent: list[str], steps: int) -> dict[str, Any]:
    """What the paper's text and claims read; `absent` are the arms without a finished run, `steps` the budget of each."""
    runs, at = list(runs), logged(arms)
    twin = tables.paired(arms, "layered", TWIN)
    ends = [(run.metrics["solver_removed"], run.metrics["final"]["loss"]) for run in arms.get("attractor", ())]
    removed = [without - loss for without, loss in ends if without is not None and loss is not None]
    spreads = [found for arm in ("layered", TWIN) if (found := spread(arms, arm)) is not None]
    # the standard error that the mean difference would have if the two arms shared no seed
    independent = float(np.hypot(spreads[0], spreads[1])) / twin["n"] ** 0.5 if len(spreads) == 2 and twin["n"] else None
    scaled = None if independent is None else twin | {
        name: twin[name] / independent for name in ("mean", "low", "high") if twin[name] is not None}
    layers: list[Any] = [run.config.model for run in arms.get("layered", ())]
    return {
        "layered_minus_twin": twin, "layered_seed_error": independent, "layered_over_seed_error": scaled,
        "layered_bptt_minus_twin": tables.paired(arms, "layered_bptt", TWIN),
        "layered_compared_every": int(at[0]) if len(at) else 1,
        "layered_same_steps": min((same_steps(gap, at) for gap in apart(arms, "layered")), default=None),
        **{arm: tables.final(arms, arm) for arm in ("thick", "thin", "energy", "monotone", "attractor")},
        "attractor_minus_twin": tables.paired(arms, "attractor", TWIN),
        "inside_minus_attractor": tables.paired(arms, "layered_attractor", "attractor"),
        "attractor_solver_removed": next((run.metrics.get("solver_removed") for run in arms.get("attractor", ())), None),
        "attractor_without_solver": tables.interval(removed), "energy_minus_bptt": tables.paired(arms, "energy", "energy_bptt"),
        "excursions": excursions(runs, absent), "steps": steps,
        "thin_excursions": excursions(run for run in runs if run.config.arm == "thin"),
        "layered_sweeps": max((model.block.layers for model in layers), default=None)}


def reading(found: dict[str, Any]) -> list[str]:
    """What a summary says, in sentences."""
    said = [words.difference("Layered by EP minus its twin by backpropagation", found["layered_minus_twin"], "nats", 5)]
    if found["layered_same_steps"] is not None:
        said.append(f"Their training losses are the same to {SAME:g} for {found['layered_same_steps']} steps.")
    said += [words.difference(name, found[key], "nats", 4) for key, name in (
        ("attractor_minus_twin", "Attractor minus the twin"),
        ("inside_minus_attractor", "Attractor, its backbone in the state, minus with the backbone by autograd"),
        ("energy_minus_bptt", "Energy by EP minus by BPTT"))]
    said += [words.level(f"{plotting.label(arm)}, validation loss", found[arm], "nats", 3)
             for arm in ("thick", "thin", "energy", "monotone", "attractor")]
    return [*said, f"Steps with an excursion on any architecture: {words.shown(found['excursions'], 0)}."]
