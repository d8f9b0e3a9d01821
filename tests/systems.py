"""Small systems with known answers, shared by the library's tests."""

import os

import torch
from torch import Tensor, nn

from eplib import blocks, models
from eplib.diagnostics import LinearSystem
from eplib.models import EquilibriumModel
from eplib.solvers import Relaxation

if "OMP_NUM_THREADS" not in os.environ:
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


def linear_system(symmetric: bool) -> LinearSystem:
    torch.manual_seed(5)
    raw = torch.randn(6, 6, dtype=torch.float64) * 0.35
    matrix = (raw + raw.T) / 2 - 1.5 * torch.eye(6) if symmetric else raw - 1.2 * torch.eye(6)
    return LinearSystem(matrix, torch.randn(6, 4, dtype=torch.float64))


def linear_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(5, 4, generator=generator, dtype=torch.float64),
            torch.randn(5, 6, generator=generator, dtype=torch.float64))
