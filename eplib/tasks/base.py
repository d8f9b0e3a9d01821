"""The interfaces of tasks: a configuration that says what is learned, and the data set that it loads."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..data import DATA, Vocabulary
from ..families import Family, owed
from .signals import Signal

if TYPE_CHECKING:
    from ..models import Architecture

EPOCH = 1_000_003  # a prime: generators of (seed, epoch or step) do not meet for as many of them


class Dataset:
    """A task's data in one run's order. A batch is a function of (seed, epoch or step) alone, so every arm of one seed sees the
    same data in the same order.

    signal: what a model is to take. vocabulary: of a text.
    """

    signal: Signal
    vocabulary: Vocabulary | None = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (B, ...) and targets (B, ...) of update `step`, from 0."""
        raise owed(self, "batch(step)")

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation split in batches, the same ones each time."""
        raise owed(self, "validation()")

    def baselines(self) -> dict[str, float]:
        """What predictors without a network reach on the validation split, in nats: {words for it: loss}."""
        return {}


class Task(Family):
    """What a run learns. One of your own is a `@configuration` with `load`, and `fits` where not every model will do.

    labelled: a batch's targets are one class id for each sample.
    """

    labelled: ClassVar[bool] = False

    def fits(self, model: "Architecture") -> None:
        """Raises ValueError for a model that cannot learn it."""

    def load(self, root: Path = DATA, *, batch: int, seed: int = 0, context: int | None = None) -> Dataset:
        """The data in a run's order. root: the folder of raw/ and prepared/. batch: samples in each. context: length of a
        text's windows, the model's.

        Raises `eplib.data.DataError` where they are missing or damaged, ValueError if batch or context do not fit them.
        """
        raise owed(self, "load(root, batch, seed, context)")
