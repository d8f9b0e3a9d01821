"""One run at a time on all ranks that torchrun started, each with its part of every batch:

    torchrun --nproc-per-node 2 -m pipelines.train --profile paper --only ep_linear

The first rank goes through the store as a worker of that command does; the others know no store, and are told what to train.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from eplib import parallel
from eplib.models import Backend
from eplib.profiles import ROOT
from eplib.runconfig import RunConfig
from eplib.store.leases import Held
from eplib.store.records import Store
from eplib.store.summary import summarise
from eplib.training import OutOfTime, Trainer


@contextmanager
def _together(device: str) -> Iterator[str]:
    """`parallel.joined`; ends the process with status 1 and in words, where another rank is gone."""
    try:
        with parallel.joined(device) as own:
            yield own
    except parallel.RankError as error:
        raise SystemExit(f"failed: {error}") from None


def lead(store: Store, configs: list[RunConfig], device: str, budget: float, backend: Backend | None = None) -> int:
    """Trains `configs` as the first rank, one after the other, and prints progress; returns the exit status of
    `pipelines.train`. What another command trains is left to it. An error of one run ends all ranks."""
    deadline, late = time.monotonic() + budget, 0
    with _together(device) as own:
        torch.set_num_threads(1)
        for done, config in enumerate(configs, 1):
            try:
                store.run(config, deadline, own, backend=backend, wait=False)
                print(f"{config.experiment}/{config.name}: done ({done} of {len(configs)})", flush=True)
            except (OutOfTime, Held) as error:
                late += 1
                print(f"{config.experiment}/{config.name}: {error}", flush=True)
        parallel.broadcast(lambda: None)
    return 3 if late else 0


def follow(device: str, root: Path = ROOT) -> int:
    """Takes part, as one of the others, in every run that the first rank begins, until there is none left; returns 0."""
    with _together(device) as own:
        torch.set_num_threads(1)
        while job := parallel.broadcast(lambda: None):
            config, backend, left = job
            with suppress(OutOfTime):
                trainer = Trainer(config, root / "checkpoints", root / "data", own, backend)
                summarise(trainer, trainer.advance(time.monotonic() + left))
    return 0
