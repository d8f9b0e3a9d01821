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
    """Penalty strength * mean_b relu(||(I + step J) v_b|| / ||v_b|| - target)^2 on a leading-mode probe v.

    The probe is carried from batch to batch and refined by `products` products v <- (I + step J) v, normalised per sample: a
    power iteration on the discrete map that the solver applies. The penalty is explicit in the weights, z* and v held fixed.
    What it sees is logged as `rate_probe`; it is a Rayleigh-type quotient of a real vector and does not resolve a complex
    pair: `diagnostics.contraction_rate` measures the spectral radius itself.
    """

    kind: Literal["ContractionRate"] = "ContractionRate"
    target: Annotated[float, Field(gt=0, lt=1)] = 0.9
    strength: Annotated[float, Field(ge=0)] = 30.0
    products: Annotated[int, Field(ge=0)] = 2
    probe: Literal["carried", "residual"] = "carried"

    def __call__(self, model: EquilibriumModel, inputs: Tensor, z: Tensor, step: float, state: dict) -> Outcome:
        """z (B, ...): the free state; `state["probe"]` (B, ...) of the last batch, drawn anew if the shape has changed."""
        with torch.no_grad():
            jacobian = model.block.linearise(z, model.clamp(inputs))
            probe = state.get("probe") if self.probe=="carried" else model.block(z, model.clamp(inputs))
            if probe is None or probe.shape != z.shape:
                generator = torch.Generator().manual_seed(z.numel())
                probe = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
            lanes = (-1,) + (1,) * (z.dim() - 1)
            probe = probe / norm(probe).view(lanes)
            for _ in range(self.products):
                probe = probe + step * jacobian.product(probe)
                probe = probe / norm(probe).clamp_min(torch.finfo(z.dtype).tiny).view(lanes)
        with torch.enable_grad():
            moved = probe + step * model.block.linearise(z, model.clamp(inputs).detach()).product(probe)
            rate = norm(moved)  # the probe has unit norm: (B,)
            total = self.strength * (rate - self.target).clamp_min(0).square().mean()
            parameters = dict(model.block.named_parameters())
            grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
        rate = rate.detach()
        measured = {"rate_probe": rate.max().item(), "rate_probe_mean": rate.mean().item(), "penalty": total.item()}
        return Outcome({f"block.{name}": grad for name, grad in zip(parameters, grads, strict=True)}, measured,
                       {"probe": probe}, self.products + 4)  # + one product, its backward (about two), two linearisations


Penalty = ContractionRate
