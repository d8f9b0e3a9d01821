"""Controllers that keep the free phase contracting while the weights learn."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from .config import configuration
from .models import EquilibriumModel
from .solvers import norm


@dataclass(frozen=True)
class Outcome:
    """grads {name: tensor} of the penalty, named scalars, the state to carry over, and its cost in force evaluations."""

    grads: dict[str, Tensor]
    measured: dict[str, float]
    state: dict[str, Any]
    evaluations: int


@configuration
class ContractionRate:
    """Penalty strength * mean_b (||(I + step J) v_b|| / ||v_b|| - target)^2 on a leading-mode probe v.

    The mean is over the samples above the target, so that one unstable sample weighs the same in a batch of any size.

    The relaxation that has just ended was itself a power iteration: its last push F(z*) is (I + step J)^k F(z_0) to first order,
    for each sample's own Jacobian. The probe starts there, at the cost of one force, and is refined by `products` products
    v <- (I + step J) v. (A probe carried over from the last batch has seen other sequences' Jacobians only, and lost sight of
    single unstable tokens.) The penalty is explicit in the weights, with z* and v held fixed, so its gradient is one
    backward pass through J v. What it sees is logged as `rate_probe`: the growth of one real vector, which does not resolve a
    complex pair; `spectra.contraction_rate` measures the spectral radius itself.
    """

    kind: Literal["ContractionRate"] = "ContractionRate"
    target: Annotated[float, Field(gt=0, lt=1)] = 0.85
    strength: Annotated[float, Field(ge=0)] = 100.0
    products: Annotated[int, Field(ge=0)] = 2

    def __call__(self, model: EquilibriumModel, inputs: Tensor, z: Tensor, step: float, state: dict) -> Outcome:
        """z (B, ...): the free state. Nothing is carried over, so batches may change in size and length."""
        lanes = (-1,) + (1,) * (z.dim() - 1)
        with torch.no_grad():
            x = model.clamp(inputs)
            probe = model.block(z, x)
        with torch.enable_grad():
            jacobian = model.block.linearise(z, x)
            for _ in range(self.products):
                with torch.no_grad():
                    probe = probe + step * jacobian.product(probe)
                    probe = probe / norm(probe).clamp_min(torch.finfo(z.dtype).tiny).view(lanes)
            rate = norm(probe + step * jacobian.product(probe)) / norm(probe).clamp_min(torch.finfo(z.dtype).tiny)  # (B,)
            excess = (rate - self.target).clamp_min(0)
            total = self.strength * excess.square().sum() / (excess > 0).sum().clamp_min(1)
            parameters = dict(model.block.named_parameters())
            grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
        rate = rate.detach()
        measured = {"rate_probe": rate.max().item(), "rate_probe_mean": rate.mean().item(), "penalty": total.item()}
        # one force, the linearisation and one product with their backward passes (about two each), and the refinement
        return Outcome({f"block.{name}": grad for name, grad in zip(parameters, grads, strict=True)}, measured, {},
                       self.products + 7)


Penalty = ContractionRate
