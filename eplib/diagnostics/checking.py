"""Whether a block and a model of your own are what equilibrium propagation takes them for, and in words what is wrong."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..calculus import AutomaticSlope
from ..estimators import AsymEP, Implicit, gradient
from ..estimators.entry import refuse_lost_graph
from ..intact import bare
from ..solvers import Anderson, Relaxation, Solver, norm
from .gradients import agreement

EXACT, NEAR = 1e-6, 1e-3  # relative errors above rounding, and above that of a difference quotient or of a small nudge
MOVED = 1e-6  # a difference quotient's displacement, relative
BETA = 1e-3


@dataclass(frozen=True)
class Checked:
    """What `check` found: `wrong`, a sentence each with the number and what to do; `measured`, all numbers by name."""

    wrong: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.1e}" for name, value in self.measured.items())
        return "\n".join(self.wrong or ["nothing is wrong"]) + (f"\n({numbers})" if numbers else "")

    def need(self, name: str, error: float, bound: float, otherwise: str) -> None:
        """Notes a number, and that something is wrong where it is above its bound, or none."""
        self.measured[name] = error
        if not error <= bound:
            self.wrong.append(otherwise.format(error=f"{error:.2g}"))


def check(model: Any, inputs: Tensor, targets: Tensor, solver: Solver | None = None) -> Checked:
    """Compares the force, J v, J^T u and the contraction of `model.block` with autograd and difference quotients, settles the
    free phase by `solver` (by default 200 relaxation steps), and compares EP's gradient with `Implicit`'s.

    A float64 copy of the model is checked; the model stays as it is. Of a block with a mistake only the first kind of mistake
    may be found: mend it and check again.
    """
    found, solver = Checked(), solver or Relaxation(max_steps=200)
    model = deepcopy(model).double()
    inputs, targets = (part.double() if part.is_floating_point() else part for part in (inputs, targets))
    try:
        with torch.no_grad():
            x = model.clamp(inputs)
            start = model.block.start(x)
            _shapes(model, x, start, targets, found)
        if found.ok:
            refuse_lost_graph(model, inputs)
            state = _free_phase(model, x, solver, found)
            _derivative(model.block, x, state, found)
            _weights(model.block, x, state, found)
        if found.ok:
            _gradients(model, inputs, targets, solver, found)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        found.wrong.append(f"{type(error).__name__}: {error}")
    return found


def _error(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth||; absolute where the truth is zero."""
    size = truth.norm()
    return ((ours - truth).norm() / (size if size > 0 else torch.ones_like(size))).item()


