"""E8, hardware realism: disturbances from mild to severe with what they cost, and what a circuit has to do for each rule."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import spectra
from ..blocks import Dynamical
from ..diagnostics import agreement
from ..estimators import Batch, DyadicEP, Estimator, Problem, at_state
from ..models import Model
from ..optimisers import Device, quantised
from ..parallel import Part
from ..runconfig import RunConfig
from ..solvers import Anderson, Relaxation, Solver
from ..store.runs import Run

COST = 0.05  # nats above the perfect hardware's loss up to which a disturbance counts as harmless
COLUMNS = ["disturbance", "strengths tried", "harmless up to", "costs at most (nats)", "fails at", "cosine there"]
CALLS = {"product": "J", "token_product": "J", "transposed": "Jᵀ", "contract": "∂F/∂θ"}
CLOSE = Anderson(step=0.5, max_steps=400, tol=1e-7)


@dataclass(frozen=True)
class Disturbance:
    """What an arm disturbs and how strongly, by its configuration; arms of one disturbance share what stands before the `_`."""

    name: str
    strength: Callable[[Any], float]
    fewer_is_worse: bool = False


DISTURBANCES = {
    "read": Disturbance("noise on the states as read (of their rms)", lambda config: config.estimator.state),
    "nudge": Disturbance("noise on the nudge (of its rms)", lambda config: config.estimator.nudge),
    "weights": Disturbance("weights that fluctuate between the phases", lambda config: config.estimator.mismatch),
    "twin": Disturbance("mismatch of the transposed couplings", lambda config: config.estimator.mismatch),
    "bits": Disturbance("bits of the weights, rounded to nearest", lambda config: config.optimiser.weight_bits, True),
    "random": Disturbance("bits of the weights, rounded at random", lambda config: config.optimiser.weight_bits, True),
    "update": Disturbance("bits of the updates, rounded to nearest", lambda config: config.optimiser.update_bits, True),
    "unequal": Disturbance("asymmetry of the updates, up against down", lambda config: config.optimiser.asymmetry),
    "bound": Disturbance("saturation of the updates", lambda config: config.optimiser.saturation)}


@dataclass(frozen=True)
class Point:
    """A disturbance at one strength: the loss that training ended at (None: not finite) and the gradient's, or the update's,
    cosine with the undisturbed one."""

    strength: float
    loss: float | None
    cosine: float | None = None


def by_strength(runs: Iterable[Run], cosines: Mapping[str, float | None] | None = None) -> dict[str, list[Point]]:
    """The points of every disturbance from mild to severe, mean losses over seeds; cosines: by arm."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        if run.config.arm.partition("_")[0] in DISTURBANCES:
            arms.setdefault(run.config.arm, []).append(run)
    found: dict[str, list[Point]] = {}
    for arm, some in arms.items():
        kind = arm.partition("_")[0]
        losses = [run.metrics["final"]["loss"] for run in some]
        mean = None if None in losses else sum(losses) / len(losses)
        found.setdefault(kind, []).append(Point(DISTURBANCES[kind].strength(some[0].config), mean, (cosines or {}).get(arm)))
    return {kind: sorted(points, key=lambda one: one.strength, reverse=DISTURBANCES[kind].fewer_is_worse)
            for kind, points in found.items()}


def harmless(points: Sequence[Point], perfect: float) -> Point | None:
    """The most severe point up to which every loss is within `COST` of the perfect hardware's."""
    last = None
    for point in points:
        if point.loss is None or point.loss - perfect > COST:
            break
        last = point
    return last


def failing(points: Sequence[Point], frozen: float) -> Point | None:
    """The mildest point at which the block learns nothing: the loss is not below that of a trained readout on a block that is
    left as it was, or not finite."""
    return next((point for point in points if point.loss is None or point.loss >= frozen), None)


def rows(found: Mapping[str, Sequence[Point]], perfect: float, frozen: float) -> list[list[Any]]:
    """A row of `COLUMNS` for each disturbance."""
    made = []
    for kind, points in found.items():
        last, lost = harmless(points, perfect), failing(points, frozen)
        worst = max((point.loss - perfect for point in points if point.loss is not None), default=None)
        made.append([DISTURBANCES[kind].name, f"{points[0].strength:g} … {points[-1].strength:g}",
                     "none of these" if last is None else f"{last.strength:g}", worst,
                     "none of these" if lost is None else f"{lost.strength:g}", (lost or points[-1]).cosine])
    return made


def fidelity(model: Model, inputs: Tensor, targets: Tensor, kinds: Mapping[str, Estimator]) -> dict[str, float | None]:
    """Cosine of each estimator's gradient with the settled linear response's over block and embeddings, at the model's own
    fixed point, in double precision; None where a phase diverged."""
    model = model.double()
    state = model.settle(inputs, CLOSE).value
    exact = at_state(model, inputs, targets, state, DyadicEP(), CLOSE).grads or {}
    found: dict[str, float | None] = {}
    for name, kind in kinds.items():
        grads = at_state(model, inputs, targets, state, kind, CLOSE if kind.second_phase else None).grads
        found[name] = agreement(*map(model.without_readout, (grads, exact)))["total"].cosine if grads else None
    return found


