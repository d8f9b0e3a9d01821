"""The dense truth of small systems."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..blocks import Dynamical
from ..models import Model


def dense_jacobian(model: Model, x: Tensor, z: Tensor) -> Tensor:
    """J of one sample by autograd, (n, n) with n = z.numel(); x and z are (1, ...). For small systems and as a reference."""
    rows = torch.autograd.functional.jacobian(lambda state: model.block(state, x.detach()), z.detach())
    return rows.reshape(z.numel(), z.numel())


def adjoint_gradient(model: Model, inputs: Tensor, targets: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Exact gradient of the mean loss at the fixed point z (B, ...), by dense solves of J^T a = -g, sample by sample."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for b in range(z.shape[0]):
        one, target = z[b:b + 1].detach(), targets[b:b + 1]
        with torch.enable_grad():
            x = model.clamp(inputs[b:b + 1])
            probe = one.clone().requires_grad_()
            slope, = torch.autograd.grad(model.loss(model.block.output(probe), target).sum(), probe)
            jacobian = dense_jacobian(model, x, one)
            a = torch.linalg.solve(jacobian.mT, -slope.flatten()).view_as(one)
            score = (a * model.block(one, x)).sum() + model.loss(model.block.output(one), target).sum()
            grads = torch.autograd.grad(score / z.shape[0], list(parameters.values()), allow_unused=True,
                                        materialize_grads=True)
        for name, grad in zip(parameters, grads, strict=True):
            total[name] += grad
    return total


class LinearBlock(Dynamical):
    """F(z) = A z + x, states (..., n)."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.matrix.mT + x


class LinearSystem(Model):
    """x = B inputs, F = A z + x, loss = |z - target|^2 / 2: a model of which every gradient is known in closed form."""

    def __init__(self, matrix: Tensor, inflow: Tensor):
        """matrix A (n, n), its eigenvalues left of zero; inflow B (n, m)."""
        super().__init__()
        self.block, self.inflow = LinearBlock(matrix), nn.Parameter(inflow)

    def clamp(self, inputs: Tensor) -> Tensor:
        return inputs @ self.inflow.mT

    def predict(self, h: Tensor) -> Tensor:
        return h

    def loss_of(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return (predictions - targets).square().sum(-1) / 2

    def closed_form(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The gradient of the mean loss: with a = -A^-T (z* - target), a z*^T in A and a inputs^T in B."""
        a, b = cast(LinearBlock, self.block).matrix.detach(), self.inflow.detach()
        z = -torch.linalg.solve(a, (inputs @ b.mT).mT).mT
        adjoint = -torch.linalg.solve(a.mT, (z - targets).mT).mT
        return {"block.matrix": adjoint.mT @ z / len(z), "inflow": adjoint.mT @ inputs / len(z)}


@dataclass(frozen=True)
class NonReciprocity:
    """How far J is from symmetric: S = (J + J^T) / 2, A = (J - J^T) / 2.

    abscissa: largest real part of the eigenvalues of J; below 0 small deviations die out in the end. numerical_abscissa:
    largest eigenvalue of S; above 0 some grow first. asymmetry: ||A|| / ||S|| (Frobenius). rho: spectral radius of S^-1 A.
    """

    abscissa: float
    numerical_abscissa: float
    asymmetry: float
    rho: float


def non_reciprocity(jacobian: Tensor) -> NonReciprocity:
    """Measures a dense Jacobian (n, n)."""
    s, a = (jacobian + jacobian.mT) / 2, (jacobian - jacobian.mT) / 2
    return NonReciprocity(torch.linalg.eigvals(jacobian).real.max().item(), torch.linalg.eigvalsh(s)[-1].item(),
                          (a.norm() / s.norm()).item(), torch.linalg.eigvals(torch.linalg.solve(s, a)).abs().max().item())
