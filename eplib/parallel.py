"""One run on several processes, "ranks": each takes a part of every batch, and what concerns the whole batch is agreed upon.

The ranks are replicas: the same weights, the same carried state, the same decisions. A step sends a few numbers that say how
its phases ended, and the gradient once, as many numbers as there are parameters, however many steps the phases took. Started
by torchrun; alone, a process has the whole batch, and everything here is the identity.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .families import Family

T = TypeVar("T")
PATIENCE = 600.0  # seconds that a rank waits for the others, of which the first may be evaluating


class RankError(RuntimeError):
    """Another rank is gone, does not answer, or has come to something else; the message says what to do."""


@dataclass(frozen=True)
class Part:
    """Samples `first` .. `first + count` of a batch of `size`, of which each of `ranks` processes has such a part."""

    size: int
    first: int
    count: int
    rank: int = 0
    ranks: int = 1

    @classmethod
    def of(cls, size: int) -> "Part":
        """This process's part of a batch; those of the ranks differ by one sample at most. Raises ValueError where one would
        have none."""
        rank, ranks = place()
        if size < ranks:
            raise ValueError(f"a batch of {size} cannot be shared by {ranks} ranks; start at most {size}")
        first, end = size * rank // ranks, size * (rank + 1) // ranks
        return cls(size, first, end - first, rank, ranks)

    @classmethod
    def alone(cls, size: int) -> "Part":
        """The whole of a batch, which no other rank shares."""
        return cls(size, 0, size)

    @property
    def rows(self) -> slice:
        """Of the whole batch, those that are this part's."""
        return slice(self.first, self.first + self.count)

    @property
    def share(self) -> float:
        """Of the whole batch: the weight of a mean over this part in that over all."""
        return self.count / self.size

    @property
    def leads(self) -> bool:
        """Whether this process is the one that reads, writes and shows."""
        return self.rank == 0

    def mine(self, draw: Callable[[int], Tensor]) -> Tensor:
        """This part's rows of what is drawn for the whole batch, so that a draw does not depend on the number of ranks."""
        return draw(self.size)[self.rows]

    def pooled(self, value: T) -> list[T]:
        """What every part has, in order; tensors are to be on the CPU."""
        if self.ranks == 1:
            return [value]
        found: list[Any] = [None] * self.ranks
        with _explained():
            dist.all_gather_object(found, value)
        return found

    def largest(self, *values: float) -> list[float]:
        """Each value's maximum over all parts, NaN if any is."""
        each = zip(*self.pooled(values), strict=True)
        return [math.nan if any(math.isnan(value) for value in column) else max(column) for column in each]

    def total(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor's sum over all parts, in one message."""
        if self.ranks == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _explained():
            dist.all_reduce(flat)
        return [one.view_as(tensor).to(tensor.dtype)
                for one, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True)]

    def gathered(self, local: Tensor) -> Tensor:
        """What every part has of something, (count, ...), as the whole batch has it, (size, ...)."""
        return local if self.ranks == 1 else torch.cat(self.pooled(local.cpu())).to(local.device)

    def check(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Raises `RankError` where a rank is at another step than the first one, or has other numbers."""
        if self.ranks == 1:
            return
        content = sha256()
        for name, value in tensors.items():
            content.update(name.encode() + value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        said = self.pooled((step, content.hexdigest()))
        for rank, one in enumerate(said):
            if one != said[0]:
                what = f"is at step {one[0]}, the first at {said[0][0]}" if one[0] != said[0][0] else \
                    f"has other weights than the first after {step} steps"
                raise RankError(f"rank {rank} {what}: the ranks are to run the same source and versions on like processors; "
                                "start again, it goes on from the last checkpoint")


ALONE = Part(1, 0, 1)  # of a process of its own, for what asks for no rows


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks, (0, 1) for one that is alone."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def asked() -> tuple[int, int]:
    """The rank that torchrun has started this process as, and the number of ranks."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined(device: str = "cpu", patience: float = PATIENCE) -> Iterator[str]:
    """Among the ranks that torchrun started; gives the device of this one, of which those of a machine have one each.

    patience: seconds after which a rank that waits for another gives up.
    """
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(seconds=patience))
    try:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        yield device
    finally:
        dist.destroy_process_group()


def broadcast(make: Callable[[], T]) -> T:
    """What the first rank makes, on every one; its tensors are to be on the CPU."""
    rank, ranks = place()
    box: list[Any] = [None if rank else make()]
    if ranks > 1:
        with _explained():
            dist.broadcast_object_list(box, 0)
    return box[0]


def refuse_shared(configuration: Any) -> None:
    """Raises ValueError where a configuration has a part that is not known to treat the samples of a batch apart: a class that
    is not eplib's and does not say `by_sample = True` itself, as does not its family."""
    said = [one for one in type(configuration).__mro__ if one is type(configuration) or Family in one.__bases__]
    if isinstance(configuration, Family) and ":" in configuration.kind and not any(vars(one).get("by_sample") for one in said):
        raise ValueError(f"{configuration.kind} is not known to treat every sample of a batch for itself, so it cannot be "
                         "given a part of one: train on one rank; or, where it does, say so in the class, by_sample = True")
    names = [field.name for field in fields(configuration)] if is_dataclass(configuration) else []
    for part in configuration if isinstance(configuration, tuple) else [getattr(configuration, name) for name in names]:
        refuse_shared(part)


@contextmanager
def _explained() -> Iterator[None]:
    """What the transport says of a rank that is gone, in words."""
    try:
        yield
    except RuntimeError as error:
        said = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0]).split(". ")[0]
        raise RankError(f"rank {dist.get_rank()} has lost another one, or waited for it too long ({said}); start the command "
                        "again, it goes on from the last checkpoint") from error
