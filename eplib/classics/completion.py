"""Completion of masked images by an energy (the task of Hao 2026, CET): the hidden patches of an image from the others."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..blocks import Block
from ..calculus import EPS
from ..config import configuration
from ..data import DATA
from ..models import IGNORED, Architecture, Model
from ..tasks import Dataset, ImageDataset, Mnist, Signal, Task
from ..tasks.base import EPOCH

Positive = Annotated[int, Field(ge=1)]
GREY = (0.5 - 0.1307) / 0.3081  # half of full brightness, in the units of the normalised pixels


@configuration
class HiddenPatches(Signal):
    """Inputs are images in patches (B, tokens, size + 1), the last entry 1 where a patch is hidden and its pixels zero; targets
    are their pixels (B, tokens, size), `IGNORED` where a patch is seen."""

    tokens: Positive
    size: Positive


@configuration
class Masked(Task):
    """MNIST in square patches of which a share is hidden, others in each image. limit: training images, the first; tested: test
    images, the first."""

    patch: Literal[4, 7, 14] = 7
    hidden: Annotated[float, Field(gt=0, lt=1)] = 0.5
    limit: Positive | None = None
    tested: Positive = 10_000

    def fits(self, model: Architecture) -> None:
        if not isinstance(model, Completion):
            raise ValueError(f"Masked images are completed by a Completion, got {model.kind}")

    def load(self, root: Path = DATA, *, batch: int, seed: int = 0, context: int | None = None) -> "MaskedImages":
        return MaskedImages(Mnist(patch=self.patch, limit=self.limit).load(root, batch=batch, seed=seed), self, seed)


class MaskedImages(Dataset):
    """The images of a data set in its order, the same patches of an image hidden at every visit of a step or of the test."""

    def __init__(self, images: ImageDataset, task: Masked, seed: int):
        self.images, self.task, self.seed = images, task, seed
        self.signal = HiddenPatches(tokens=images.signal.tokens, size=images.signal.size)  # type: ignore[attr-defined]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self._masked(self.images.batch(step)[0], EPOCH * self.seed + step)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        for count, part in enumerate(self.images.test[0][:self.task.tested].split(500)):
            yield self._masked(part, -1 - count)

    def baselines(self) -> dict[str, float]:
        """What the training images' mean pixel of each place is worth on the hidden patches."""
        mean, found = self.images.train[0].mean(0), []
        for _, targets in self.validation():
            counted = targets != IGNORED
            found.append(((mean - targets).square() * counted).flatten(1).sum(1) / counted.flatten(1).sum(1))
        return {"mean pixel": torch.cat(found).double().mean().item()}

    def _masked(self, patches: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        tokens = patches.shape[1]
        order = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(seed)).argsort(1)
        hidden = (order < round(self.task.hidden * tokens)).unsqueeze(-1)  # (B, T, 1)
        seen = torch.where(hidden, 0.0, patches)
        return torch.cat([seen, hidden.to(patches)], -1), torch.where(hidden, patches, float(IGNORED))


class Completer(Model):
    """A block over the patches, hidden ones included, and a linear readout of each patch's pixels; the loss is the mean squared
    error over the hidden ones."""

    def __init__(self, signal: HiddenPatches, width: int, heads: int, block: Block):
        super().__init__()
        self.embedding = nn.Linear(signal.size + 1, width)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(signal.size))
        nn.init.normal_(self.embedding.weight[:, -1])  # so that a hidden patch's clamp has unit variance too, as LN asks for
        self.position = nn.Parameter(0.5 * torch.randn(signal.tokens, width))
        self.block = block.build(width, heads, signal.tokens)
        self.norm, self.readout = nn.LayerNorm(width, eps=EPS), nn.Linear(width, signal.size)

    def clamp(self, inputs: Tensor) -> Tensor:
        return self.block.drive(self.embedding(inputs) + self.position)

    def predict(self, h: Tensor) -> Tensor:
        return self.readout(self.norm(h))  # (B, T, C) -> (B, T, size)

    def loss_of(self, predictions: Tensor, targets: Tensor) -> Tensor:
        counted = targets != IGNORED
        return ((predictions - targets).square() * counted).flatten(1).sum(1) / self.counted(targets).clamp_min(1)

    def correct(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """How many hidden pixels of each sample are on the right side of half brightness: (B,)."""
        return (((predictions > GREY) == (targets > GREY)) & (targets != IGNORED)).flatten(1).sum(1)


@configuration
class Completion(Architecture):
    """`Completer` around one block."""

    width: Positive = 64
    heads: Positive = 4
    block: Block

    @property
    def explicit(self) -> bool:  # type: ignore[override]
        return self.block.explicit

    def build(self, signal: Signal) -> Completer:
        """The model for HiddenPatches. Raises TypeError for another signal."""
        if not isinstance(signal, HiddenPatches):
            raise TypeError(f"a Completion takes HiddenPatches, and the task gives {signal}; give data: {{kind: Masked}}")
        return Completer(signal, self.width, self.heads, self.block)
