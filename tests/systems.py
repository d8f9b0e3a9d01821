"""Small systems with known answers, shared by the library's tests."""

import lzma
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import eplib
from eplib import blocks, estimators, models
from eplib.diagnostics import LinearSystem
from eplib.models import Model
from eplib.solvers import Relaxation

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # small matrices: a second thread only waits
TIGHT = Relaxation(step=0.3, max_steps=2000, tol=1e-12)


def transformer(kind: str = "language", init: float = 1.0, **block) -> tuple[Model, Tensor, Tensor]:
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


@cache
def hurried() -> tuple[Model, Tensor]:
    """A float32 language model after 30 updates with a large learning rate and no control, with a batch of eight: its force is
    up to five times as long as the state where it starts, and plain relaxation settles it in ten steps."""
    plays = Path(__file__).parents[1] / "data" / "plays.txt.xz"
    text = torch.tensor(list(lzma.decompress(plays.read_bytes())[:100_000]))
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=256, width=32, heads=4, context=16, block=blocks.Thick())
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(30):
        windows = torch.stack([text[i:i + 17] for i in torch.randint(len(text) - 17, (8,))])
        eplib.gradient(model, windows[:, :-1], windows[:, 1:], estimator=estimators.DyadicEP(), solver=Relaxation(step=0.8),
                       nudged=Relaxation(step=0.8, tol=5e-3)).assign(model)
        optimiser.step()
    return model, windows[:, :-1]
