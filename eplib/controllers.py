"""Controllers that keep the free phase contracting while the weights learn.

A penalty is called as `penalty(problem, step, carried)`, with a dict of tensors that is its own from call to call, and is a
function of the weights alone: the free state z* and the directions along which it looks at J = dF/dz are held fixed, so its
gradient is one backward pass through J v, or a contrast of two contractions, with every estimator, and never through a
relaxation. Frozen weights get none. `Outcome` says what it cost in force evaluations (the unit of `contrast.FORCE`). Which
samples are looked at again depends on the samples: only those that have something to penalise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .config import configuration
from .contrast import BACKWARD, FORCE, LINEARISATION, PRODUCT, Problem
from .solvers import norm

Strength = Annotated[float, Field(ge=0)]
Products = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Outcome:
    """grads {name: tensor} of the penalty, named scalars, and its cost in force evaluations but for the linearisation at the
    free state, which all share."""

    grads: dict[str, Tensor]
    measured: dict[str, float]
    evaluations: int


def _gradient(problem: Problem, cost: float, total: Callable[[], Tensor]) -> tuple[dict[str, Tensor], float, float]:
    """Gradient of total() in the block's weights that are trained, its value, and what both cost where total() costs `cost`."""
    inside = {id(value) for value in problem.model.block.parameters()}
    trained = {name: value for name, value in problem.model.named_parameters() if id(value) in inside and value.requires_grad}
    with torch.set_grad_enabled(bool(trained)):
        value = total()
        if not value.requires_grad:
            return {}, value.item(), cost
        grads = torch.autograd.grad(value, list(trained.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(trained, grads, strict=True)), value.item(), (1 + BACKWARD) * cost


def _graph(problem: Problem) -> Any:
    return problem.model.block.linearise(problem.state, problem.x)


def _above(problem: Problem, above: Tensor, products: int, excess: Callable[[Any], Tensor],
           strength: float) -> tuple[dict[str, Tensor], float, float]:
    """The same of strength * mean_b excess_b^2, to which only the samples `above` (B,) contribute: excess(J of those), by so
    many products with it."""
    if not above.any():
        return {}, 0.0, 0.0
    cost = (LINEARISATION + products * PRODUCT) * above.double().mean().item()
    return _gradient(problem, cost, lambda: strength * excess(problem.model.block.linearise(
        problem.state[above], problem.x[above])).square().sum() / len(above))


def _locally(problem: Problem, above: Tensor, token: Tensor, u: Tensor, v: Tensor) -> tuple[dict[str, Tensor], float]:
    """Gradient in the trained weights of sum_b <u_b, J_tt v_b> over the samples `above` (B,), u and v (n, C) at one token t
    (n,) of each, and its cost.

    <u, J v> is the change of <u, F> along v, so the gradient is the contrast of two contractions <u, dF/dtheta>, at z* + eps v
    and at z* - eps v: quantities local to each weight, as in the read-out of the two nudged states, and no graph. Where one
    token moves, the others feel it only as tokens after it, of which u sees none.
    """
    z, x, rows = problem.state[above], problem.x[above], torch.arange(len(token))
    eps = torch.finfo(z.dtype).eps ** (1 / 3) * z[rows, token].norm(dim=-1, keepdim=True)  # where truncation meets rounding
    away, along = torch.zeros_like(z), torch.zeros_like(z)
    away[rows, token], along[rows, token] = eps * v, u / (2 * eps)
    jacobian = problem.dynamics.linearise(torch.cat([z + away, z - away]), torch.cat([x, x]))
    grads = problem.named(jacobian.contract(torch.cat([along, -along]))[0])
    trained = {name for name, value in problem.model.named_parameters() if value.requires_grad}
    cost = 2 * (LINEARISATION + BACKWARD) * len(token) / len(above)
    return {name: value for name, value in grads.items() if name in trained}, cost


def _lanes(values: Tensor, like: Tensor) -> Tensor:
    return values.view(*values.shape, *(1,) * (like.dim() - values.dim()))


def _unit(a: Tensor, tokens: bool = False) -> Tensor:
    """Each sample, or each token, scaled to norm 1; zero stays zero."""
    size = a.norm(dim=-1, keepdim=True) if tokens else _lanes(norm(a), a)
    return a / size.clamp_min(torch.finfo(a.dtype).tiny)


def _counted(carried: dict[str, Tensor], key: str) -> int:
    """How often this was called before; the count is carried, so that a resumed run goes on with it."""
    count = int(carried.get(key, 0))
    carried[key] = torch.tensor(count + 1)
    return count


def _draw(z: Tensor, carried: dict[str, Tensor]) -> Tensor:
    """Random directions of norm 1, (B, ...), a new draw each call."""
    drawn = _counted(carried, "draws")
    return _unit(torch.randn(z.shape, generator=torch.Generator().manual_seed(drawn), dtype=torch.float64).to(z))


def _leading(problem: Problem, step: float, products: int, size: int) -> Tensor:
    """Orthonormal basis (B, size, ...) of the last iterates of a power iteration by I + step J, from the last push F(z*).

    It spans a complex pair from size 2 on, which one real vector never settles on.
    """
    iterates = [_unit(problem.force(problem.state))]
    for _ in range(products + size - 1):
        iterates.append(_unit(iterates[-1] + step * problem.jacobian.product(iterates[-1])))
    columns = torch.stack(iterates[-size:], 1).flatten(2).mT  # (B, n, size)
    return torch.linalg.qr(columns)[0].mT.unflatten(2, problem.state.shape[1:])


def _compressed(jacobian: Any, basis: Tensor) -> Tensor:
    """Q^T J Q of each sample, (B, K, K), for an orthonormal basis Q (B, K, ...)."""
    moved = torch.stack([jacobian.product(q) for q in basis.unbind(1)], 1)
    return basis.flatten(2) @ moved.flatten(2).mT


@configuration
class ContractionRate:
    """Penalty strength * mean_b relu(r_b - target)^2 on the contraction rate r_b of the discrete map z -> z + step F(z).

    step: the solver's by default. A smaller one than the solver's asks less of the left edge of the spectrum, which an
    accelerated solver meets with ease, and more of the right one.

    The free phase that has just ended was itself a power iteration: its last push F(z*) is (I + step J)^k F(z_0) to first
    order, for each sample's own Jacobian. The probe starts there, at the cost of one force, and is refined by `products`
    products v <- (I + step J) v. (A probe carried over from the last batch would have seen other sequences' Jacobians only.)

    probes = 1: r = ||(I + step J) v|| / ||v||, the growth of one real vector, which for J far from normal is more than its rate
    of growth in the long run. probes > 1: the spectral radius of I + step J on the span of the last `probes` iterates, which
    resolves a complex pair. per "token", for a causal block: J is block lower-triangular over tokens, so its spectrum is that
    of the C x C blocks of single tokens; every token has a probe of its own, moved by its own block, and r is the largest of
    the sample's tokens. What is seen is logged as `rate_probe`; `spectra` measures the spectral radius itself. every:
    gradients from one penalty to the next.
    """

    kind: Literal["ContractionRate"] = "ContractionRate"
    target: Annotated[float, Field(gt=0, lt=1)] = 0.85
    strength: Strength = 200.0
    products: Products = 2
    every: Annotated[int, Field(ge=1)] = 1
    probes: Annotated[int, Field(ge=1, le=3)] = 1
    per: Literal["sample", "token"] = "sample"
    step: Annotated[float, Field(gt=0, le=2)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ContractionRate":
        if self.per == "token" and self.probes > 1:
            raise ValueError(f"per token there is one probe, got probes={self.probes}; use per=\"sample\" for several")
        return self

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        """At a free state and its Jacobian. No probe is carried over, so batches may change in size and length. Raises
        TypeError where tokens have no blocks of their own."""
        step, tokens = self.step or step, self.per == "token"
        if _counted(carried, "calls") % self.every:
            return Outcome({}, {}, 0)
        with torch.no_grad():
            jacobian = problem.jacobian
            if tokens and not getattr(jacobian, "by_token", False):
                raise TypeError(f"{type(problem.model.block).__name__} has no blocks of single tokens; use a causal "
                                "blocks.Thick, Attractor or Thin, not altered since it was built, or per=\"sample\"")
            probe = self._probe(problem, jacobian, step)
            if tokens:
                rate, grads, value, cost = self._of_tokens(problem, jacobian, probe, step)
            else:
                rate = self._rate(jacobian, probe, step)
        if not tokens:
            above = rate > self.target
            grads, value, cost = _above(problem, above, self.probes,
                                        lambda jacobian: self._rate(jacobian, probe[above], step) - self.target, self.strength)
        measured = {"rate_probe": rate.max().item(), "rate_probe_mean": rate.mean().item(), "penalty": value}
        cost += FORCE + (self.products + 2 * self.probes - 1) * PRODUCT  # the probe and what it sees
        return Outcome(grads, measured, math.ceil(cost))

    def _probe(self, problem: Problem, jacobian: Any, step: float) -> Tensor:
        if self.probes > 1:
            return _leading(problem, step, self.products, self.probes)
        tokens = self.per == "token"
        move = jacobian.token_product if tokens else jacobian.product
        probe = problem.force(problem.state)
        for _ in range(self.products):
            probe = _unit(probe + step * move(probe), tokens)
        return probe

    def _rate(self, jacobian: Any, probe: Tensor, step: float) -> Tensor:
        """r (B,) of the samples along their probes."""
        if self.probes > 1:
            small = torch.eye(self.probes).to(probe) + step * _compressed(jacobian, probe)
            return torch.linalg.eigvals(small).abs().amax(-1)
        return norm(probe + step * jacobian.product(probe)) / norm(probe).clamp_min(torch.finfo(probe.dtype).tiny)

    def _of_tokens(self, problem: Problem, jacobian: Any, probe: Tensor,
                   step: float) -> tuple[Tensor, dict[str, Tensor], float, float]:
        """r (B,), the largest of each sample's tokens; the penalty's gradient, value and cost."""
        moved, size = probe + step * jacobian.token_product(probe), probe.norm(dim=-1, keepdim=True)
        growth = moved.norm(dim=-1, keepdim=True)  # (B, T, 1)
        rate, token = (growth / size.clamp_min(torch.finfo(probe.dtype).tiny)).squeeze(-1).max(-1)
        excess = (rate - self.target).relu()
        value, above = self.strength * excess.square().mean().item(), excess > 0
        if not above.any():
            return rate, {}, value, 0.0
        at = above.nonzero().squeeze(1), token[above]
        slope = 2 * self.strength * step * excess[above].unsqueeze(1) / len(excess)  # of the penalty in <u, J_tt v>
        grads, cost = _locally(problem, above, token[above], slope * moved[at] / growth[at], probe[at] / size[at])
        return rate, grads, value, cost


@configuration
class LeadingMode:
    """Penalty strength * mean_b relu(alpha_b + margin)^2 on the leading mode of continuous time: alpha_b is the largest real
    part of the eigenvalues of J on the span of the last two iterates of a power iteration by I + step J.

    step: of that iteration; the smaller, the more it prefers the rightmost mode to one that a larger step would overshoot.
    """

    kind: Literal["LeadingMode"] = "LeadingMode"
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.3
    strength: Strength = 50.0
    step: Annotated[float, Field(gt=0, le=1)] = 0.3
    products: Products = 4

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        with torch.no_grad():
            basis = _leading(problem, self.step, self.products, 2)
            alpha = self._abscissa(problem.jacobian, basis)
            above = alpha > -self.margin
        grads, value, cost = _above(problem, above, 2, lambda jacobian: self._abscissa(jacobian, basis[above]) + self.margin,
                                    self.strength)
        cost += FORCE + (self.products + 3) * PRODUCT
        return Outcome(grads, {"abscissa_probe": alpha.max().item(), "penalty": value}, math.ceil(cost))

    @staticmethod
    def _abscissa(jacobian: Any, basis: Tensor) -> Tensor:
        return torch.linalg.eigvals(_compressed(jacobian, basis)).real.amax(-1)


@configuration
class ResidualDriven:
    """A coefficient that follows the free residual: multiplied by (r / target)^gain at every call, r being the batch's largest
    residual smoothed by an exponential average, and kept within floor and ceiling. The floor is never zero: a controller that
    has annealed away is not there when the next update needs it (002).
    """

    target: Annotated[float, Field(gt=0)] = 1.5e-2
    floor: Annotated[float, Field(gt=0)] = 0.1
    ceiling: Annotated[float, Field(gt=0)] = 16.0
    gain: Annotated[float, Field(gt=0, le=1)] = 0.2
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9

    @model_validator(mode="after")
    def _ordered(self) -> "ResidualDriven":
        if self.ceiling < self.floor:
            raise ValueError(f"ceiling {self.ceiling} is below floor {self.floor}; choose floor <= ceiling")
        return self

    def __call__(self, residual: float, carried: dict[str, Tensor], start: float) -> float:
        """The next coefficient, the last one (at first `start`) and the smoothed residual being carried."""
        residual = min(residual, 1.0) if math.isfinite(residual) else 1.0  # an exploded phase says no more than 1
        mean = float(carried.get("residual_mean", residual))
        mean += (1 - self.smoothing) * (residual - mean)
        value = float(carried.get("coefficient", start)) * (mean / self.target) ** self.gain
        value = min(self.ceiling, max(self.floor, value))
        carried["residual_mean"], carried["coefficient"] = (torch.tensor(v, dtype=torch.float64) for v in (mean, value))
        return value


@configuration
class JacobianNorm:
    """Penalty strength * mean_b ||J_f v_b||^2 on a random direction v_b of norm 1, J_f = J + (1 + c) I the derivative of Attn +
    FFN: Hutchinson's estimate of ||J_f||_F^2 over the number of units (Bai et al. 2021). driven: how the strength follows
    the residual; None keeps it.
    """

    kind: Literal["JacobianNorm"] = "JacobianNorm"
    strength: Strength = 3.0
    driven: ResidualDriven | None = None

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        v, decay, strength = _draw(problem.state, carried), 1 + problem.model.block.damping, self.strength
        if self.driven:
            with torch.no_grad():
                residual = norm(problem.force(problem.state)) / norm(problem.state)
            strength = self.driven(residual.max().item(), carried, self.strength)
        grads, value, cost = _gradient(problem, LINEARISATION + PRODUCT, lambda: strength * norm(
            _graph(problem).product(v) + decay * v).square().mean())
        return Outcome(grads, {"penalty": value, "coefficient": strength}, int(cost) + FORCE * bool(self.driven))


@configuration
class ResidualPenalty:
    """Penalty strength * mean_b (||F(z_b)|| / ||z_b||)^2 at the state that the free phase reached and that is evaluated: it
    acts where the phase has not settled and is silent where it has (002)."""

    kind: Literal["ResidualPenalty"] = "ResidualPenalty"
    strength: Strength = 100.0

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        block, z = problem.model.block, problem.state
        grads, value, cost = _gradient(problem, FORCE, lambda: self.strength * (
            norm(block(z, problem.x)) / norm(z)).square().mean())
        return Outcome(grads, {"penalty": value}, int(cost))


@configuration
class Homeostasis:
    """Jacobian homeostasis: penalty strength * mean_b ||(J - J^T) v_b||^2 on a random direction of norm 1, an estimate of
    ||J - J^T||_F^2 over the number of units (Laborieux & Zenke 2023). It makes J symmetric, not contracting."""

    kind: Literal["Homeostasis"] = "Homeostasis"
    strength: Strength = 1.0

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        v = _draw(problem.state, carried)

        def total() -> Tensor:
            jacobian = _graph(problem)
            return self.strength * norm(jacobian.product(v) - jacobian.transposed(v)).square().mean()

        grads, value, cost = _gradient(problem, LINEARISATION + 2 * PRODUCT, total)
        return Outcome(grads, {"penalty": value}, int(cost))


Penalty = Annotated[ContractionRate | LeadingMode | JacobianNorm | ResidualPenalty | Homeostasis, Field(discriminator="kind")]
