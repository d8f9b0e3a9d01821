"""The nudged phase: trajectories relaxed under the loss's pull and contrasted with the free state.

A nudged phase relaxes states z_k under F - beta_k g - correction, all trajectories of all samples as one batch, and combines
them into the adjoint state a = -dz/dbeta at beta = 0. `estimators` says which nudges, weights and correction.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..calculus import uncompiled
from ..families import Family
from ..intact import bare, compiled
from ..models import EquilibriumModel
from ..solvers import Differences, Solution, Solver, Status, norm

# Float spacings of z*, times sum |w_k|, below which the slope's own size is no unit for a contrast's residual: a force has a
# round-off of about half a spacing, and a hundredth of the unit, shared by the trajectories, is to be within reach.
ROUNDING = 256.0


class DerivativeError(RuntimeError):
    """A block's derivative that does not fit its parameters: the message names the parameter and what is asked of it."""


@dataclass(frozen=True)
class Problem:
    """One batch at its free equilibrium: what an estimator may look at. x (B, ...) and state (B, ...) without a graph.

    carried: tensors from the last call (random signs, feedback matrices), which an estimator may replace. dynamics: what
    computes the block, by default the model's block itself (`EquilibriumModel.dynamics`).
    """

    model: EquilibriumModel
    inputs: Tensor
    targets: Tensor
    x: Tensor
    state: Tensor
    carried: dict[str, Tensor] = field(default_factory=dict)
    dynamics: Any = None

    def __post_init__(self) -> None:
        if self.dynamics is None:
            object.__setattr__(self, "dynamics", self.model.block)

    def force(self, z: Tensor) -> Tensor:
        """F(z) for states (B, ...) or for several per sample, (B, K, ...)."""
        return self.dynamics(z, self._lift(z))

    def nudged(self, z: Tensor, pull: Tensor, rest: Tensor | float = 0.0) -> Tensor:
        """F(z) - rest under the loss's pull; a block whose state is held in a box takes the pull inside it."""
        within = getattr(bare(self.model.block), "nudged", None)
        return self.force(z) - rest - pull if within is None else within(z, self._lift(z), pull) - rest

    def loss_slope(self, z: Tensor) -> Tensor:
        """g = d l_b / d z_b, same shape as z; several states per sample (B, K, ...) share the sample's targets.

        For complex z the derivative of the loss's holomorphic extension.
        """
        many = z.dim() > self.state.dim()
        targets = self.targets.repeat_interleave(z.shape[1], 0) if many else self.targets
        with torch.enable_grad():
            flat = (z.flatten(0, 1) if many else z).detach().requires_grad_()
            losses = self.model.loss(self.model.block.output(flat), targets)
            slope, = torch.autograd.grad(losses, flat, torch.ones_like(losses))
        if z.is_complex() and not losses.is_complex():
            raise TypeError(f"the loss of {type(self.model).__name__} is real for complex states: it has no holomorphic "
                            "extension; use a real nudge")
        return slope.conj().resolve_conj().view_as(z)  # torch gives the conjugate of a holomorphic function's derivative

    @cached_property
    def readout(self) -> tuple[float, Tensor, dict[str, Tensor]]:
        """At the free state, by one backward pass: the mean loss, g, and the mean loss's direct gradient in each parameter that
        it reaches without the state."""
        with torch.enable_grad():
            z = self.state.detach().requires_grad_()
            losses = self.model.loss(self.model.block.output(z), self.targets)
            names, values = zip(*((n, p) for n, p in self.model.named_parameters() if p.requires_grad), strict=True)
            slope, *grads = torch.autograd.grad(losses.sum(), (z, *values), allow_unused=True)
        direct = {n: grad / len(losses) for n, grad in zip(names, grads, strict=True) if grad is not None}
        return losses.mean().item(), slope, direct

    @cached_property
    def slope(self) -> Tensor:
        """g at the free state."""
        return self.readout[1]

    @cached_property
    def scale(self) -> Tensor:
        """||g|| of each sample at the free state, in which residuals of a nudged phase are counted: (B,)."""
        return norm(self.slope).clamp_min(torch.finfo(self.state.dtype).tiny)

    def linearise(self, z: Tensor) -> Any:
        """J at z, kept without a graph."""
        with torch.no_grad():
            return self.dynamics.linearise(z, self._lift(z))

    @cached_property
    def jacobian(self) -> Any:
        """J at the free state. Raises TypeError where torch.compile's version of the block is not that block: it may have been
        made before a hook was registered, or have hooks of its own."""
        if self.dynamics is self.model.block and compiled(self.dynamics):
            away = self.state / 2  # not at F = 0, where a hook's factor is not seen
            with torch.no_grad(), uncompiled():
                plain = bare(self.dynamics)(away, self.x)
            apart = norm(self.force(away) - plain) / norm(away)
            if apart.max() > torch.finfo(self.state.dtype).eps ** 0.5:
                raise TypeError(f"what torch.compile made of {self._kind} computes another force than the block, "
                                f"{apart.max():.1e} of the state's norm apart; register hooks on the block, then compile it")
        return self.linearise(self.state)

    def named(self, block: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values by the model's own names from {name in the block: value of the parameter's shape}, which is emptied; summed
        where the block has one parameter under several names. Raises `DerivativeError` for a name that the block does not
        have."""
        names = {id(value): name for name, value in self.model.named_parameters()}
        known = dict(bare(self.model.block).named_parameters(remove_duplicate=False))
        found: dict[str, Tensor] = {}
        while block:
            own, value = block.popitem()
            if own not in known or known[own].shape != value.shape:
                expected = f"a parameter of shape {tuple(known[own].shape)}" if own in known else "no parameter"
                raise DerivativeError(f"the derivative of {self._kind} gives {own!r} a gradient of shape {tuple(value.shape)}, "
                                      f"but {own!r} is {expected} of the block; contract returns one for each by its name")
            name = names[id(known[own])]
            found[name] = found[name] + value if name in found else value
        return found

    def gradient(self, block: dict[str, Tensor], into: Tensor) -> dict[str, Tensor]:
        """The mean loss's gradient in every parameter that requires one, through the dynamics and directly.

        block: its sums over the batch in the block's weights, which is emptied: no second copy of the size of the weights. into
        (B, T, C): the same for the clamp x of each sample. Only what leads to x and from h to the loss, embeddings and readout,
        is differentiated automatically. Raises `DerivativeError` for a weight that the force depends on and that got nothing.
        """
        model, batch = self.model, self.state.shape[0]
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        moved = self.named(block)
        with torch.enable_grad():
            x, weights = model.clamp(self.inputs), list(trained.values())
            clamped = torch.autograd.grad((into * x).sum(), weights, allow_unused=True) if x.requires_grad else ()
        through = {name: value for name, value in zip(trained, clamped, strict=False) if value is not None}
        self._check(trained, moved.keys() | through.keys())
        holders = Counter(value.untyped_storage().data_ptr() for part in (through, moved) for value in part.values())

        def mean(total: Tensor) -> Tensor:  # in place, but where another gradient, or another entry, may have the same memory
            apart = holders[total.untyped_storage().data_ptr()] == 1 and 0 not in total.stride()
            return total.div_(batch) if apart else total / batch

        grads: dict[str, Tensor] = {}
        for name, value in trained.items():
            parts = [mean(part.pop(name)) for part in (through, moved) if name in part]
            parts += [self.readout[2][name]] if name in self.readout[2] else []
            grads[name] = sum(parts[1:], parts[0]) if parts else torch.zeros_like(value)
        return grads

    def _check(self, trained: Mapping[str, Tensor], reached: set[str]) -> None:
        """That the force depends on none of the block's trained parameters that were not reached, decided by autograd."""
        inside = {id(value) for value in self.model.block.parameters()}
        left = {name: value for name, value in trained.items() if id(value) in inside and name not in reached}
        if not left:
            return
        with torch.enable_grad():
            force = bare(self.model.block)(self.state, self.x)
            found = torch.autograd.grad(force.sum(), list(left.values()), allow_unused=True) if force.requires_grad else ()
        lost = [name for name, value in zip(left, found, strict=False) if value is not None]
        if lost:
            raise DerivativeError(f"the force of {self._kind} depends on {', '.join(lost)}, of which its derivative gives no "
                                  "gradient; contract must return one for each by its name in the block (or leave linearise to "
                                  "blocks.Dynamical)")

    @property
    def _kind(self) -> str:
        return type(bare(self.model.block)).__name__

    def _lift(self, z: Tensor) -> Tensor:
        return self.x.unsqueeze(1) if z.dim() > self.state.dim() else self.x


