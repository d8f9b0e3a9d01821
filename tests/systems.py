"""Small systems with known answers, shared by the library's tests."""

import torch
from torch import Tensor, nn

from eplib import blocks, models
from eplib.models import EquilibriumModel
from eplib.solvers import Relaxation

torch.set_num_threads(1)  # small matrices: a second thread only waits
TIGHT = Relaxation(step=0.3, max_steps=2000, tol=1e-12)


def transformer(kind: str = "language", init: float = 1.0, **block) -> tuple[EquilibriumModel, Tensor, Tensor]:
    """A float64 model far from its initial regime (init 1), with one batch of four; its J is strongly asymmetric."""
    torch.manual_seed(3)
    if kind == "language":
        model = models.LanguageModel(vocab=11, width=16, heads=4, context=6, block=blocks.Thick(init=init, **block))
        inputs, targets = torch.randint(0, 11, (4, 6)), torch.randint(0, 11, (4, 6))
    else:
        model = models.Classifier(patch=9, tokens=4, classes=10, width=16, heads=2,
                                  block=blocks.Thick(init=init, causal=False, **block))
        inputs, targets = torch.randn(4, 4, 9, dtype=torch.float64), torch.randint(0, 10, (4,))
    model = model.double()
    for norm in (model.norm, model.block.layers.ln1, model.block.layers.ln2):  # off their symmetric initial values
        nn.init.normal_(norm.weight, mean=1.0, std=0.2)
        nn.init.normal_(norm.bias, std=0.2)
    nn.init.normal_(model.readout.weight, std=0.5)
    return model, inputs, targets


class LinearBlock(nn.Module):
    """F(z) = A z + x, states (..., n)."""

    explicit = False

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def start(self, x: Tensor) -> Tensor:
        return x

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.matrix.T + x

    def output(self, z: Tensor) -> Tensor:
        return z

    def linearise(self, z: Tensor, x: Tensor) -> "LinearBlock":
        return self

    def product(self, v: Tensor) -> Tensor:
        return v @ self.matrix.T

    def transposed(self, u: Tensor) -> Tensor:
        return u @ self.matrix


class LinearModel(nn.Module):
    """x = B inputs, F = A z + x, loss = |z - target|^2 / 2: every gradient is known in closed form."""

    settle = EquilibriumModel.settle

    def __init__(self, symmetric: bool):
        super().__init__()
        torch.manual_seed(5)
        raw = torch.randn(6, 6, dtype=torch.float64) * 0.35
        self.block = LinearBlock((raw + raw.T) / 2 - 1.5 * torch.eye(6) if symmetric else raw - 1.2 * torch.eye(6))
        self.inflow = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))

    def clamp(self, inputs: Tensor) -> Tensor:
        return inputs @ self.inflow.T

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        return (h - targets).square().sum(-1) / 2

    def closed_form(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        a, b = self.block.matrix.detach(), self.inflow.detach()
        z = -torch.linalg.solve(a, (inputs @ b.T).T).T
        adjoint = -torch.linalg.solve(a.T, (z - targets).T).T
        return {"block.matrix": adjoint.T @ z / len(z), "inflow": adjoint.T @ inputs / len(z)}


def linear_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(5, 4, generator=generator, dtype=torch.float64),
            torch.randn(5, 6, generator=generator, dtype=torch.float64))
