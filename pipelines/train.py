"""Trains the runs of a profile that are not yet in the run store. Needs what eplib needs and no more.

    python -m pipelines.train --profile quick --experiment mnist
    python -m pipelines.train --profile paper --budget 500s      # again and again: it goes on where it stopped

Runs go to worker processes, one thread each; every worker checkpoints, and a run that was killed goes on from there. Under
torchrun all ranks train one run after the other together (`pipelines.ranks`).
Exit status: 0 all runs are there, 3 the budget ended first, 1 a run failed (the others are finished first), 2 bad arguments.
"""

import argparse
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from eplib import parallel
from eplib.config import ConfigurationError
from eplib.kernels import available
from eplib.models import Backend
from eplib.profiles import ROOT, configurations, load_profile, run_folder
from eplib.store.leases import Held, Lost
from eplib.store.records import Store
from eplib.training import OutOfTime, RunConfig
from pipelines import ranks
from pipelines.common import command, processors

QUIET_SECONDS = 15.0  # between two lines of progress where there is no terminal to rewrite one on


def seconds(text: str) -> float:
    """Seconds of a budget such as 500, 500s, 10m or 2h. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not match:
        raise ValueError(f"a budget is a number with s, m or h, such as 500s or 2h; got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


# Read by glibc when a worker starts: keep freed buffers in the process, where they would otherwise go back to the system and be
# faulted in again at every operation. Values set by the user stay.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}


TURN = 0.2  # seconds between two looks at the workers
BUSY_SECONDS = 5.0  # between two looks at runs that other commands train

_lines: Connection | None = None  # of a worker, to the command


def _start_worker(lines: Connection) -> None:
    """Ends this process when its parent has: a worker whose command was killed would train on beside the next call's."""
    global _lines
    _lines = lines

    def watch(parent: multiprocessing.process.BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=watch, args=(parent,), daemon=True).start()


def _send(line: str) -> None:
    assert _lines is not None, "this process is no worker"
    _lines.send(line)


def work(profile: str, config: RunConfig, root: Path, device: str, backend: Backend | None, end: float = math.inf,
         show: Callable[[str], None] = _send) -> None:
    """Trains a run in this process, as every worker and every job of a sweep does. end: when the budget ends, of time.time():
    starting a worker takes seconds, which count. Raises `Held` where another process trains the run, `OutOfTime` at the end."""
    torch.set_num_threads(1)  # one run a core beats one run on all cores at these sizes, and fixes the order of sums
    Store(profile, root).run(config, time.monotonic() + end - time.time(), device, show, backend, wait=False)


