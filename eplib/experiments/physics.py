"""E6, the questions of physics: what is measured at a checkpoint, and the verdict on each question with the number behind it.

A verdict is *engineering* where a construction works here, *fundamental* where a proof or a lossless limit says that none can,
and *undecided at this scale* otherwise: what a small model fails at, or too few seeds, proves nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diagnostics import LinearSystem, adjoint_gradient, agreement, dense_jacobian, log_slope, non_reciprocity
from ..estimators import BPTT, AsymEP, DyadicEP, Estimator, VectorField, at_state, gradient
from ..models import Model
from ..solvers import Anderson, Relaxation
from ..store import tables
from ..store.runs import Run
from ..verdicts import FEWEST
from .seeds import shown

ENGINEERING, UNDECIDED = "engineering", "undecided at this scale"
RHO, LOST = "\N{GREEK SMALL LETTER RHO}(S⁻¹A)", "\N{GREEK SMALL LETTER GAMMA}T"  # as tables print them
EXACT = 0.9999  # cosine from which a gradient counts as that of the loss
SAME = 0.02  # nats within which two losses count as the same
ROUTES = {"twin": lambda beta: DyadicEP(), "pair": lambda beta: DyadicEP(beta=beta, held=False),
          "contrast": lambda beta: AsymEP(beta=beta), "vector_field": lambda beta: VectorField(beta=beta)}
FORWARD = ("twin", "pair", "contrast")  # relaxations that reach the adjoint and run forward only
TIGHT = Anderson(step=0.5, max_steps=800, tol=1e-10)
Arms = Mapping[str, list[Run]]


def skewed(ratio: float, size: int = 6) -> Tensor:
    """J = -1 + ratio K (size, size), K antisymmetric with its largest eigenvalue at i: S = -1 whatever the ratio, every
    eigenvalue of J has real part -1, and rho(S^-1 A) is the ratio."""
    raw = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    odd = raw - raw.mT
    odd = odd / torch.linalg.eigvals(odd).abs().max()
    return ratio * odd - torch.eye(size, dtype=torch.float64)


def routes(ratio: float, beta: float = 1e-3) -> dict[str, Any]:
    """On F = J z + u, J `skewed(ratio)`: rho, and by each route to the adjoint the cosine of its gradient with the closed form
    and the steps that its plain relaxation took, at the step 1 / (1 + ratio^2), which contracts best."""
    matrix = skewed(ratio)
    system, draws = LinearSystem(matrix, torch.eye(len(matrix), dtype=torch.float64)), torch.Generator().manual_seed(0)
    drive, goal = (torch.randn(8, len(matrix), generator=draws, dtype=torch.float64) for _ in range(2))
    exact = system.closed_form(drive, goal)["inflow"].flatten()
    solver = Relaxation(step=1 / (1 + ratio**2), max_steps=10_000, tol=1e-8)
    found: dict[str, Any] = {"rho": non_reciprocity(matrix).rho}
    for name, make in ROUTES.items():
        report = gradient(system, drive, goal, estimator=make(beta), solver=solver, nudged=solver)
        found[name] = None if report.grads is None else torch.cosine_similarity(
            report.grads["inflow"].flatten(), exact, dim=0).item()
        found[f"{name}_steps"] = int(report.nudged.steps.max()) if report.nudged else None
    return found


def growth(jacobian: Tensor, first: float = 0.25, doublings: int = 6) -> float:
    """The largest ||exp(t J)|| of a dense J (n, n) over t = 0 and first 2^k: how much a deviation can grow before it decays."""
    flow, largest = torch.linalg.matrix_exp(first * jacobian), 1.0
    for _ in range(doublings):
        largest = max(largest, torch.linalg.matrix_norm(flow, 2).item())
        flow = flow @ flow
    return largest


def kreiss(jacobian: Tensor, radii: Sequence[float] = (0.1, 0.3, 1.0, 3.0), angles: Sequence[float] = (0.0, 1.2)) -> float:
    """A lower bound on Kreiss's constant sup Re(s) ||(s - J)^-1|| over Re(s) > 0, at s = r exp(i angle), and so on the
    largest ||exp(t J)||, without any t (Kreiss 1962)."""
    eye, found = torch.eye(len(jacobian), dtype=torch.complex128), 1.0  # its limit for large s
    for radius in radii:
        for angle in angles:
            s = radius * complex(math.cos(angle), math.sin(angle))
            found = max(found, s.real / torch.linalg.svdvals(s * eye - jacobian)[-1].item())
    return found


def operator(model: Model, inputs: Tensor, targets: Tensor, step: float, beta: float = 1e-3) -> dict[str, Any]:
    """At the fixed point of one sequence, in double precision, from the dense Jacobian: abscissa, numerical abscissa,
    asymmetry ||A|| / ||S||, rho(S^-1 A), spectral radius `radius` of I + step J, `growth`, `kreiss`, and the cosine of each
    route's gradient with the dense adjoint's, over block and embeddings. None where a phase diverged."""
    model = model.double()
    free = model.settle(inputs, TIGHT)
    if not free.status.usable:
        return dict.fromkeys(("abscissa", "numerical_abscissa", "asymmetry", "rho", "radius", "growth", "kreiss", *ROUTES))
    jacobian = dense_jacobian(model, model.clamp(inputs), free.value)
    truth = adjoint_gradient(model, inputs, targets, free.value)
    found: dict[str, Any] = {**vars(non_reciprocity(jacobian)), "growth": growth(jacobian), "kreiss": kreiss(jacobian),
                             "radius": (1 + step * torch.linalg.eigvals(jacobian)).abs().max().item()}
    for name, make in ROUTES.items():
        found[name] = cosine(model, inputs, targets, free.value, make(beta), truth)
    return found


def cosine(model: Model, inputs: Tensor, targets: Tensor, state: Tensor, estimator: Estimator,
           truth: dict[str, Tensor]) -> float | None:
    """Of an estimator's gradient at a settled state with the true one, over block and embeddings."""
    found = at_state(model, inputs, targets, state, estimator, Anderson(step=0.5, max_steps=800, tol=1e-7))
    if found.grads is None:
        return None
    return agreement(*map(model.without_readout, (found.grads, truth)))["total"].cosine