# The unit of cost is a force evaluation of the whole batch, wherever cost is counted. A linearisation, and a product with J or
# J^T however it is computed, count as one; a backward pass through a graph as two for each of these in it, and so does the
# contraction <a, dF/dtheta>. The readout and the embedding are outside the dynamics and do not count.
FORCE = LINEARISATION = PRODUCT = 1
BACKWARD = 2

Steps = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(gt=0)]


class Estimator(Family):
    """How the gradient is found. What an estimator uses of what `gradient` offers is said by its class: one of your own
    overrides what differs.

    equilibrium: it needs a settled free phase. second_phase: a solver solves a nudged or adjoint phase for it, in at most
    `steps`, which it then has. compiled: the compiled kernel computes something of it. explicit: it is for blocks whose start
    state is the answer. rounds: its second phase may begin in half precision, which two states to be contrasted may not.
    """

    equilibrium = second_phase = compiled = True
    explicit = rounds = False


@dataclass(frozen=True)
class Adjoint:
    """a (B, ...) = -J^-T g as an estimator found it, the phase it came from, the largest displacement ||z_beta - z*|| / ||z*||
    of each sample (B,), the cost in force evaluations but for the linearisation at the free state, and what else was
    measured."""

    value: Tensor
    phase: Solution | None
    displacement: Tensor | None
    evaluations: int
    measured: dict[str, float] = field(default_factory=dict)


