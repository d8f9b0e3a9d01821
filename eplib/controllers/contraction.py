"""The contraction rate of the discrete map that the free phase iterates, of whole samples or of every token."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..config import configuration
from ..dynamics import LinearInKernel
from ..estimators import BACKWARD, FORCE, LINEARISATION, PRODUCT, Problem
from ..solvers import norm
from .base import KEPT, Outcome, Penalty, Products, Strength, compressed, counted, leading, of_samples, unit

SURGE = 10.0  # how much more than the allowed share above the target counts


@configuration
class Integral:
    """A strength that is integrated until the `quantile` of the rates, over batch after batch, stands at the target: multiplied
    at every call by exp(gain * e), e = (share above the target) / (1 - quantile) - 1, at most `SURGE`.

    It stays within floor and ceiling: one that has annealed away is not there when the next update needs it. Nothing winds up
    where the penalty's gradient is clipped apart (`Optimiser`): the strength does not rise after an update that cut it, as a
    larger one would be cut to the same. A loop of your own says what share of the last gradient was left, else the strength
    may run to its ceiling: report.state["penalty1." + controllers.KEPT] = torch.tensor(share), of the first penalty.
    """

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    gain: Annotated[float, Field(gt=0, le=1)] = 0.02
    floor: Annotated[float, Field(gt=0)] = 20.0
    ceiling: Annotated[float, Field(gt=0)] = 2e4

    @model_validator(mode="after")
    def _ordered(self) -> "Integral":
        if self.ceiling < self.floor:
            raise ValueError(f"ceiling {self.ceiling} is below floor {self.floor}; choose floor <= ceiling")
        return self

    def __call__(self, above: float, carried: dict[str, Tensor], start: float) -> float:
        """The next strength where this share of the rates is above the target; the last one (at first `start`) is carried."""
        error = min(SURGE, above / (1 - self.quantile) - 1)
        if float(carried.get(KEPT, 1.0)) < 1:
            error = min(error, 0.0)
        value = float(carried.get("coefficient", start)) * math.exp(self.gain * error)
        value = min(self.ceiling, max(self.floor, value))
        carried["coefficient"] = torch.tensor(value, dtype=torch.float64)
        return value


@configuration
class ContractionRate(Penalty):
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
    gradients from one penalty to the next. driven: how the strength follows the rates (`rate_quantile`, of the share
    `rate_above` is above the target; the strength is `rate_coefficient`); None keeps it.
    """

    target: Annotated[float, Field(gt=0, lt=1)] = 0.85
    strength: Strength = 200.0
    products: Products = 2
    every: Annotated[int, Field(ge=1)] = 1
    probes: Annotated[int, Field(ge=1, le=3)] = 1
    per: Literal["sample", "token"] = "sample"
    step: Annotated[float, Field(gt=0, le=2)] | None = None
    driven: Integral | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ContractionRate":
        if self.per == "token" and self.probes > 1:
            raise ValueError(f"per token there is one probe, got probes={self.probes}; use per=\"sample\" for several")
        return self

    def __call__(self, problem: Problem, step: float, carried: dict[str, Tensor]) -> Outcome:
        """At a free state and its Jacobian. No probe is carried over, so batches may change in size and length. Raises
        TypeError where tokens have no blocks of their own."""
        step = self.step or step
        if counted(carried, "calls") % self.every:
            return Outcome({}, {}, 0)
        with torch.no_grad():
            probe, moved = self._probe(problem, step)
            rates = self._rate(problem.jacobian, probe, step) if moved is None else _growth(probe, moved)
        rate, strength, measured = rates.view(len(rates), -1).amax(1), self.strength, {}
        if self.driven:
            whole = problem.part.gathered(rates)
            above = (~(whole <= self.target)).double().mean().item()  # what is not finite is above
            strength = self.driven(above, carried, strength)
            measured = {"rate_quantile": whole.flatten().double().quantile(self.driven.quantile).item(), "rate_above": above,
                        "rate_coefficient": strength}
        if moved is None:
            seen = rate > self.target
            grads, value, cost = of_samples(problem, seen, self.probes, lambda jacobian: self._rate(
                jacobian, probe[seen], step) - self.target, strength)
        else:
            grads, value, cost = self._of_tokens(problem, probe, moved, strength, step)
        measured |= {"rate_probe": rate.max().item(), "rate_probe_mean": rate.mean().item(), "penalty": value}
        cost += FORCE + (self.products + 2 * self.probes - 1) * PRODUCT  # the probe and what it sees
        return Outcome(grads, measured, math.ceil(cost))

    @torch.no_grad()
    def rates(self, problem: Problem, step: float) -> Tensor:
        """What the penalty sees where the solver has this step: r of every sample (B,), or of every token (B, T)."""
        step = self.step or step
        probe, moved = self._probe(problem, step)
        return self._rate(problem.jacobian, probe, step) if moved is None else _growth(probe, moved)

    def _probe(self, problem: Problem, step: float) -> tuple[Tensor, Tensor | None]:
        """The refined probes and, per token, what I + step J makes of them."""
        jacobian, tokens = problem.jacobian, self.per == "token"
        if tokens and not getattr(jacobian, "by_token", False):
            raise TypeError(f"{type(problem.model.block).__name__} has no blocks of single tokens; use a causal "
                            "blocks.Thick, Attractor or Thin, not altered since it was built, or per=\"sample\"")
        if self.probes > 1:
            return leading(problem, step, self.products, self.probes), None
        move = jacobian.token_product if tokens else jacobian.product
        probe = problem.force(problem.state)
        if tokens and isinstance(jacobian, LinearInKernel):
            return jacobian.token_probe(probe, step, self.products)
        for _ in range(self.products):
            probe = unit(probe + step * move(probe), tokens)
        return probe, probe + step * move(probe) if tokens else None

    def _rate(self, jacobian: Any, probe: Tensor, step: float) -> Tensor:
        """r (B,) of the samples along their probes."""
        if self.probes > 1:
            small = torch.eye(self.probes).to(probe) + step * compressed(jacobian, probe)
            return torch.linalg.eigvals(small).abs().amax(-1)
        return norm(probe + step * jacobian.product(probe)) / norm(probe).clamp_min(torch.finfo(probe.dtype).tiny)

    @torch.no_grad()
    def _of_tokens(self, problem: Problem, probe: Tensor, moved: Tensor, strength: float,
                   step: float) -> tuple[dict[str, Tensor], float, float]:
        """The penalty's gradient, value and cost, r being the largest rate of each sample's tokens."""
        rate, token = _growth(probe, moved).max(-1)
        excess = (rate - self.target).relu()
        value, above = strength * excess.square().mean().item(), excess > 0
        if not above.any():
            return {}, value, 0.0
        at, own = above.nonzero().squeeze(1), token[above]
        slope = 2 * strength * step * excess[above].unsqueeze(1) / len(excess)  # of the penalty in <u, J_tt v>
        u, v = moved[at, own], probe[at, own]
        grads, cost = _locally(problem, above, own, slope * u / u.norm(dim=-1, keepdim=True), v / v.norm(dim=-1, keepdim=True))
        return grads, value, cost