@torch.no_grad()
def scaled(model: Model, factor: float) -> Model:
    """The model with both output matrices of its block multiplied: what moves the contraction rate towards 1 and past it."""
    for name, value in model.block.named_parameters():
        if name.endswith(("wo.weight", "w2.weight")):
            value.mul_(factor)
    return model


def horizons(model: Model, inputs: Tensor, targets: Tensor, step: float, counts: Iterable[int]) -> dict[str, Any]:
    """Spectral radius r of I + step J at the fixed point of one sequence, the norm of the gradient there, and the relative
    error of BPTT over each of `counts` steps against it; no errors where the fixed point is not reached."""
    model = model.double()
    free = model.settle(inputs, TIGHT)
    if not free.status.usable or not (free.residual <= 1e-8).all():
        return {"radius": None, "norm": None, "errors": []}
    jacobian = dense_jacobian(model, model.clamp(inputs), free.value)
    truth = model.without_readout(adjoint_gradient(model, inputs, targets, free.value))
    errors = []
    for count in counts:
        found = gradient(model, inputs, targets, estimator=BPTT(steps=count), solver=Relaxation(step=step)).grads
        errors.append({"steps": count, "error": found and agreement(model.without_readout(found), truth)["total"].error})
    return {"radius": (1 + step * torch.linalg.eigvals(jacobian)).abs().max().item(), "errors": errors,
            "norm": torch.stack([value.norm() for value in truth.values()]).norm().item()}


def decay(found: dict[str, Any], below: float = 0.3, above: float = 1e-7) -> float | None:
    """The rate at which BPTT's error falls with its horizon K, as a share of that of r^K: 1 where the finite horizon lacks
    nothing but what has not settled. From the errors between the bounds; None for fewer than two."""
    points = [(one["steps"], one["error"]) for one in found["errors"] if one["error"] and above < one["error"] < below]
    if len(points) < 2 or not found["radius"] or found["radius"] >= 1:
        return None
    steps, errors = zip(*points, strict=True)
    return float(np.polyfit(steps, np.log(errors), 1)[0] / math.log(found["radius"]))


def norm_slope(found: Iterable[dict[str, Any]]) -> float | None:
    """Exponent of the fixed point's gradient norm in 1 / (1 - r), over at least two settled models."""
    points = [(1 / (1 - one["radius"]), one["norm"]) for one in found if one["radius"] and one["radius"] < 1]
    return log_slope(*map(list, zip(*points, strict=True))) if len({x for x, _ in points}) > 1 else None