def lanes(values: Tensor, like: Tensor) -> Tensor:
    """Values (B, K) as factors of states (B, K, ...)."""
    return values.view(*values.shape, *(1,) * (like.dim() - 1))


def contrast(problem: Problem, nudges: Tensor, weights: Tensor, solver: Solver, correction: Callable[[Tensor], Tensor] | None,
             cost: int, response: Tensor | None = None, held: Any = None) -> tuple[Adjoint, Tensor]:
    """Relaxes z_k under F - beta_k g - correction, all as one batch (B, K, ...), and contrasts them: a = -Re sum_k w_k (z_k -
    z*).

    nudges beta_k and weights w_k are (B or 1, K), real or complex. The residual is that of the contrast relative to the slope,
    ||Re sum_k w_k F_k|| / ||g(z*)||: times the step it is the increment of a. A slope below what the contrast can resolve of
    the state counts as that (`ROUNDING`). Where the weights sum to zero the free phase's own residual, which moves all
    trajectories alike, drops out; a single one, which it would move by itself, relaxes under forces relative to F(z*). The
    trajectories start at z* - beta_k response, by default at z*. held: J at z*, where that is what the correction consists of.
    Returns the final states as well.
    """
    centre = problem.state.unsqueeze(1)  # (B, 1, ...)
    factors, shares = lanes(nudges, problem.state), lanes(weights, problem.state)
    spacing = torch.finfo(problem.state.dtype).eps * norm(problem.state) * weights.abs().sum(1)
    unit = torch.maximum(problem.scale, ROUNDING * spacing)

    rest: Tensor | float = 0.0

    def force(states: Tensor) -> Tensor:
        push = problem.nudged(states, factors * problem.loss_slope(states), rest)
        return push if correction is None else push - correction(states)

    def combine(states: Tensor) -> Tensor:
        total = (shares * states).sum(1)
        return total.real if total.is_complex() else total

    def residual(push: Tensor, _: Tensor) -> Tensor:
        return norm(combine(push)) / unit

    own_loop = solver.in_kernel and hasattr(held or problem.dynamics, "relax")
    if own_loop and (correction is None or held is not None):
        # what each trajectory may leave: the contrast adds K of them up, and half of the tolerance is for the slope's change
        allowed = unit.unsqueeze(1) / (2 * weights.shape[1] * weights.abs())
        phase = _in_rounds(problem, solver, factors, allowed, held, response, residual)
    else:
        alone = weights.shape[1] == 1
        rest = problem.force(centre) if alone else rest
        start = centre.repeat_interleave(factors.shape[1], 1).to(factors.dtype)
        if response is not None:
            start = start - factors * response.unsqueeze(1)
        phase = solver.solve(force, start, residual)
        phase = replace(phase, evaluations=phase.evaluations * cost + FORCE * alone)
    away = phase.value - centre
    displacement = torch.stack([norm(one) for one in away.unbind(1)]).amax(0) / norm(problem.state)
    return Adjoint(-combine(away), phase, displacement, phase.evaluations), phase.value


