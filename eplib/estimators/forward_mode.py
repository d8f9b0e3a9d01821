"""The gradient after a finite number of steps by forward-mode differentiation."""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import configuration
from ..models import EquilibriumModel
from ..solvers import Solver
from .base import FORCE, Steps
from .batch import Batch
from .horizons import BPTT, FiniteHorizon, Unrolled
from .problem import trained


@configuration
class ForwardMode(FiniteHorizon):
    """The same gradient as `BPTT`, by one tangent for each parameter (real-time recurrent learning, Williams & Zipser 1989).
    Nothing is stored over time, but the cost grows with the number of parameters: small systems only."""

    steps: Steps = 64
    compiled = False

    def cost(self, model: EquilibriumModel) -> int:
        """In force evaluations: the state once apart and once under the tangents, of which each takes a product a step."""
        return FORCE * self.steps * (2 + sum(value.numel() for value in trained(model).values()))

    @torch.no_grad()
    def differentiate(self, batch: Batch, solver: Solver) -> Unrolled:
        relaxed, asked = _Relaxed(batch.model, self.steps, solver), (batch.inputs, batch.targets)
        loss, z = relaxed(*asked)
        if not loss.isfinite():
            return Unrolled(loss.item(), None, z)

        def score(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(relaxed, {f"model.{name}": value for name, value in values.items()}, asked)[0]

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward derivative
            values = {name: value.detach() for name, value in trained(batch.model).items()}
            return Unrolled(loss.item(), torch.func.jacfwd(score)(values), z)


class _Relaxed(nn.Module):
    """(inputs, targets) -> mean loss and state after so many steps, for `torch.func`."""

    def __init__(self, model: EquilibriumModel, steps: int, solver: Solver):
        super().__init__()
        self.model, self.steps, self.solver = model, steps, solver

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        z = BPTT(steps=self.steps).unroll(self.model, self.model.clamp(inputs), self.solver)
        return self.model.loss(self.model.block.output(z), targets).mean(), z
