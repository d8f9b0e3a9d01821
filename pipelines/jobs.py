"""A job of a sweep, as it runs on whatever machine it was sent to: it names its runs, and trains them as the workers of
`pipelines.train` do."""

import math
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import Checkpointable

from eplib.files import HOST
from eplib.models import Backend
from eplib.profiles import configurations
from eplib.sources import source_digest
from eplib.store.leases import Held, Lost
from eplib.store.records import Store
from eplib.training import RunConfig
from pipelines.train import place, work

SAY = 30.0  # seconds between two lines of progress in a run's log
STARTING = 60.0  # seconds that the tasks of one job may start apart


class SourceChanged(RuntimeError):
    """The source or the profile is another than when the job was submitted, and so is what it would compute."""


@dataclass(frozen=True)
class Part:
    """A run of a job: its place in the store, and the source that it was submitted with."""

    place: str
    source: str

    @classmethod
    def of(cls, config: RunConfig) -> "Part":
        return cls(place(config), source_digest(config))


@dataclass(frozen=True)
class Job(Checkpointable):
    """Runs that share a node, and its card: the task of rank r trains the r-th. All that a run has done is in its checkpoint,
    so a job whose time is over goes back to the queue as it is, and whatever handles the signal saves nothing."""

    profile: str
    root: Path
    device: str
    backend: Backend | None
    parts: tuple[Part, ...] = ()

    def __call__(self) -> None:
        began, rank, failure = time.monotonic(), JobEnvironment().global_rank, None
        try:
            if rank < len(self.parts):
                self._train(self.parts[rank])
        except Exception as error:
            failure = error
        if rank == 0:  # which alone puts the job back into the queue, so it stays until the last has ended
            store, others = Store(self.profile, self.root), [self._config(part) for part in self.parts[1:]]
            while any(not store.find(one) and (store.holder(one) or time.monotonic() - began < STARTING) for one in others):
                time.sleep(1)
        if failure:
            raise failure

    def _train(self, part: Part) -> None:
        path = log_of(Store(self.profile, self.root), part.place)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            _say(f"job {JobEnvironment().job_id} on {HOST}")
            try:
                config = self._config(part)
                if (source := source_digest(config)) != part.source:
                    raise SourceChanged(f"{part.place} was submitted with the source {part.source}, and here it is {source}; "
                                        "call the sweep again, which submits it with today's")
                work(self.profile, config, self.root, self.device, self.backend, show=_now_and_then())
                _say("recorded")
            except (Held, Lost) as other:
                _say(f"left to who trains it: {other}")
            except Exception:
                traceback.print_exc()
                raise
            except BaseException:  # a signal
                _say("stopped; goes on from its checkpoint")
                raise

    def _config(self, part: Part) -> RunConfig:
        for config in configurations(self.profile, part.place.partition("/")[0], self.root):
            if place(config) == part.place:
                return config
        raise SourceChanged(f"profile {self.profile} no longer names {part.place}; call the sweep again")


def _now_and_then() -> Callable[[str], None]:
    """Says a line of progress, if none was said for a while."""
    said = -math.inf

    def show(line: str) -> None:
        nonlocal said
        if time.monotonic() - said > SAY:
            said = time.monotonic()
            _say(line)

    return show


def _say(line: str) -> None:
    print(time.strftime("%F %T"), line, flush=True)


def log_of(store: Store, place: str) -> Path:
    """The log of a run: what its jobs said, one after the other."""
    return store.checkpoints / "logs" / f"{place}.log"
