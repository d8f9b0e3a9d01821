"""E4: what the campaign's sections conclude from their tables, and the summary that the paper's text and claims read."""

from collections.abc import Mapping
from typing import Any

from .. import plotting, verdicts
from ..store import tables
from ..store.comparisons import excursions
from ..store.runs import Run
from .campaign_tables import HELD, HISTORY, Arms, Rows, last_of, lost, lowest


def triangulation(rows: Rows) -> dict[str, Any]:
    """Of X1: the lowest cosine of the held rules, -1 where a phase diverged, and at the last weights cosine and norm ratio of
    each arm."""
    held = [row for row in rows if row[0] in map(plotting.label, HELD)]
    arms = (*HELD, "bptt", "recipe_tracking", "recipe_frozen", "ep_uncontrolled")
    return {"x1_cosine": lowest(-1.0 if lost(row[4]) else row[4] for row in held),
            **{f"x1_cosine_{arm}": last_of(rows, arm, 4) for arm in arms},
            **{f"x1_ratio_{arm}": last_of(rows, arm, 6) for arm in arms}}


def one_step(rows: Rows) -> dict[str, Any]:
    """Of X2: what the best step along EP's gradient gains, as a share of what the best along BPTT's does."""
    best = {(row[0], row[1]): row[-1] for row in rows}
    found = {}
    for arm in ("ep", "recipe_tracking", "recipe_frozen"):
        ours, theirs = (best.get((plotting.label(arm), name)) for name in ("EP", "BPTT"))
        found[f"x2_share_{arm}"] = ours / theirs if ours is not None and theirs else None
    return found


