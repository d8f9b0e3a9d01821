"""Controllers that keep the free phase contracting while the weights learn."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .config import configuration
from .estimators import Problem
from .solvers import norm


@dataclass(frozen=True)
class Outcome:
    """grads {name: tensor} of the penalty, named scalars, and its cost in force evaluations."""

    grads: dict[str, Tensor]
    measured: dict[str, float]
    evaluations: int


@configuration
class ContractionRate:
    """Penalty strength * mean_b relu(||(I + step J) v_b|| / ||v_b|| - target)^2 on a leading-mode probe v.

    The relaxation that has just ended was itself a power iteration: its last push F(z*) is (I + step J)^k F(z_0) to first
    order, for each sample's own Jacobian. The probe starts there, at the cost of one force, and is refined by `products`
    products v <- (I + step J) v. (A probe carried over from the last batch would have seen other sequences' Jacobians only.)
    The penalty is explicit in the weights, with z* and v held fixed, so its gradient is one backward pass through J v. What it
    sees is logged as `rate_probe`: the growth of one real vector, which does not resolve a complex pair;
    `spectra.contraction_rate` measures the spectral radius itself. every: gradients from one penalty to the next.
    """

    kind: Literal["ContractionRate"] = "ContractionRate"
    target: Annotated[float, Field(gt=0, lt=1)] = 0.85
    strength: Annotated[float, Field(ge=0)] = 200.0
    products: Annotated[int, Field(ge=0)] = 2
    every: Annotated[int, Field(ge=1)] = 1

    def __call__(self, problem: Problem, step: float) -> Outcome:
        """At a free state and its Jacobian. The probe is not carried over, so batches may change in size and length."""
        call = int(problem.carried.get("penalty_calls", 0))
        problem.carried["penalty_calls"] = torch.tensor(call + 1)
        if call % self.every:
            return Outcome({}, {}, 0)
        model, x, z = problem.model, problem.x, problem.state
        tiny = torch.finfo(z.dtype).tiny
        with torch.no_grad():
            jacobian, probe = problem.jacobian, problem.force(z)
            for _ in range(self.products):
                probe = probe + step * jacobian.product(probe)
                probe = probe / norm(probe).clamp_min(tiny).view((-1,) + (1,) * (z.dim() - 1))
            rate = norm(probe + step * jacobian.product(probe)) / norm(probe).clamp_min(tiny)  # (B,)
            excess = (rate - self.target).clamp_min(0)
            above = excess > 0
        share = above.double().mean().item()
        measured = {"rate_probe": rate.max().item(), "rate_probe_mean": rate.mean().item(),
                    "penalty": self.strength * excess.square().mean().item()}
        # a force and the products; then, for the samples above the target, the linearisation and one more with a backward pass
        cost = math.ceil(self.products + 2 + 6 * share)
        if not above.any():
            return Outcome({}, measured, cost)
        with torch.enable_grad():
            v = probe[above]
            moved = v + step * model.block.linearise(z[above], x[above]).product(v)
            total = self.strength * (norm(moved) / norm(v).clamp_min(tiny) - self.target).square().sum() / len(above)
            parameters = dict(model.block.named_parameters())
            grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return Outcome({f"block.{name}": grad for name, grad in zip(parameters, grads, strict=True)}, measured, cost)


Penalty = ContractionRate
