"""E4: what the campaign's runs say: losses, histories, the gap with width, costs of sizes not trained."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import plotting
from ..models import Transformer
from ..runconfig import RunConfig
from ..settings import ROOT, name_of
from ..store import tables
from ..store.comparisons import best_of_grid, compare, differences
from ..store.runs import Run
from ..tasks import Tokens
from . import seeds, stability

Arms = dict[str, list[Run]]
Rows = list[list[Any]]
LOSSES = ["arm", "learning rate", "seed", "validation loss", "at the fixed point", "settled (%)", "excursions",
          "without gradient", "spectral radius", "at step", "largest abscissa", "its frequency"]
HISTORY = ["arm", "seed", "best loss", "at step", "final loss", "settled (%)", "excursions", "first at", "gated",
           "first task gradient", "strength at the end", "largest abscissa"]
PAIRS = {"EP, two trajectories - BPTT": ("ep", "bptt"), "EP, linear response - BPTT": ("ep_linear", "bptt"),
         "EP, linear response - backprop": ("ep_linear", "backprop"), "BPTT - backprop": ("bptt", "backprop")}
HELD = ("ep", "ep_linear")
PRINTS = {"residual": "free residual", "cosine_uncorrected": "cosine without correction", "abscissa": "abscissa",
          "numerical_abscissa": "numerical abscissa", "rate_arnoldi": "rate", "lyapunov": "Lyapunov exponent",
          "frequency": "frequency", "transient_growth": "transient growth", "asymmetry": "asymmetry",
          "attention_distance": "attention distance"}  # of a fingerprint
FORWARD_AND_BACK = 3  # in evaluations: what is computed once and differentiated
KNOWN = {"backprop": 3.0, "bptt": 3.0 * 64}  # evaluations of a step that need no run: BPTT over the paper profile's 64 steps


def names(runs: Iterable[Run]) -> list[str]:
    """What a table of weights is of."""
    return [run.name for run in runs]


def rows_of(profile: str, table: str, runs: Iterable[Run], measure: Callable[[], Rows], root: Path = ROOT) -> Rows:
    """The rows of a table of the runs' weights: measured where all of these are here, else those that were recorded of the very
    same runs, as results travel and weights do not; none where there are neither."""
    runs = list(runs)
    if runs and all(run.has_weights() for run in runs):
        return measure()
    path = root / "results" / name_of(profile) / "campaign" / f"{table}.json"
    recorded = json.loads(path.read_text()) if path.exists() else {}
    return recorded["rows"] if runs and recorded.get("of") == names(runs) else []


def losses(arms: Arms) -> Rows:
    """A row of `LOSSES` for each run; no spectrum where fewer than enough sequences settled: there is no fixed point to take it
    at."""
    rows = []
    for arm, run in ((arm, run) for arm, chosen in arms.items() for run in chosen):
        settled = not run.config.model.explicit and tables.settled_cold(run)[0] >= tables.ENOUGH
        mode = stability.rightmost(run) if settled and stability.measured(run) else None
        rows.append([plotting.label(arm), run.config.optimiser.lr, run.config.seed, run.metrics["final"]["loss"],
                     tables.at_fixed_point(run), tables.settled_cell([run]), run.metrics["excursions"],
                     tables.without_gradient(run), run.metrics["rate_arnoldi"] if settled else None,
                     stability.rate_step(run) if settled else None,
                     mode and mode.abscissa, mode and mode.frequency])
    return rows


def histories_of(arms: Arms, since: int = 0) -> Rows:
    """A row of `HISTORY` for each run, from its log: when it was best, when it broke, from when on it learned its task; the
    abscissa over the evaluations after update `since`."""
    rows = []
    for arm, run in ((arm, run) for arm, chosen in arms.items() for run in chosen):
        m, log = run.metrics, run.log
        learned = log["step"][log["task_gradient"] > 0]
        strengths = log.get("rate_coefficient", log["coefficient"])
        there = strengths[[math.isfinite(one) for one in strengths]]
        mode = None if run.config.model.explicit else stability.rightmost(run, since / run.config.steps)
        rows.append([plotting.label(arm), run.config.seed, m["best_loss"], m["best_step"], m["final"]["loss"],
                     tables.settled_cell([run]), m["excursions"], m["first_excursion"], m["gated"],
                     int(learned[0]) if len(learned) else None, float(there[-1]) if len(there) else None,
                     mode.abscissa if mode and math.isfinite(mode.abscissa) else None])
    return rows


def by_width(runs: Iterable[Run]) -> dict[int, Arms]:
    """The runs of language models by width, each arm at its best learning rate there."""
    found: dict[int, list[Run]] = {}
    for run in runs:
        if isinstance(run.config.model, Transformer) and run.config.branch is None:
            found.setdefault(run.config.model.width, []).append(run)
    return {width: best_of_grid(found[width]) for width in sorted(found)}


def gaps(widths: Mapping[int, Arms]) -> Rows:
    """For each width and pair of `PAIRS` the difference of final losses, seed by seed: width, pair, mean, low, high, seeds, in
    words, whether it is decided."""
    rows = []
    for width, arms in widths.items():
        for name, (ours, theirs) in PAIRS.items():
            seen = compare(differences(arms, ours, theirs))
            if seen.pairs:
                behind = [*arms[ours], *arms[theirs]]
                rows.append([width, name, seen.mean, seen.low, seen.high, seen.pairs, seeds.interval(seen, 4),
                             "yes" if seeds.decides(seen, behind) else "no"])
    return rows


COSTS = ["width", "context", "batch", "arm", "parameters", "evaluations a step", "TFLOP a step", "steps", "hours at 1 TFLOP/s"]
SIZES = {512: {"heads": 16, "context": 256, "batch": 24, "steps": 20_000},  # the reference's
         2048: {"heads": 16, "context": 512, "batch": 16, "steps": 24_000}}


def cost(config: RunConfig, vocab: int, evaluations: float) -> dict[str, float]:
    """Of a run of a language model on so many tokens of vocabulary, whose step takes so many force evaluations: its parameters,
    and the floating-point operations of a step and of all of it, by counting the matrix products of a block (12 C^2 weights,
    and 2 T C for the two products of attention, each twice a token) and of the readout."""
    shape: Any = config.model
    width, context = shape.width, shape.context
    with torch.device("meta"):
        parameters = sum(value.numel() for value in shape.build(Tokens(vocab=vocab, context=context)).parameters())
    force = 2 * (12 * width**2 + 2 * context * width)
    step = config.batch * context * (force * evaluations + FORWARD_AND_BACK * 2 * width * vocab)
    return {"parameters": parameters, "step": step, "run": step * config.steps}


def costs(like: RunConfig, spent: Mapping[str, float], vocab: int = 4096) -> Rows:
    """A row of `COSTS` for each of `SIZES` and of the arms whose evaluations of a step are known."""
    rows: Rows = []
    spent = KNOWN | dict(spent)
    for width, size in SIZES.items():
        shape: Any = like.model
        shape = replace(shape, width=width, heads=size["heads"], context=size["context"])
        config = replace(like, model=shape, batch=size["batch"], steps=size["steps"], keep=())
        for arm in (arm for arm in ("backprop", "ep_linear", "ep", "bptt", "recipe_tracking") if arm in spent):
            one = cost(config, vocab, spent[arm])
            rows.append([width, size["context"], config.batch, plotting.label(arm), int(one["parameters"]),
                         round(spent[arm], 1), one["step"] / 1e12, config.steps, one["run"] / 1e12 / 3600])
    return rows


def last_of(rows: Rows, arm: str, column: int, key: int = 0) -> float | None:
    """A column of an arm's last row; None where the arm has no row."""
    mine = [row[column] for row in rows if row[key] == plotting.label(arm)]
    return mine[-1] if mine else None


def lost(value: float | None) -> bool:
    """Whether a phase that diverged left no number."""
    return value is None or not math.isfinite(value)


def lowest(values: Iterable[float | None]) -> float | None:
    """The lowest of those that are numbers; None where none is."""
    return min((value for value in values if value is not None and math.isfinite(value)), default=None)


def evaluations(widths: Mapping[int, Arms]) -> dict[str, float]:
    """Force evaluations of a step of each arm, mean over the widths at which it was trained."""
    found: dict[str, list[float]] = {}
    for arms in widths.values():
        for arm, some in arms.items():
            if (spent := tables.evaluations_a_step(some)) is not None:
                found.setdefault(arm, []).append(spent)
    return {arm: statistics.fmean(some) for arm, some in found.items()}