def of_runs(rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Of X3 to X6, by the rows of `HISTORY` in each: excursions over all seeds, of what was waited the most, of differences,
    seed by seed, the least."""
    def column(section: str, arm: str, name: str) -> dict[int, Any]:
        return {row[1]: row[HISTORY.index(name)] for row in rows.get(section, []) if row[0] == plotting.label(arm)}

    def waited(arm: str) -> int | None:
        first = list(column("X4", arm, "first task gradient").values())
        return None if not first or None in first else max(first) - 1

    def moved(arm: str) -> float | None:
        ours, held = (column("X6", name, "largest abscissa") for name in (arm, "ep_linear"))
        pairs = [(ours[seed], held[seed]) for seed in ours.keys() & held.keys()]
        return None if any(None in pair for pair in pairs) else min((a - b for a, b in pairs), default=None)

    broken = column("X3", "bptt", "excursions")
    grid = [row[HISTORY.index("final loss")] for row in rows.get("X5", [])]  # from the weakest to the strongest
    return {"x3_excursions": sum(broken.values()) if broken else None,
            "x4_waited": waited("warm_a"), "x4_waited_hot": waited("warm_a_hot"),
            "x5_price": None if len(grid) < 2 or None in (grid[0], grid[-1]) else grid[-1] - grid[0],
            "x6_off": moved("control_off"), "x6_frozen": moved("control_frozen")}


def context(rows: Rows) -> dict[str, Any]:
    """Of X7: by how much what a context is worth to the held rule differs from what it is to backprop."""
    ours, theirs = (last_of(rows, arm, -1) for arm in ("ep_linear", "backprop"))
    return {"x7_difference": None if ours is None or theirs is None else ours - theirs}


def ladder(rows: Rows) -> dict[str, Any]:
    """Of X8, at the weights of the frozen recipe: its own cosine, and what tracking adds to it."""
    at = {row[1]: row[2] for row in rows if row[0] == plotting.label("recipe_frozen")}
    frozen, tracking = at.get("frozen, snapshot of 8 units"), at.get("tracking, snapshot of 8 units")
    return {"x8_frozen": frozen, "x8_tracking": tracking,
            "x8_gain": None if frozen is None or tracking is None else tracking - frozen}


def rescued(rows: Rows) -> float | dict[str, Any] | None:
    """Of T6d: the share of the sequences at which Anderson's method stalled, over all weights, that a homotopy settled; where
    it stalled at none, as results files hold what is not decided; None without rows."""
    left = {name: sum(100 - row[2] for row in rows if row[1] == name) for name in ("Anderson", "Anderson, then Homotopy")}
    if not left["Anderson"]:
        return {"value": None, "undecided": "Anderson's method stalled at no sequence"} if rows else None
    return 1 - left["Anderson, then Homotopy"] / left["Anderson"]


Section = tuple[str, str, dict[str, float]]
SECTIONS: dict[str, Section] = {  # hypothesis, key of the summary, test: those of the claim "campaign-<section>"
    "X1": ("the held rules keep BPTT's direction along training (lowest cosine)", "x1_cosine", {"min": 0.99}),
    "X1b": ("the recipe with a frozen correction has lost it at its last weights (cosine)", "x1_cosine_recipe_frozen",
            {"below": 0.5}),
    "F11": ("the way to the fixed point of the held run contracts (largest Lyapunov exponent)", "f11_lyapunov", {"below": 0.0}),
    "X2": ("one step along EP's gradient gains what one along BPTT's does (share)", "x2_share_ep", {"min": 0.9}),
    "X3": ("BPTT under the same control has no excursion (steps with one)", "x3_excursions", {"equals": 0}),
    "X4": ("at our initial weights warm-up and gate wait for nothing (updates waited)", "x4_waited", {"equals": 0}),
    "X5": ("the strongest Jacobian norm costs loss beside the weakest (nats)", "x5_price", {"above": 0.0}),
    "X6": ("without the controller the spectrum moves right of the held run's (abscissa)", "x6_off", {"above": 0.0}),
    "X7": ("holding the contraction does not cost what a context is worth (nats)", "x7_difference", {"max_abs": 0.05}),
    "X8": ("tracking restores what the frozen correction lost (cosine gained)", "x8_gain", {"above": 0.1}),
    "X9": ("what is wrong with the frozen recipe is a bias (share of the mean square error)", "x9_bias", {"above": 0.5}),
    "X10": ("no parameter group of the held rules loses the direction (lowest cosine)", "x10_lowest", {"min": 0.95}),
    "T6d": ("a homotopy settles half of what Anderson's method does not (share)", "homotopy_rescued", {"min": 0.5})}


def verdicts_on(found: Mapping[str, Any]) -> Rows:
    """A row for each of `SECTIONS`: section, hypothesis, what was asked, what was measured, the verdict."""
    rows = []
    for section, (hypothesis, key, holds) in SECTIONS.items():
        value, [(test, bound)] = found.get(key), holds.items()
        value = value["value"] if isinstance(value, dict) else value
        asked = f"{verdicts.TESTS[test][1]} {bound:g}"
        rows.append([section, hypothesis, asked, None if value is None else f"{value:.4g}",
                     verdicts.UNDECIDED if value is None else verdicts.by_value(holds, value)])
    return rows


def verdict(section: str, found: Mapping[str, Any]) -> str:
    """A section's row in words."""
    [row] = [row for row in verdicts_on(found) if row[0] == section]
    return f"{row[0]}: {row[1]}: {row[3] or 'not measured'}, asked {row[2]}: {row[4]}."


def summary(arms: Arms, runs: list[Run], widths: Mapping[int, Arms], found: Mapping[str, Any]) -> dict[str, Any]:
    """What the paper's text and claims read, with what sections `found`."""
    held = [run for run in runs if run.config.arm in HELD]
    pairs = {"ep_minus_bp": ("ep_linear", "backprop"), "ep_minus_bptt": ("ep_linear", "bptt"), "two_minus_bptt": ("ep", "bptt"),
             "bptt_minus_bp": ("bptt", "backprop"), "recipe_minus_held": ("recipe_tracking", "ep_linear"),
             "frozen_minus_tracking": ("recipe_frozen", "recipe_tracking")}
    return {
        **{key: tables.paired(arms, *pair) for key, pair in pairs.items()},
        **{f"{key}_{width}": tables.paired(some, *pairs[key]) for width, some in widths.items()
           for key in ("ep_minus_bp", "ep_minus_bptt")},
        **{f"loss_{arm}": tables.final(arms, arm) for arm in arms},
        "loss_ep": tables.final(arms, "ep_linear"), "loss_bp": tables.final(arms, "backprop"),
        "excursions_controlled": excursions(run for run in runs if run.config.penalties),
        "excursions_held": excursions(held), "runs_held": len(held),
        **{f"excursions_{name}": excursions(arms.get(arm, ())) for name, arm in (
            ("uncontrolled", "ep_uncontrolled"), ("bptt", "bptt"))},
        "without_gradient": sum(map(tables.without_gradient, runs)),
        "steps": sum(run.config.steps - run.config.first for run in runs),
        "loss_random": runs[0].metrics["baselines"]["random guess"] if runs else None, **found}
