"""Trains the runs of a profile that are not yet in the run store. Needs only torch, numpy, pydantic, safetensors and pyyaml.

    python -m pipelines.train --profile quick --experiment mnist
    python -m pipelines.train --profile paper --budget 500s      # again and again: it goes on where it stopped

Runs go to worker processes, one thread each; every worker checkpoints, and a run that was killed goes on from there.
Exit status: 0 all runs are there, 3 the budget ended first, 1 a run failed (the others are finished first), 2 bad arguments.
"""

import argparse
import math
import multiprocessing
import os
import queue
import re
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.managers import SyncManager
from pathlib import Path

import torch

from eplib.config import ConfigurationError
from eplib.kernels import available
from eplib.models import Backend
from eplib.records import ROOT, Store, configurations, load_profile
from eplib.training import OutOfTime, RunConfig

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


def _end_with_parent() -> None:
    """Ends this process when its parent has: a worker whose command was killed would train on beside the next call's."""
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(profile: str, config: RunConfig, root: Path, device: str, backend: Backend | None, end: float, lines) -> None:
    """end: when the budget ends, of time.time(): starting a worker takes seconds, which count."""
    torch.set_num_threads(1)  # one run a core beats one run on all cores at these sizes, and fixes the order of sums
    Store(profile, root).run(config, time.monotonic() + end - time.time(), device, lambda line: lines.put((config.name, line)),
                             backend)


def train(profile: str, configs: list[RunConfig], workers: int, device: str, budget: float, root: Path = ROOT,
          backend: Backend | None = None) -> int:
    """Trains `configs`, `workers` at a time, and prints progress; returns the exit status described above."""
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)
    deadline = time.monotonic() + budget
    failures, late, done = [], 0, 0
    manager = SyncManager()
    manager.start(_end_with_parent)
    with manager:
        lines = manager.Queue()
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
            began = time.monotonic()
            pending: dict[Future, RunConfig] = {}
            waiting, current, printed = list(configs), {}, 0.0
            while pending or waiting:
                while waiting and len(pending) < workers and time.monotonic() < deadline:
                    config = waiting.pop(0)
                    end = time.time() + deadline - time.monotonic()
                    pending[pool.submit(_work, profile, config, root, device, backend, end, lines)] = config
                if waiting and not pending:
                    late += len(waiting)
                    break
                for future in [f for f in pending if f.done()]:
                    config = pending.pop(future)
                    current.pop(config.name, None)
                    error = future.exception()
                    if isinstance(error, OutOfTime):
                        late += 1
                    elif error is not None:
                        failures.append(f"{config.experiment}/{config.name}: {type(error).__name__}: {error}")
                        print(f"\nfailed: {failures[-1]}", file=sys.stderr, flush=True)
                    else:
                        done += 1
                        print(f"{config.experiment}/{config.name}: done ({done} of {len(configs)}, "
                              f"{time.monotonic() - began:.0f} s)\x1b[K" if sys.stderr.isatty() else
                              f"{config.experiment}/{config.name}: done ({done} of {len(configs)}, "
                              f"{time.monotonic() - began:.0f} s)", flush=True)
                try:
                    name, line = lines.get(timeout=0.2)
                    current[name] = line
                except queue.Empty:
                    continue
                if sys.stderr.isatty():
                    sys.stderr.write("\r" + " | ".join(current.values())[: os.get_terminal_size(2).columns - 1] + "\x1b[K")
                    sys.stderr.flush()
                elif time.monotonic() - printed > QUIET_SECONDS:
                    printed = time.monotonic()
                    print("\n".join(current.values()), file=sys.stderr, flush=True)
    if late:
        print(f"out of time: {late} of {len(configs)} runs are unfinished; call again to go on", flush=True)
    return 1 if failures else 3 if late else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--experiment", help="one experiment of the profile; all by default")
    parser.add_argument("--only", help="runs whose name contains this")
    parser.add_argument("--budget", default="", help="stop after this long, e.g. 500s, 10m, 2h")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time; one a core by default")
    parser.add_argument("--device", default="cpu", help="where to train, e.g. cuda; never chosen silently")
    parser.add_argument("--backend", choices=("torch", "compiled"),
                        help="what computes the phases; by default the compiled kernel where it is built and fits the run")
    parser.add_argument("--list", action="store_true", help="say which runs are there and stop")
    options = parser.parse_args(arguments)
    try:
        budget = seconds(options.budget) if options.budget else math.inf
        groups = load_profile(options.profile).get("runs") or {}
        if options.experiment and options.experiment not in groups:
            raise ConfigurationError(f"profile {options.profile} has no runs for {options.experiment!r}; it has "
                                     f"{', '.join(groups)}")
        if options.device != "cpu" and not torch.cuda.is_available():
            raise ConfigurationError(f"device {options.device!r} was asked for, but torch finds no such device here")
        chosen = [config for group in ([options.experiment] if options.experiment else groups)
                  for config in configurations(options.profile, group) if (options.only or "") in config.name]
        if not chosen and options.only:
            raise ConfigurationError(f"no run of profile {options.profile} has {options.only!r} in its name")
    except (ConfigurationError, ValueError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    store = Store(options.profile)
    absent = [config for config in chosen if store.find(config) is None]
    print(f"{options.profile}: {len(chosen)} runs, {len(chosen) - len(absent)} recorded, {len(absent)} to train", flush=True)
    if absent and options.device == "cpu" and not available():
        print("the compiled kernel is not built: PyTorch computes everything, two to four times as slowly "
              "(make kernel builds it where there is a C++ compiler)", flush=True)
    if options.list:
        for config in chosen:
            run = store.find(config)
            state = "absent" if run is None else "recorded" if run.current else "recorded by older source"
            print(f"  {config.experiment}/{config.name}: {state}")
        return 0
    status = train(options.profile, absent, max(1, min(options.workers, len(absent))), options.device, budget,
                   backend=options.backend) if absent else 0
    if status == 0 and not options.only:
        for group in [options.experiment] if options.experiment else groups:
            for name in store.prune(group):
                print(f"removed {group}/{name}: no longer in the profile")
    return status


if __name__ == "__main__":
    sys.exit(main())