def _draw(like: Tensor, seed: int) -> Tensor:
    """Normal numbers of that shape, without a touch of PyTorch's own generator."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


def _shapes(model: Any, x: Tensor, start: Tensor, targets: Tensor, found: Checked) -> None:
    """Of the force and the loss, and that the samples know nothing of each other."""
    block = model.block
    state = start + 0.1 * _draw(start, 0)
    force = block(state, x)
    if force.shape != state.shape:
        found.wrong.append(f"the force has shape {tuple(force.shape)} at states {tuple(state.shape)}; it is to have theirs")
        return
    losses = model.loss(block.output(state), targets)
    if losses.shape != (len(x),):
        found.wrong.append(f"loss gives {tuple(losses.shape)} for a batch of {len(x)}; give one number for each sample, "
                           f"({len(x)},), not their mean")
    found.need("repeat", _error(block(state, x), force), EXACT, "the force is another each time it is computed, {error} apart; "
               "leave dropout and noise out of it (model.eval())")
    alone = torch.cat([block(state[b:b + 1], x[b:b + 1]) for b in range(len(x))])
    found.need("samples", _error(alone, force), EXACT, "a sample's force depends on the others of its batch (error {error}); "
               "take no mean or normalisation over the batch")
    lifted = block(torch.stack([start, state], 1), x.unsqueeze(1))
    apart = _error(lifted[:, 1], force) if lifted.shape[2:] == force.shape[1:] else float("inf")
    found.need("lifted", apart, EXACT, "states (B, K, ...) under a clamp (B, 1, ...) get another force than alone (error "
               "{error}); write the force for any number of leading dimensions, with (..., n)")


def _free_phase(model: Any, x: Tensor, solver: Solver, found: Checked) -> Tensor:
    """Where it ends; the start, moved, if nowhere."""
    free = solver.settle(model.block, x)
    residual = free.residual.max().item()
    found.measured["residual"] = residual
    if not free.status.usable:
        found.wrong.append(f"the free phase is {free.status.value} after {int(free.steps.max())} steps of {solver.step:g}: "
                           "smaller step, smaller weights, or more damping")
    elif residual > max(solver.tol, EXACT):
        found.wrong.append(f"the free phase does not settle in {solver.max_steps} steps of {solver.step:g} (residual "
                           f"{residual:.2g}, tol {solver.tol:g}): smaller step, solvers.Anderson, or more damping")
    state = free.value if free.status.usable else model.block.start(x)
    return state + 0.01 * norm(state).mean() / state[0].numel() ** 0.5 * _draw(state, 1)  # at F = 0 a factor hides


def _derivative(block: Any, x: Tensor, z: Tensor, found: Checked) -> None:
    """J v and J^T u: autograd's against a difference quotient, then those of linearise against autograd's."""
    u, v = _draw(z, 2), _draw(z, 3)
    automatic = AutomaticSlope(bare(block), z, x)
    with torch.no_grad():
        truth, width = automatic.product(v), MOVED * max(z.norm().item(), 1.0) / v.norm()
        quotient = (block(z + width * v, x) - block(z - width * v, x)) / (2 * width)
        found.need("autograd", _error(truth, quotient), NEAR, "autograd's derivative is not that of the force (error {error}): "
                   "a part of the force has no graph, is detached or not smooth; take slopes by torch.func.grad")
        given = block.linearise(z, x)
        moved, pulled = given.product(v), given.transposed(u)
    found.need("J v", _error(moved, truth), EXACT, "J v is not autograd's (error {error}): mend product, or leave linearise "
               "to blocks.Dynamical")
    # against autograd's own transpose, so that each product is blamed for itself
    found.need("J^T u", _error(pulled, automatic.transposed(u)), EXACT, "J^T u is not the transpose of J v (error {error}): "
               "mend transposed, or leave linearise to blocks.Dynamical")


def _weights(block: Any, x: Tensor, z: Tensor, found: Checked) -> None:
    """The contraction <u, dF/dtheta>, parameter by parameter, and that in the clamp."""
    u = _draw(z, 4)
    truth, into = AutomaticSlope(bare(block), z, x).contract(u)
    with torch.no_grad():
        given, into_given = block.linearise(z, x).contract(u)
        largest = max((value.norm().item() for value in truth.values()), default=0.0)
        for name, parameter in ((n, p) for n, p in bare(block).named_parameters() if p.requires_grad):
            own, exact = f"block.{name}", truth[name]
            found.need(f"autograd in {name}", _quotient_apart(block, x, z, u, parameter, exact, largest), NEAR,
                       f"autograd's gradient in {own} is not the force's (error {{error}}): the force takes it without a graph "
                       "(.data, .item(), no_grad)")
            if name not in given and exact.norm() > EXACT * largest:
                found.wrong.append(f"contract gives no gradient for {own} (its norm is {exact.norm():.2g}): return one by its "
                                   "name in the block")
            elif name in given and given[name].shape != parameter.shape:
                found.wrong.append(f"contract gives {own} a gradient of shape {tuple(given[name].shape)}; the parameter's is "
                                   f"{tuple(parameter.shape)}")
            elif name in given:
                found.need(f"contract of {name}", _error(given[name], exact), EXACT, f"contract's gradient for {own} is not "
                           "autograd's (error {error}): sum <u, dF/dtheta> over batch and positions")
        found.need("contract in x", _error(into_given, into), EXACT, "contract's gradient in the clamp x is not autograd's "
                   "(error {error}): what leads to x would learn something else")


def _quotient_apart(block: Any, x: Tensor, z: Tensor, u: Tensor, parameter: Tensor, exact: Tensor, largest: float) -> float:
    """How far a difference quotient of <u, F> along a random way of the parameter is from the gradient `exact`, relative."""
    way, kept, ends = _draw(parameter, 5), parameter.clone(), []
    width = MOVED * max(kept.norm().item(), 1.0) / way.norm().clamp_min(MOVED)
    for sign in (1, -1):
        parameter.copy_(kept + sign * width * way)
        ends.append((u * block(z, x)).sum())
    parameter.copy_(kept)
    apart = (ends[0] - ends[1]) / (2 * width) - (exact * way).sum()
    size = max((exact.norm() * way.norm()).item(), largest)
    return abs(apart.item()) / (size or 1.0)


def _gradients(model: Any, inputs: Tensor, targets: Tensor, solver: Solver, found: Checked) -> None:
    """EP against implicit differentiation at one tightly settled state."""
    tight = Anderson(step=min(solver.step, 1.0), max_steps=1000, tol=1e-10)
    ours, truth = (gradient(model, inputs, targets, estimator=one, solver=tight, nudged=Anderson(
        step=tight.step, max_steps=1000, tol=1e-7)) for one in (AsymEP(beta=BETA), Implicit()))
    if ours.grads is None or truth.grads is None:
        failed = ours if ours.grads is None else truth
        found.wrong.append(f"no gradient: the {failed.failed} phase is {failed.status.value}; smaller step, or more damping")
        return
    found.need("gradient", agreement(ours.grads, truth.grads)["total"].error, 10 * NEAR, "EP's gradient is {error} off "
               f"implicit differentiation's at beta = {BETA:g}: several fixed points are near, or force or loss is not smooth "
               "there")