def _in_rounds(problem: Problem, solver: Solver, nudges: Tensor, allowed: Tensor, held: Any, response: Tensor | None,
               measure: Callable[[Tensor, Tensor], Tensor]) -> Solution:
    """The nudged phase from z*, where the backend has a phase's loop but not the loss: in rounds, Anderson's method over them.

    A round without a correction settles each trajectory under F(z) - F(z*) - beta_k g with the slope g held; one with the
    correction, of which J at z* is held, solves J^T dz = -F_k for what its force F_k leaves. The forces are relative to that at
    z*, so the trajectory of beta = 0 rests there. At z* the forces with the correction are -beta_k g, multiples of one another,
    so the first such round is one solve, the linear response, which may be given. allowed (B, K): what a trajectory may leave,
    in units of the tolerance. A sample's steps are those of all its rounds; it begins no other once they have reached
    `max_steps`.
    """
    many, each = allowed.shape[1], (-1,) + (1,) * problem.state.dim()
    centre, rest = problem.state.unsqueeze(1), problem.force(problem.state).unsqueeze(1)
    states = best = centre.repeat_interleave(many, 1)
    slope = problem.slope.unsqueeze(1)
    push, history = -nudges * slope.expand_as(states), Differences(memory=5, step=1.0)
    lowest, rate = torch.full_like(problem.scale, torch.inf), torch.full_like(problem.scale, torch.nan)
    steps, evaluations, status, first = torch.zeros_like(lowest, dtype=torch.long), 1.0, Status.CONVERGED, True
    while True:
        residual = measure(push, states)
        better = residual < lowest
        best, lowest = torch.where(better.view(each), states, best), torch.where(better, residual, lowest)
        active = (lowest > solver.tol) & (steps < solver.max_steps)
        if not status.usable or not active.any():
            break
        scale = torch.where(active.unsqueeze(1), allowed, torch.inf)  # a sample that is done takes one evaluation
        if held is None:
            clamp = problem.x.unsqueeze(1) - rest - nudges * slope
            parts = [problem.dynamics.relax(solver, clamp.flatten(0, 1), states.flatten(0, 1), scale.flatten())]
            move = parts[0].value.view_as(states) - states
        elif first:
            parts = []
            if response is None:
                parts = [held.relax(solver, problem.slope, (scale / nudges.flatten(1).abs()).amin(1))]
                response = parts[0].value
            move = -nudges * response.unsqueeze(1)
        else:
            parts = [held.relax(solver, push[:, k], scale[:, k]) for k in range(many)]
            move = torch.stack([part.value for part in parts], 1)
        states = history.next(states.flatten(1), move.flatten(1), residual, best.flatten(1)).view_as(states)
        if parts:
            taken, rates = (torch.cat([getattr(part, name).view(len(steps), -1) for part in parts], 1).amax(1)
                            for name in ("steps", "rate"))
            steps, rate = steps + torch.where(active, taken.clamp_min(1), 0), torch.where(active, rates, rate)
            status = max((part.status for part in parts), key=list(Status).index)
            evaluations += sum(part.evaluations * len(part.steps) for part in parts) / len(steps)
        slope = problem.loss_slope(states)
        push = problem.force(states) - rest - nudges * slope
        evaluations += many
        if held is not None:
            away = response.unsqueeze(1) if first and response is not None else states - centre
            push = push - asymmetric(held, away) * (-nudges if first else 1)
            evaluations += 2 * away.shape[1]
        first = False
    if status.usable:
        status = Status.MAX_STEPS if (lowest > solver.tol).any() else Status.CONVERGED
    return Solution(best, lowest, steps, rate, round(evaluations), status, history.fallbacks)


Nudging = Literal["symmetric", "one-sided", "random-sign"]


def real_points(problem: Problem, beta: float, nudging: Nudging) -> tuple[Tensor, Tensor]:
    """Nudges and weights of a real contrast: +-beta, +beta against the free state, or a random sign for each sample
    (Laborieux et al. 2021), whose first-order biases cancel in the mean."""
    if nudging == "symmetric":
        nudges = problem.state.new_tensor([[beta, -beta]])
        return nudges, 1 / (2 * nudges)
    nudges = problem.state.new_full((problem.state.shape[0], 1), beta)
    if nudging == "random-sign":
        drawn = problem.carried.get("sign_draws", torch.zeros(1, dtype=torch.long))
        problem.carried["sign_draws"] = drawn + 1
        signs = torch.randint(2, (len(nudges), 1), generator=torch.Generator().manual_seed(int(drawn)))
        nudges = nudges * (2 * signs - 1).to(nudges)
    return nudges, 1 / nudges


def asymmetric(jacobian: Any, away: Tensor) -> Tensor:
    """(J - J^T) applied to states (B, K, ...), to real and imaginary parts apart."""
    if away.is_complex():
        both = asymmetric(jacobian, torch.cat([away.real, away.imag], 1))
        return torch.complex(*both.chunk(2, 1))
    return jacobian.product(away) - jacobian.transposed(away)