def _growth(probe: Tensor, moved: Tensor) -> Tensor:
    """How much longer every token's probe became, (B, T); 0 for a probe of zero."""
    return moved.norm(dim=-1) / probe.norm(dim=-1).clamp_min(torch.finfo(probe.dtype).tiny)


def _locally(problem: Problem, above: Tensor, token: Tensor, u: Tensor, v: Tensor) -> tuple[dict[str, Tensor], float]:
    """Gradient in the trained weights of sum_b <u_b, J_tt v_b> over the samples `above` (B,), u and v (n, C) at one token t
    (n,) of each, and its cost.

    <u, J v> is the change of <u, F> along v, so the gradient is the contrast of two contractions <u, dF/dtheta>, at z* + eps v
    and at z* - eps v: quantities local to each weight, as in the read-out of the two nudged states, and no graph. Where one
    token moves, the others feel it only as tokens after it, of which u sees none.
    """
    seen = int(token.max()) + 1  # what comes after the tokens does not reach them
    z, x, rows = problem.state[above, :seen], problem.x[above, :seen], torch.arange(len(token))
    eps = torch.finfo(z.dtype).eps ** (1 / 3) * z[rows, token].norm(dim=-1, keepdim=True)  # where truncation meets rounding
    away, along = torch.zeros_like(z), torch.zeros_like(z)
    away[rows, token], along[rows, token] = eps * v, u / (2 * eps)
    jacobian = problem.dynamics.linearise(torch.cat([z + away, z - away]), torch.cat([x, x]))
    grads = problem.named(jacobian.contract(torch.cat([along, -along]))[0])
    trained = {name for name, value in problem.model.named_parameters() if value.requires_grad}
    cost = 2 * (LINEARISATION + BACKWARD) * z.shape[:2].numel() / problem.state.shape[:2].numel()
    return {name: value for name, value in grads.items() if name in trained}, cost