@dataclass(frozen=True)
class Verdict:
    """question: its number and what was asked; measured: what was found, in words; number: what the verdict rests on."""

    question: str
    measured: str
    number: float | None
    verdict: str

    @property
    def sentence(self) -> str:
        """What was measured and what it says, for the reading."""
        return f"{self.measured}: {'no value' if self.number is None else f'{self.number:.4g}'}. Verdict: {self.verdict}."

    @property
    def row(self) -> list[Any]:
        return [self.question, self.measured, self.number, self.verdict]


def unmeasured(question: str) -> Verdict:
    """Of a question whose runs are not recorded."""
    return Verdict(question, "not measured", None, UNDECIDED)


def within(gap: Mapping[str, Any]) -> bool:
    """Whether the 95 % interval over paired seeds (`tables.paired`) says that a loss is higher by no more than `SAME`."""
    return not gap.get("undecided") and gap["n"] >= FEWEST and gap["high"] <= SAME


def price(gap: Mapping[str, Any], of: float | None, below: float | None) -> dict[str, Any]:
    """A difference of losses as the price of having brought a quantity `of` below a bound: undecided where that is not so."""
    plain = not gap["n"] or (of is not None and below is not None and of < below)  # without runs there is nothing to explain
    return dict(gap) if plain else {**gap, "undecided": gap.get("undecided") or "what it is the price of was not reached"}


def cheapest(arms: Arms, measured: Mapping[str, Any]) -> tuple[str, dict] | None:
    """Of the arms whose rho(S^-1 A) is below 1, the one with the smallest mean loss above the arm `free`, with that
    difference."""
    gaps = {arm: tables.paired(arms, arm, "free") for arm in arms
            if arm != "free" and (rho := (measured.get(arm) or {}).get("rho")) is not None and rho < 1}
    known = {arm: gap for arm, gap in gaps.items() if gap["mean"] is not None}
    return min(known.items(), key=lambda one: one[1]["mean"]) if known else None


def reached(losses: Mapping[int, Mapping[float, float]]) -> dict[int, float | None]:
    """For each width the largest margin at which its loss is not above the lowest of the narrowest width; {width: {margin:
    loss}} -> {width: margin}, None where no margin does."""
    if not losses:
        return {}
    best = min(losses[min(losses)].values())
    return {width: max((margin for margin, loss in some.items() if loss <= best), default=None)
            for width, some in sorted(losses.items())}


def lowest(places: Iterable[Mapping[str, Any]]) -> float:
    """The smallest cosine with the adjoint of a forward relaxation at any of these places, -1 where one did not settle."""
    return min(-1.0 if place[route] is None else place[route] for place in places for route in FORWARD)


