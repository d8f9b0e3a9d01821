"""Steps to a residual, sample by sample."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..models import Model
from ..solvers import Relaxation
from ..tasks import Dataset

NOISE = 1.0  # of the noisy copy of the test images, in standard deviations of the training pixels


def ranks(values: Tensor) -> Tensor:
    """Rank of each value (n,), from 0; equal values share their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count + 1) / 2).double()[place]


@torch.no_grad()
def adaptive_compute(model: Model, batches: Iterable[tuple[Tensor, Tensor]], step: float,
                     tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5), noise: float = 0.0,
                     max_steps: int = 300) -> dict[str, dict]:
    """How many plain relaxation steps each image takes to each residual, against its margin and whether it is classified right.

    batches: (inputs, class ids), to whose inputs Gaussian noise of the standard deviation `noise` is added. The margin is the
    largest logit over the second at the tightest residual. For each tolerance, in decreasing order: the share that did not
    settle within `max_steps`; of the others mean, standard deviation, least and most steps; the mean over those classified
    right and wrong; Spearman's correlation of steps with margin; the mean in each tenth of the images by margin, smallest
    first. And `accuracy` in percent.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for inputs, targets in batches:
        inputs, targets = (part.to(next(model.parameters()).device) for part in (inputs, targets))
        if noise:
            inputs = inputs + noise * torch.randn(inputs.shape, generator=generator).to(inputs)
        state: Tensor | None = None
        total, steps, reached = torch.zeros((), dtype=torch.long), [], []
        for tol in tolerances:  # one relaxation, read where it passes each residual
            phase = model.settle(inputs, Relaxation(step=step, max_steps=max_steps, tol=tol), state)
            state, total = phase.value, phase.steps + total
            steps.append(total)
            reached.append((phase.residual <= tol) & (total <= max_steps))  # the steps to the residuals above count as well
        best = model.predict(model.block.output(phase.value)).topk(2)
        rows.append((torch.stack(steps, -1), torch.stack(reached, -1), best.values[:, 0] - best.values[:, 1],
                     best.indices[:, 0] == targets))
    taken, settled, margins, right = (torch.cat(part).cpu() for part in zip(*rows, strict=True))
    tenth = (ranks(margins) * 10 / len(margins)).long()
    found: dict[str, Any] = {"accuracy": 100 * right.double().mean().item()}
    for index, tol in enumerate(tolerances):
        kept = settled[:, index]
        n = taken[kept, index].double()
        if len(n) < 2:
            found[f"{tol:g}"] = {"unsettled": 1 - len(n) / len(kept)}
            continue
        both = torch.stack([ranks(n), ranks(margins[kept])])
        found[f"{tol:g}"] = {
            "unsettled": 1 - len(n) / len(kept), "mean": n.mean().item(), "deviation": n.std().item(),
            "least": n.min().item(), "most": n.max().item(), "right": n[right[kept]].mean().item(),
            "wrong": n[~right[kept]].mean().item(), "rank_correlation": torch.corrcoef(both)[0, 1].item(),
            "by_margin": [n[tenth[kept] == part].mean().item() for part in range(10)]}
    return found


def clean_and_noisy(model: Model, task: Dataset, step: float) -> dict[str, dict[str, dict]]:
    """`adaptive_compute` of a task's test images as they are, and under noise."""
    return {name: adaptive_compute(model, task.validation(), step, noise=noise)
            for name, noise in (("clean", 0.0), ("noisy", NOISE))}
