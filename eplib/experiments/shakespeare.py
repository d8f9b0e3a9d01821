"""E3, the character language model: how tightly the control binds, which audits count, and the summary of the notebook."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import plotting
from ..store import tables
from ..store.comparisons import excursions, mean_loss, spread
from ..store.runs import Run
from . import words
from .stability import rate_step

NEAR = 3e-3  # displacement up to which an audit by two trajectories is one of the linear response
PAIRS = {"ep_minus_bptt": ("ep_linear", "bptt"), "ep_minus_bp": ("ep_linear", "backprop"),
         "plane_minus_vector": ("ep_plane", "ep_linear"), "plane_minus_bp": ("ep_plane", "backprop"),
         "plane_minus_bare": ("ep_plane", "bptt_bare"), "two_trajectory_minus_bptt": ("ep", "bptt"),
         "two_trajectory_minus_bp": ("ep", "backprop"), "two_trajectory_minus_ep": ("ep", "ep_linear"),
         "vector_field_minus_ep": ("vector_field", "ep_linear"),
         "bptt_minus_bare": ("bptt", "bptt_bare")}
Arms = dict[str, list[Run]]


def training(run: Run) -> float:
    """Mean loss of the training batches since the last evaluation but one, in nats."""
    return run.metrics["training"]["loss"]


def binding(run: Run) -> dict[str, float | None]:
    """Over the second half of training: mean loss, shares of steps with a penalty above zero and without a gradient, and the
    medians of the probe's rate, of the gradient norm with a penalty and without, and of the worst free residual."""
    half = run.metrics["training"]["second_half"]
    return {"loss": half["loss"], "share": half["penalised"], "lost": half["without_gradient"], "probe": half["rate_probe"],
            "norm": half["gradient_norm_penalised"], "norm_other": half["gradient_norm_others"],
            "residual": half["free_residual_max"]}


def near(run: Run) -> np.ndarray:
    """Whether the audit in a window of the log is near: settled, and by trajectories that stayed close (windows,)."""
    log = run.log
    return (np.isfinite(log["audit_cosine"]) & ~(log["audit_displacement"] > NEAR)
            & (log["audit_residual"] <= 1.01 * run.config.solver.tol))


def radius(runs: Iterable[Run]) -> list[float]:
    """The largest spectral radius of the map at the evaluations of each run, each at its own step."""
    return [float(np.nanmax(run.curve["rate_arnoldi"])) for run in runs]


@dataclass(frozen=True)
class Measured:
    """What the notebook measured beside the runs: differences of training losses, and the horizon of BPTT."""

    gaps: dict[str, list[float]]  # to "bptt" and to "bp": EP minus theirs over seeds
    worse: list[Run]  # EP's runs at the learning rate that was not chosen
    bptt_steps: int | None
    horizon: dict[str, list[float]]  # arm -> cosine of BPTT's gradient over its horizon with the settled one, over seeds


def summary(arms: Arms, runs: list[Run], measured: Measured) -> dict[str, Any]:
    """What the paper's text and claims read."""
    return {
        **{name: tables.paired(arms, *pair) for name, pair in PAIRS.items()},
        **{f"loss_{name}": tables.final(arms, arm) for name, arm in {
            "ep": "ep_linear", "plane": "ep_plane", "bptt": "bptt", "bptt_bare": "bptt_bare", "bp": "backprop"}.items()},
        **{f"training_ep_minus_{other}": tables.interval(found) for other, found in measured.gaps.items()},
        "bptt_spread": spread(arms, "bptt"), "ep_spread": spread(arms, "ep_linear"),
        **_audits(runs), **_stability(arms, runs), **_control(arms), **_other_rate(measured.worse),
        "settled_plane": tables.settled_cell(arms["ep_plane"]) if "ep_plane" in arms else None,
        "bptt_steps": measured.bptt_steps, "horizon_cosine": tables.interval(measured.horizon.get("bptt", ())),
        "horizon_cosine_ep": tables.interval(measured.horizon.get("ep_linear", ()))}