def q1(points: Sequence[Mapping[str, Any]], checkpoints: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """The adjoint by forward relaxation only, at any asymmetry."""
    places = [*points, *checkpoints.values()]
    cosine = lowest(places) if checkpoints else None  # a construction alone says nothing of a trained block
    plain = min((place["vector_field"] for place in places if place["vector_field"] is not None), default=None)
    rho = max((place["rho"] for place in places if place["rho"] is not None), default=math.nan)
    known = "" if checkpoints else f" {lowest(places):.6f} on the construction (trained blocks: not recorded)"
    said = f"three forward relaxations, {RHO} up to {rho:.3g}: smallest cosine{known}; uncorrected {shown(plain)}"
    return Verdict("Q1: is the adjoint out of reach of forward relaxations?", said, cosine,
                   ENGINEERING if cosine is not None and cosine >= EXACT else UNDECIDED)


def q2(arms: Arms, measured: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Whether good solutions need rho(S^-1 A) > 1 where their contraction is held."""
    asked = f"Q2: does a good solution need {RHO} > 1?"
    free = (measured.get("free") or {}).get("rho")
    if free is None:
        return unmeasured(asked)
    if free < 1:
        return Verdict(asked, f"{RHO} of the arm that nothing lowers", free, ENGINEERING)
    found = cheapest(arms, measured)
    if found is None:
        return Verdict(asked, f"no arm with {RHO} < 1 to compare", free, UNDECIDED)
    arm, gap = found
    said = f"{arm} has {RHO} = {measured[arm]['rho']:.2f} against {free:.2f} of free; its loss minus that of free (nats)"
    return Verdict(asked, said, gap["mean"], ENGINEERING if within(gap) else UNDECIDED)


def q3(points: Sequence[Mapping[str, Any]], echoes: Sequence[Mapping[str, float]], small: float = 0.01) -> Verdict:
    """Whether a substrate can compute its own adjoint: a twin with a mismatch, and the echo. points: {mismatch, cosine};
    echoes: {lost, cosine}, lost = gamma T."""
    asked = "Q3: can the substrate compute its own adjoint?"
    inside = [-1.0 if one["cosine"] is None else one["cosine"] for one in points if one["mismatch"] <= small]
    if not inside:
        return unmeasured(asked)
    damped = next((one for one in echoes if one["cosine"] < 0.9), None)
    said = f"an echo is exact without loss, {damped['cosine']:.2f} at {LOST} = {damped['lost']:g}; " if damped else ""
    said += f"a transposed twin with {100 * small:g} % mismatch: smallest cosine"
    return Verdict(asked, said, min(inside), ENGINEERING if min(inside) >= 0.99 else UNDECIDED)


def q4(shares: Sequence[float | None]) -> Verdict:
    """Whether a finite horizon is another primitive, or only what has not settled yet: `decay` at several rates."""
    asked = "Q4: is a finite horizon another gradient?"
    known = [share for share in shares if share is not None]
    if not known:
        return unmeasured(asked)
    worst = max(known, key=lambda share: abs(share - 1))
    said = f"its error falls as r^K at {len(known)} rates r: the exponent over that of r^K, furthest from 1"
    return Verdict(asked, said, worst,
                   ENGINEERING if len(known) > 1 and abs(worst - 1) <= 0.1 else UNDECIDED)


def q5(arms: Arms, measured: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Whether transient growth is needed: the passive arm, whose numerical abscissa is held below zero."""
    asked = "Q5: does non-normal growth have to be paid for?"
    gap = tables.paired(arms, "passive", "free")
    if gap["mean"] is None:
        return unmeasured(asked)
    grown = [(measured.get(arm) or {}).get("growth") for arm in ("passive", "free")]
    said = f"largest ‖exp(tJ)‖ {shown(grown[0])} against {shown(grown[1])} of free; loss of passive minus free (nats)"
    edge = (measured.get("passive") or {}).get("numerical_abscissa")  # below zero nothing grows, which is what is asked
    return Verdict(asked, said, gap["mean"],
                   ENGINEERING if edge is not None and edge < 0 and within(gap) else UNDECIDED)


def q6(shares: Mapping[float, list[Run]], measured: Mapping[float, Mapping[str, Any]]) -> Verdict:
    """What symmetric attention costs, and whether fidelity has to be bought by it. {share: runs}, {share: operator}."""
    asked = "Q6: is conservative attention's price fundamental?"
    arms = {f"{share:g}": runs for share, runs in shares.items()}
    gap = tables.paired(arms, "0", "1")
    if gap["mean"] is None:
        return unmeasured(asked)
    corrected = min((one["contrast"] for one in measured.values() if one["contrast"] is not None), default=None)
    plain = min((one["vector_field"] for one in measured.values() if one["vector_field"] is not None), default=None)
    said = f"corrected cosine {shown(corrected, 4)} at every share, uncorrected down to {shown(plain)}; loss of energy minus " \
           "free attention (nats)"
    return Verdict(asked, said, gap["mean"], ENGINEERING if within(gap) else UNDECIDED)


def q7(seeds: Sequence[Mapping[int, Mapping[float, float]]]) -> Verdict:
    """Whether width buys margin: `reached` of each seed's losses."""
    asked = "Q7: what margin does a model of given loss need?"
    found = [reached(losses) for losses in seeds if losses]
    if not found:
        return unmeasured(asked)
    gains = [margins[max(margins)] - margins[min(margins)] for margins in found  # type: ignore[operator]
             if None not in (margins[max(margins)], margins[min(margins)])]
    mean = sum(gains) / len(gains) if gains else None
    grew = len(gains) >= FEWEST and all(gain > 0 for gain in gains)
    return Verdict(asked, "how much further left of zero the widest may be held than the narrowest at the same loss", mean,
                   ENGINEERING if grew else UNDECIDED)
