"""Images in square patches: MNIST, and your own."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from .. import data
from ..config import configuration
from ..data import DATA, DataError
from .base import EPOCH, Dataset, Task
from .signals import Patches

if TYPE_CHECKING:
    from ..models import Architecture

Positive = Annotated[int, Field(ge=1)]


class ImageTask(Task):
    """What tasks on images share."""

    labelled: ClassVar[bool] = True

    def fits(self, model: "Architecture") -> None:
        if model.causal:
            raise ValueError("block.causal must be true for Text and false for Mnist")
        if model.context is not None:
            raise ValueError(f"images have as many tokens as patches, so context={model.context} would do nothing; leave "
                             "model.context out")


@configuration
class Mnist(ImageTask):
    """MNIST in square patches; `limit` takes the first training images only, the test set is always whole."""

    patch: Literal[4, 7, 14] = 7
    limit: Positive | None = None

    def load(self, root: Path = DATA, *, batch: int, seed: int = 0, context: int | None = None) -> "ImageDataset":
        images = data.mnist(root)
        count = self.limit or len(images.train_labels)
        if count > len(images.train_labels):
            raise ValueError(f"data.limit {count} exceeds the {len(images.train_labels)} training images")
        pixels = [(torch.from_numpy(part.copy()).float() / 255 - 0.1307) / 0.3081  # mean and deviation of the training pixels
                  for part in (images.train_images[:count], images.test_images)]
        labels = [torch.from_numpy(part.copy()).long() for part in (images.train_labels[:count], images.test_labels)]
        return ImageDataset((pixels[0], labels[0]), (pixels[1], labels[1]), 10, self.patch, batch, seed)


@configuration
class Images(ImageTask):
    """Images of your own in square patches; a `validation` share of them, drawn once for all seeds, is held out.

    path: an .npz file with x, images (N, H, W) or (N, H, W, channels), and y, class ids (N,) from 0; or a folder with a folder
    of .png files for each class, all of one size, in grey or in colour. sha256: of what it holds, as in `Text`.
    """

    path: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    patch: Positive = 7
    validation: Annotated[float, Field(gt=0, lt=0.5)] = 0.1

    @model_validator(mode="after")
    def _known_by_content(self) -> "Images":
        if self.sha256 is None:
            object.__setattr__(self, "sha256", data.content_digest(self.path, ".png"))
        return self

    def load(self, root: Path = DATA, *, batch: int, seed: int = 0, context: int | None = None) -> "ImageDataset":
        data.unchanged(self.path, str(self.sha256), ".png")
        place = data.located(self.path)
        images, labels = (_from_folder if place.is_dir() else _from_npz)(place)
        if images.shape[1] % self.patch or images.shape[2] % self.patch:
            raise ValueError(f"images of {images.shape[1]} x {images.shape[2]} pixels have no patches of {self.patch} x "
                             f"{self.patch}; give data.patch, a divisor of both")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        count = int((1 - self.validation) * len(images))
        train, held_out = order[:count], order[count:]
        pixels, ids = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
        deviation, mean = torch.std_mean(pixels[train].double())
        pixels = (pixels - mean.float()) / deviation.float().clamp_min(torch.finfo(torch.float32).tiny)
        return ImageDataset((pixels[train], ids[train]), (pixels[held_out], ids[held_out]), int(labels.max()) + 1, self.patch,
                            batch, seed)


class ImageDataset(Dataset):
    """Patches and labels in the run's order: a fresh permutation each epoch, without the rest that fills no batch.

    train, test: pixels (N, H, W) or (N, H, W, channels) and class ids (N,).
    """

    def __init__(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, patch: int, batch: int,
                 seed: int):
        if batch > len(train[1]):
            raise ValueError(f"batch {batch} exceeds the {len(train[1])} training images")
        self.size, self.seed = batch, seed
        self.train, self.test = ((patches(pixels, patch), labels) for pixels, labels in (train, test))
        self.epoch, self.order = -1, torch.empty(0)  # a permutation of 60,000 takes as long as a small step's update
        self.signal = Patches(tokens=self.train[0].shape[1], size=self.train[0].shape[2], classes=classes,
                              channels=train[0].shape[3] if train[0].dim() == 4 else 1)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(step, len(self.train[1]) // self.size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(EPOCH * self.seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.train[1]), generator=generator)
        chosen = self.order[position * self.size:(position + 1) * self.size]
        return self.train[0][chosen], self.train[1][chosen]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*(part.split(500) for part in self.test), strict=True)


def patches(pixels: Tensor, size: int) -> Tensor:
    """Images (N, H, W) or (N, H, W, channels) as square patches (N, tokens, size * size * channels), row by row."""
    squares = pixels.unflatten(1, (-1, size)).unflatten(3, (-1, size))  # (N, H / size, size, W / size, size, ...)
    return squares.transpose(2, 3).flatten(3).flatten(1, 2).contiguous()


def _from_npz(place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 (N, H, W, ...) and class ids (N,) of a file with x and y."""
    try:
        with np.load(place, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"{place} is no .npz file with x and y ({error}); make one with numpy.savez(path, x=..., y=...)") \
            from None
    if x.ndim not in (3, 4) or y.shape != x.shape[:1] or y.dtype.kind not in "iu" or not len(y) or y.min() < 0:
        raise DataError(f"{place}: x is to be images (N, H, W) or (N, H, W, channels) and y class ids (N,) from 0, got x "
                        f"{x.shape} and y {y.dtype} {y.shape}")
    return x.astype(np.float32), y


def _from_folder(place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 (N, H, W, ...) and class ids (N,) of a folder of class folders; a class is its folder's place by name."""
    try:
        from PIL import Image  # here, because only this needs it
    except ImportError:
        raise DataError("a folder of .png files is read by Pillow, which is not installed; pip install pillow, or give an "
                        ".npz file") from None
    files = data.files_in(place, ".png")
    classes = sorted({file.parent.name for file in files})
    if strange := [file for file in files if file.parent.parent != place]:
        raise DataError(f"{strange[0]} is not in a class folder: give {place}/<class>/<image>.png")
    images = []
    for file in files:
        with Image.open(file) as image:
            if image.mode in ("P", "PA"):  # its pixels are places in a palette, in any order
                raise DataError(f"{file} has a palette (mode {image.mode}); convert all first, as with Pillow: "
                                "Image.open(file).convert(\"RGB\").save(file)")
            images.append(np.asarray(image, dtype=np.float32))
    if len(sizes := {image.shape for image in images}) > 1:
        raise DataError(f"{place} holds images of the sizes {', '.join(map(str, sorted(sizes)))}; give all one size and mode")
    return np.stack(images), np.array([classes.index(file.parent.name) for file in files])
