"""What a run learns from: images or text in the run's own order, and the model that takes them.

A batch is a function of (seed, epoch or step) alone, so every arm of one seed sees the same data in the same order.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data as corpora
from ..models import Classifier, EquilibriumModel, LanguageModel
from ..runconfig import Mnist, RunConfig, Text


class ImageTask:
    """Patches and labels of MNIST in the run's order: a fresh permutation each epoch, without the rest that fills no batch."""

    def __init__(self, config: RunConfig, root: Path):
        assert isinstance(config.data, Mnist)
        images = corpora.mnist(root)
        count = config.data.limit or len(images.train_labels)
        if count > len(images.train_labels):
            raise ValueError(f"data.limit {count} exceeds the {len(images.train_labels)} training images")
        if config.batch > count:
            raise ValueError(f"batch {config.batch} exceeds the {count} training images")
        self.config, self.patch, self.count = config, config.data.patch, count
        self.epoch, self.order = -1, torch.empty(0)  # a permutation of 60,000 takes as long as a small step's update
        self.train = self._patches(images.train_images[:count]), torch.from_numpy(images.train_labels[:count].copy()).long()
        self.test = self._patches(images.test_images), torch.from_numpy(images.test_labels.copy()).long()

    def _patches(self, images: Any) -> Tensor:
        pixels = (torch.from_numpy(images.copy()).float() / 255 - 0.1307) / 0.3081  # mean and deviation of the training pixels
        p = self.patch
        return pixels.unflatten(1, (-1, p)).unflatten(3, (-1, p)).transpose(2, 3).flatten(3).flatten(1, 2).contiguous()

    def model(self) -> EquilibriumModel:
        shape, patch = self.config.model, self.patch
        return Classifier(patch=patch**2, tokens=(28 // patch) ** 2, classes=10, width=shape.width, heads=shape.heads,
                          block=shape.block)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        per_epoch = self.count // self.config.batch
        epoch, position = divmod(step, per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.count, generator=generator)
        chosen = self.order[position * self.config.batch:(position + 1) * self.config.batch]
        return self.train[0][chosen], self.train[1][chosen]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*(part.split(500) for part in self.test), strict=True)


class TextTask:
    """Random windows of the training split, consecutive windows of the validation split. The split is the task's own: `train`
    and `held_out` are the ids (N,) of the two parts of the corpus."""

    def __init__(self, config: RunConfig, root: Path):
        assert isinstance(config.data, Text) and config.model.context is not None  # RunConfig sees to both
        self.config, self.data, self.context = config, config.data, config.model.context
        self.text = corpora.text(self.data.corpus, self.data.tokens, root)
        self.vocab, ids = self.text.vocab, torch.from_numpy(self.text.ids)
        cut = int((1 - self.data.validation) * len(ids))
        self.train, self.held_out = ids[:cut], ids[cut:]
        for part, name in ((self.train, "training"), (self.held_out, "validation")):
            if len(part) <= self.context:
                raise ValueError(f"model.context {self.context} does not fit the {name} split of {len(part)} tokens: a window "
                                 "is one token longer; choose a shorter context or another data.validation")
        if config.batch > len(self.train) - self.context:
            raise ValueError(f"batch {config.batch} exceeds the {len(self.train) - self.context} windows of the training split")

    def model(self) -> EquilibriumModel:
        shape = self.config.model
        return LanguageModel(vocab=self.vocab, width=shape.width, heads=shape.heads, context=self.context, block=shape.block)

    def encode(self, prompt: str) -> Tensor:
        """Ids (T,) of a prompt. Raises `eplib.data.DataError` for what the vocabulary lacks, or the training split: a model has
        learned nothing of it."""
        ids = torch.tensor(self.text.encode(prompt), dtype=torch.long)
        seen = torch.bincount(self.train, minlength=self.vocab) > 0
        if not seen[ids].all():
            unseen = self.text.decode(ids[~seen[ids]].unique().tolist())
            raise corpora.DataError(f"the training split of {self.text.corpus} never has {unseen!r}, so that the model knows "
                                    f"nothing of it; choose a prompt without it, or a smaller data.validation than "
                                    f"{self.data.validation:g}")
        return ids

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + step)
        starts = torch.randint(len(self.train) - self.context, (self.config.batch,), generator=generator)
        windows = self.train[starts[:, None] + torch.arange(self.context + 1)]  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = (len(self.held_out) - 1) // self.context
        inputs = self.held_out[: count * self.context].view(count, self.context)
        targets = self.held_out[1: count * self.context + 1].view(count, self.context)
        yield from zip(inputs.split(32), targets.split(32), strict=True)


Task = ImageTask | TextTask


def build_task(config: RunConfig, root: Path | str = "data") -> Task:
    """The run's data. Raises `eplib.data.DataError` if they are not at `root`, ValueError if context or batch do not fit."""
    return (ImageTask if isinstance(config.data, Mnist) else TextTask)(config, Path(root))


def build_model(config: RunConfig, task: Task) -> EquilibriumModel:
    """The run's model with its initial weights, which depend on the seed and the shape only."""
    torch.manual_seed(config.seed)
    return task.model()