@dataclass
class Worker:
    """A pool of one process, so that one that is killed takes no other's run with it, and the pipe its progress comes by: no
    queue, because whoever is killed while it holds a queue's lock stops all others."""

    pool: ProcessPoolExecutor = field(init=False)
    lines: Connection = field(init=False)
    work: tuple[RunConfig, Future] | None = None
    line: str = ""

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A new process, the first or in place of one that was killed."""
        self.lines, theirs = multiprocessing.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker,
                                        initargs=(theirs,))

    def give(self, config: RunConfig, task: Callable[[RunConfig], None]) -> None:
        self.work, self.line = (config, self.pool.submit(task, config)), ""

    def outcome(self) -> tuple[RunConfig, BaseException | None] | None:
        """The finished run and its error; None while there is none. A process that was killed is replaced."""
        if self.work is None or not self.work[1].done():
            return None
        (config, future), self.work = self.work, None
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            self.pool.shutdown()
            self.start()
        return config, error

    def listen(self) -> None:
        """Takes in the lines that have come; each is short enough to be written at once, so none is cut off by a kill."""
        while self.lines.poll():
            self.line = self.lines.recv()


@dataclass
class Agenda:
    """The state of one call: what waits, what is tried again, what came out."""

    store: Store
    waiting: list[RunConfig]
    total: int
    done: int = 0
    late: int = 0
    failed: int = 0
    killed: set[str] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)
    looked: float = -math.inf
    given: list[RunConfig] = field(default_factory=list)

    def next(self) -> RunConfig | None:
        """The next run that no other process trains and that goes on from none that is still to come, or None; those that
        another has recorded meanwhile are done."""
        if time.monotonic() - self.looked < BUSY_SECONDS:
            return None
        for config in list(self.waiting):
            if awaits(config, (*self.waiting, *self.given)):
                continue
            if self.store.find(config):
                self.waiting.remove(config)
                self.finished(config, "recorded already")
            elif not self.store.holder(config):
                self.waiting.remove(config)
                self.given.append(config)
                return config
        if self.waiting:
            self.looked = time.monotonic()
        return None

    def take(self, config: RunConfig, error: BaseException | None) -> None:
        """What came out of a run."""
        self.given.remove(config)
        name = f"{config.experiment}/{config.name}"
        if error is None:
            self.finished(config, "done")
        elif isinstance(error, OutOfTime):
            self.late += 1
        elif isinstance(error, Held | Lost):
            self.waiting.append(config)
        elif isinstance(error, BrokenProcessPool) and name not in self.killed:
            self.killed.add(name)
            self.waiting.insert(0, config)
            print(f"\n{name}: its worker was killed (by the system, where memory is short); it goes on once more from its "
                  "checkpoint", file=sys.stderr, flush=True)
        else:
            self.failed += 1
            said = "its worker was killed twice" if isinstance(error, BrokenProcessPool) else f"{type(error).__name__}: {error}"
            print(f"\nfailed: {name}: {said}", file=sys.stderr, flush=True)

    def finished(self, config: RunConfig, how: str) -> None:
        self.done += 1
        clear = "\x1b[K" if sys.stderr.isatty() else ""
        print(f"{config.experiment}/{config.name}: {how} ({self.done} of {self.total}, "
              f"{time.monotonic() - self.began:.0f} s){clear}", flush=True)


def place(config: RunConfig) -> str:
    """Where a store keeps a run: experiment/name-digest."""
    return f"{config.experiment}/{run_folder(config)}"


def awaits(config: RunConfig, left: Iterable[RunConfig]) -> bool:
    """Whether the run that this one branches from is one of those that are still to be trained."""
    return config.branch is not None and config.branch.run in map(place, left)


def absent(store: Store, wanted: list[RunConfig]) -> list[RunConfig]:
    """The runs that are to be trained. One that goes on from a run that is trained again is, too, unless that keeps the same
    state."""
    missing = [config for config in wanted if store.find(config) is None]
    again = set(map(place, missing)) if store.stale == "retrain" else set()
    return [config for config in wanted if config in missing or (config.branch and config.branch.run in again)]


def keep_memory() -> None:
    """Sets the allocator of the processes that this one starts."""
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)


def train(profile: str, configs: list[RunConfig], workers: int, device: str, budget: float, root: Path = ROOT,
          backend: Backend | None = None) -> int:
    """Trains `configs`, `workers` at a time, and prints progress; returns the exit status described above. Runs that other
    processes train are left to them, and waited for at the end."""
    keep_memory()
    deadline, printed = time.monotonic() + budget, 0.0
    task = partial(work, profile, root=root, device=device, backend=backend, end=time.time() + budget)
    agenda, team = Agenda(Store(profile, root), list(configs), len(configs)), [Worker() for _ in range(workers)]
    try:
        while True:
            for worker in team:
                worker.listen()
                if outcome := worker.outcome():
                    agenda.take(*outcome)
                if not worker.work and time.monotonic() < deadline and (config := agenda.next()):
                    worker.give(config, task)
            busy = [worker for worker in team if worker.work]
            if not busy and (not agenda.waiting or time.monotonic() >= deadline):
                break
            wait([worker.lines for worker in busy], TURN)
            printed = _show([worker.line for worker in busy if worker.line], printed)
    finally:
        for worker in team:
            worker.pool.shutdown(wait=False, cancel_futures=True)
    late = agenda.late + len(agenda.waiting)
    if late:
        print(f"out of time: {late} of {len(configs)} runs are unfinished; call again to go on", flush=True)
    return 1 if agenda.failed else 3 if late else 0


def _show(lines: list[str], printed: float) -> float:
    """Shows what the workers do now, on one line of a terminal, or every QUIET_SECONDS; returns when it was last printed."""
    if sys.stderr.isatty():
        sys.stderr.write("\r" + " | ".join(lines)[: os.get_terminal_size(2).columns - 1] + "\x1b[K")
        sys.stderr.flush()
    elif lines and time.monotonic() - printed > QUIET_SECONDS:
        printed = time.monotonic()
        print("\n".join(lines), file=sys.stderr, flush=True)
    return printed


def chosen(profile: str, experiment: str | None, only: str) -> list[RunConfig]:
    """The runs that the arguments name. Raises `ConfigurationError` where there are none."""
    groups = load_profile(profile).get("runs") or {}
    if experiment and experiment not in groups:
        raise ConfigurationError(f"profile {profile} has no runs for {experiment!r}; it has {', '.join(groups)}")
    found = [config for group in ([experiment] if experiment else groups)
             for config in configurations(profile, group) if only in f"{config.experiment}/{config.name}"]
    if not found and only:
        raise ConfigurationError(f"no run of profile {profile} has {only!r} in its name")
    return found


def check(device: str, workers: int) -> None:
    """Raises `ConfigurationError` for a device that is not here, or no workers."""
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigurationError(f"device {device!r} was asked for, but torch finds no such device here")
    if workers < 1:
        raise ConfigurationError(f"--workers {workers}: at least one process has to train")


def state(store: Store, config: RunConfig) -> str:
    """Where a run stands, in words."""
    if run := store.find(config):
        return "recorded" if run.current else "recorded by older source"
    if other := store.holder(config):
        return f"being trained by {other}"
    if store.scratch(config).exists():
        return "begun; goes on from its checkpoint"
    return "absent; older source has begun it, which is not gone on from" if store.unfinished(config) else "absent"


def parser_of_runs(text: str | None) -> argparse.ArgumentParser:
    """The arguments that say which runs are trained, on what."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--experiment", help="one experiment of the profile; all by default")
    parser.add_argument("--only", default="", help="runs whose name, as --list gives it, contains this")
    parser.add_argument("--device", default="cpu", help="where to train, e.g. cuda; never chosen silently")
    parser.add_argument("--backend", choices=("torch", "compiled"),
                        help="what computes the phases; by default the compiled kernel where it is built and fits the run")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = parser_of_runs(__doc__)
    parser.add_argument("--budget", default="", help="stop after this long, e.g. 500s, 10m, 2h")
    parser.add_argument("--workers", type=int, default=processors(),
                        help="runs at a time; by default one for each processor that this process may use")
    parser.add_argument("--list", action="store_true", help="say which runs are there and stop")
    options = parser.parse_args(arguments)
    rank, together = parallel.asked()
    if rank and not options.list:
        return ranks.follow(options.device)
    try:
        budget = seconds(options.budget) if options.budget else math.inf
        wanted = chosen(options.profile, options.experiment, options.only)
        check(options.device, options.workers)
    except (ConfigurationError, ValueError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    store = Store(options.profile)
    missing = absent(store, wanted)
    print(f"{options.profile}: {len(wanted)} runs, {len(wanted) - len(missing)} recorded, {len(missing)} to train", flush=True)
    if missing and options.device == "cpu" and not available():
        print("the compiled kernel is not built: PyTorch computes everything, two to four times as slowly "
              "(make kernel builds it where there is a C++ compiler)", flush=True)
    if options.list:
        for config in wanted:
            print(f"  {config.experiment}/{config.name}: {state(store, config)}")
        return 0
    if together > 1:
        status = ranks.lead(store, missing, options.device, budget, options.backend)
    else:
        status = train(options.profile, missing, min(options.workers, len(missing)), options.device, budget,
                       backend=options.backend) if missing else 0
    if status == 0 and not options.only:
        for group in [options.experiment] if options.experiment else load_profile(options.profile).get("runs") or {}:
            for name in store.prune(group):
                print(f"removed {group}/{name}: no longer in the profile")
    return status


if __name__ == "__main__":
    command(main)