def reading(found: dict[str, Any]) -> list[str]:
    """What a summary says, in sentences."""
    said = [words.difference(name, found[key], "nats", 4) for key, name in (
        ("ep_minus_bptt", "Linear response minus BPTT, the price of the rule"),
        ("two_trajectory_minus_bptt", "Two trajectories minus BPTT"),
        ("ep_minus_bp", "Linear response minus backprop"), ("two_trajectory_minus_bp", "Two trajectories minus backprop"),
        ("plane_minus_bp", "Linear response, rate on a plane, minus backprop"),
        ("bptt_minus_bare", "BPTT with control minus without, the price of control"))]
    said += [f"Steps with an excursion, {name}: {words.shown(found[f'excursions_{key}'], 0)}." for key, name in (
        ("controlled", "EP under control"), ("plane", "EP, rate on a plane"), ("bptt", "BPTT under control"),
        ("bptt_bare", "BPTT"), ("uncontrolled", "EP without control"))]
    lost = {arm: found[f"lost_{arm}"] for arm in ("ep_linear", "ep", "bptt", "ep_plane", "ep_uncontrolled")}
    return [*said, *(f"Steps without a gradient, {plotting.label(arm)}: {100 * share:.2f} %."
                     for arm, share in lost.items() if share is not None)]


def _audits(runs: list[Run]) -> dict[str, Any]:
    audited = [run for run in runs if run.config.audit_every]
    least = min((float(np.nanmin(run.log["audit_cosine"])) for run in audited), default=None)
    elsewhere = any("audits" in run.notes for run in audited)
    return {
        "audit_cosine_min": least if not elsewhere else {
            "value": least, "undecided": "these audits compare with a free state other than the step's"},
        "audit_cosine_near": min((float(run.log["audit_cosine"][near(run)].min()) for run in audited if near(run).any()),
                                 default=None),
        "audits": sum(int(np.isfinite(run.log["audit_cosine"]).sum()) for run in audited),
        "audit_near_displacement": NEAR, "audits_near": sum(int(near(run).sum()) for run in audited)}


def _stability(arms: Arms, runs: list[Run]) -> dict[str, Any]:
    def lost(arm: str) -> float | None:  # share of an arm's steps without a gradient of the task
        some = arms.get(arm, ())
        return sum(map(tables.without_gradient, some)) / sum(run.config.steps for run in some) if some else None

    return {
        "radius_uncontrolled": tables.interval(radius(arms.get("ep_uncontrolled", ()))),
        **{f"radius_{name}": max(radius(run for arm in some for run in arms.get(arm, ())), default=None)
           for name, some in {"controlled": ("ep", "ep_linear"), "plane": ("ep_plane",), "bptt_bare": ("bptt_bare",)}.items()},
        **{f"step_{name}": rate_step(arms[arm][0]) if arm in arms else None
           for name, arm in (("controlled", "ep_linear"), ("plane", "ep_plane"))},
        "excursions_controlled": excursions(run for run in runs if run.config.penalties and run.config.arm != "bptt"),
        **{f"excursions_{name}": excursions(arms.get(arm, ())) for name, arm in {
            "plane": "ep_plane", "bptt": "bptt", "uncontrolled": "ep_uncontrolled", "bptt_bare": "bptt_bare"}.items()},
        **{f"lost_{arm}": lost(arm) for arm in ("ep_linear", "ep", "bptt", "ep_plane", "ep_uncontrolled")},
        **{f"evaluations_{arm}": tables.evaluations_a_step(arms.get(arm, ()))
           for arm in ("ep_linear", "ep", "bptt", "backprop")}}


def _control(arms: Arms) -> dict[str, Any]:
    def mean(arm: str, name: str) -> float | None:  # over an arm's runs of what `binding` finds
        found = [value for run in arms.get(arm, ()) if (value := binding(run)[name]) is not None]
        return float(np.mean(found)) if found else None

    def of_penalty(arm: str, key: str) -> Any:
        return getattr(arms[arm][0].config.penalties[0], key) if arm in arms else None

    return {
        **{f"{name}_{arm}": mean(arm, name) for arm in ("ep_linear", "ep", "bptt") for name in ("probe", "norm", "norm_other")},
        "penalised": mean("ep_linear", "share"),
        **{name: of_penalty(arm, key) for name, (arm, key) in {
            "target": ("ep_linear", "target"), "products": ("ep_linear", "products"), "penalty_every": ("ep_linear", "every"),
            "target_plane": ("ep_plane", "target")}.items()}}


def _other_rate(worse: list[Run]) -> dict[str, Any]:
    if not worse:
        return {}
    arms = {"ep_linear": worse}
    return {"other_rate": worse[0].config.optimiser.lr, "other_rate_seeds": len(worse),
            "other_rate_loss": tables.final(arms, "ep_linear"), "other_rate_training": training(worse[0]),
            "other_rate_iterations": mean_loss(arms, "ep_linear", "iterations"),
            "other_rate_residual": mean_loss(arms, "ep_linear", "residual_median"),
            "other_rate_radius": max(radius(worse)), "other_rate_excursions": excursions(worse)}