@torch.no_grad()
def written(model: Model, grads: Mapping[str, Tensor], rule: Device) -> float:
    """Cosine of what the devices take up of an update with the update, over all matrices: a step of AdamW's first kind, the
    sign of each gradient times the rate, from weights that the devices hold."""
    draws, asked, taken = torch.Generator().manual_seed(0), [], []
    for name, value in model.named_parameters():
        if value.dim() > 1 and name in grads:
            old = quantised(value, rule.weight_bits) if rule.weight_bits else value
            update = -rule.lr * grads[name] / grads[name].square().mean().sqrt().clamp_min(1e-12)
            asked.append(update.flatten())
            taken.append((rule.written(old, update, draws) - old).flatten())
    return torch.cosine_similarity(torch.cat(asked), torch.cat(taken), dim=0).item()


def kinds_of(runs: Iterable[Run]) -> tuple[dict[str, Estimator], dict[str, Device]]:
    """The disturbed estimators and the device rules among some runs, by arm."""
    configs: dict[str, RunConfig] = {run.config.arm: run.config for run in runs}
    rules = {arm: config.optimiser for arm, config in configs.items() if isinstance(config.optimiser, Device)}
    return {arm: config.estimator for arm, config in configs.items()
            if arm not in rules and arm.partition("_")[0] in DISTURBANCES}, rules


def settling(model: Model, inputs: Tensor, targets: Tensor, tolerances: Iterable[float], step: float = 0.02) -> list[list[Any]]:
    """For each tolerance the time that the free state and the adjoint take to settle under dz/dt = F(z) and, at the settled
    state, da/dt = J^T a + g, in units of the leak's time constant, worst sequence, by explicit steps so small that they do not
    count."""
    settled = model.settle(inputs, replace(CLOSE, tol=1e-5)).value
    problem = Problem(model, inputs, targets, model.clamp(inputs).detach(), settled)
    found = []
    for tol in tolerances:
        slow = Relaxation(step=step, max_steps=round(200 / step), tol=tol)
        free = model.settle(inputs, slow)
        with torch.no_grad():
            adjoint = slow.adjoint(problem.jacobian, problem.slope, problem.scale)
        found.append([tol, *(round(step * phase.steps.max().item(), 3) if (phase.residual <= tol).all() else None
                             for phase in (free, adjoint))])
    return found


def abscissa(model: Model, inputs: Tensor) -> float:
    """The largest real part of the spectrum of J at the fixed points of some sequences."""
    return spectra.edges(model.block, model.settle(inputs, CLOSE).value, model.clamp(inputs).detach(), 0.5)["abscissa"]


class Counted:
    """A block's dynamics that count what a rule asks of them: forces F, products with J, with its transpose, and local
    contractions with dF/dtheta."""

    def __init__(self, block: Dynamical, counts: Counter):
        self.block, self.counts = block, counts

    def start(self, x: Tensor) -> Tensor:
        return self.block.start(x)

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        self.counts["F"] += 1
        return self.block(z, x)

    def linearise(self, z: Tensor, x: Tensor) -> "CountedJacobian":
        return CountedJacobian(type(self.block).linearise(self.block, z, x), self.counts)


class CountedJacobian:
    """The linearisation of `Counted`; what a causal block's has besides passes through."""

    def __init__(self, jacobian: Any, counts: Counter):
        self.jacobian, self.counts = jacobian, counts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.jacobian, name)
        if name not in CALLS:
            return found

        def counted(direction: Tensor) -> Any:
            self.counts[CALLS[name]] += 1
            return found(direction)

        return counted


def asked(model: Model, inputs: Tensor, targets: Tensor, rule: Any, solver: Solver) -> Counter:
    """What one gradient of an estimator, or of a penalty, asks of the dynamics after its free phase: {F, J, Jᵀ, ∂F/∂θ: how
    often, for all trajectories at once}."""
    model, counts = deepcopy(model), Counter[str]()
    free = model.settle(inputs, solver)
    counted: Any = Counted(model.block, counts)
    model.block.linearise = counted.linearise  # type: ignore[method-assign]  # of the copy, for what needs a graph
    batch = Batch(model, inputs, targets, counted, Part.alone(len(inputs)), free.value)
    if isinstance(rule, Estimator):
        rule.gradient(batch, solver, solver if rule.second_phase else None)
        counts["F"] -= 1  # of the free state, which is settled
    else:
        rule(batch.at(free.value), solver.step, {})
    return counts
