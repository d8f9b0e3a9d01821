"""The run store: what was trained, with which configuration and by which source, and the results that notebooks write.

    results/<profile>/runs/<experiment>/<name>-<digest>/    config.json metrics.json log.csv.gz curve.csv provenance.json
                                                            (sample.txt, horizon.json where they were asked for)
    results/<profile>/weights/<experiment>/<name>-<digest>/ step-000300.safetensors log.csv.gz   (every step; stays here)
    results/<profile>/machine/runs/<experiment>/<name>-<digest>/ machine.json timing.csv   (times and host, kept apart)

The first of these is there as a whole or not at all, and whoever publishes a run second leaves the first's. The digest is that
of what differs from the defaults, and config.json is whole: a changed configuration, or default, never shows an old result, and
an option that is added with a default leaves every run where it is.
"""

import gzip
import math
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import markup
from ..config import ConfigurationError, parse, plain
from ..diagnostics import clean_and_noisy
from ..files import leftovers, publish, remove, write_atomically
from ..models import Backend
from ..parallel import broadcast
from ..profiles import ROOT, configurations, load_profile, run_folder
from ..provenance import machine, versions
from ..runconfig import Branch
from ..settings import in_repository, name_of
from ..sources import source_digest
from ..training import OutOfTime, Progress, RunConfig, Trainer, fastest_backend, show_on_terminal
from .comparisons import Comparison, best_of_grid, compare, differences, excursions, mean_loss, spread
from .formats import to_csv, to_json
from .leases import Held, holder, lease
from .runs import PROMPT, Run, digest_of, state_path
from .summary import evaluations, summarise, windows

__all__ = ["ROOT", "Comparison", "Run", "Store", "best_of_grid", "compare", "configurations", "differences", "excursions",
           "load_profile", "machine", "mean_loss", "save_machine", "save_result", "spread", "summarise"]

RUN = re.compile(r"[a-z0-9][a-z0-9_.-]*-lr[0-9.]+(e[+-]\d+)?-seed\d+-[0-9a-f]{8}")  # the name of a run's folder
POLL = 1.0  # seconds between two looks at a run that another process trains


@dataclass(frozen=True)
class Saved:
    """A result as a notebook shows it: a table as HTML, else where it lies."""

    path: Path
    value: Any

    def _repr_html_(self) -> str | None:
        return markup.table(self.path.stem, self.value) if markup.is_table(self.value) else None

    def __repr__(self) -> str:
        return f"{self.path.stem}: {self.path.parent.name}/{self.path.name}"


def save_result(profile: str, experiment: str, name: str, value: Any, root: Path = ROOT) -> Saved:
    """Writes a notebook's result to results/<profile>/<experiment>/<name>.json; non-finite numbers become null."""
    path = root / "results" / name_of(profile) / experiment / f"{name}.json"
    write_atomically(path, to_json(value))
    return Saved(path, value)


def save_machine(profile: str, name: str, value: Any, root: Path = ROOT) -> Saved:
    """Like `save_result` for times and other facts of this machine: results/<profile>/machine/<name>.json."""
    return save_result(profile, "machine", name, value | {"machine": machine()}, root)


class Store:
    """Runs of one profile. `run` gives a run and trains it if it is absent."""

    def __init__(self, profile: str, root: Path = ROOT):
        self.profile, self.root = profile, Path(root)
        self.results, self.checkpoints = (self.root / kind / name_of(profile) for kind in ("results", "checkpoints"))
        settings = load_profile(profile, self.root)
        self.stale, self.sample = settings.get("stale", "keep"), settings.get("sample", 0)

    def find(self, config: RunConfig) -> Run | None:
        """The recorded run of this configuration, or None. A run of older source counts unless the profile retrains those.

        Its folder's name says what differs from the defaults; the configuration recorded in it is compared as a whole, and a
        run for which a default was another one is warned of and does not count.
        """
        run = self._place(config)
        if not (run.folder / "metrics.json").exists():
            return None
        if problem := _mismatch(run):
            warnings.warn(f"{run.folder} does not stand for this configuration: {problem}", stacklevel=2)
            return None
        return run if self.stale == "keep" or run.current else None

    def run(self, config: RunConfig, deadline: float = math.inf, device: str = "cpu",
            show: Callable[[str], None] = show_on_terminal,
            backend: Backend | None = None, wait: bool = True) -> Run:
        """The run, trained first if it is absent, by default with the fastest backend; the provenance says with which.

        Where another process trains it, waits for that one, or raises `leases.Held` if it is not to wait. Raises
        `training.OutOfTime` if training or waiting takes longer than the deadline (of time.monotonic).
        """
        while not (found := self.find(config)):
            try:
                with lease(self._lease(config)) as check:
                    # the one that held the lease until now may have finished
                    return self.find(config) or self._train(config, deadline, device, show, backend, check)
            except Held as other:
                if not wait:
                    raise
                if time.monotonic() > deadline:
                    raise OutOfTime(f"{config.name}: {other} still trains it") from None
                show(f"{config.experiment}/{config.name}: waits for {other}, which trains it")
                time.sleep(POLL)
        return found

    def holder(self, config: RunConfig) -> str | None:
        """The process that trains the run now, in words, or None."""
        return holder(self._lease(config))

    def unfinished(self, config: RunConfig) -> list[Path]:
        """Folders with a checkpoint of the run, of whatever source and origin; only today's is gone on from."""
        found = self.checkpoints.glob(f"*/{config.experiment}/{self._place(config).name}")
        return sorted(folder for folder in found if folder.parents[1].name != "states")

    def scratch(self, config: RunConfig) -> Path:
        """Where the run's checkpoint is while today's source trains it, from the state that its origin has kept now."""
        origin = config.branch and self._state(config.branch)
        began = f"-{digest_of(origin)[:12]}" if origin and origin.exists() else ""
        return self.checkpoints / f"{source_digest(config)}{began}" / config.experiment / self._place(config).name

    def kept_state(self, branch: Branch) -> Path:
        """The state that a run goes on from. Raises FileNotFoundError, with the runs that have one, where it is not here."""
        path = self._state(branch)
        if path.exists():
            return path
        like = sorted((self.checkpoints / "states").glob(f"{branch.run.rpartition('-')[0]}-*/step-*.safetensors"))
        kept = ", ".join(f"{found.parents[1].name}/{found.parent.name} after {int(found.stem[5:])}" for found in like)
        recorded = self.results / "runs" / branch.run
        remedy = f"remove {recorded} and train it again" if recorded.exists() else "train the run here"
        raise FileNotFoundError(f"the state of {branch.run} after {branch.step} updates is not at {path}; there are: "
                                f"{kept or 'none like it'}. It stays where a run is trained, at its last step and those of its "
                                f"`keep`: {remedy}")

    def runs(self, experiment: str) -> list[Run]:
        """Every run that the profile names for an experiment, trained where absent, in the profile's order."""
        return [self.run(config) for config in configurations(self.profile, experiment, self.root)]

    def recorded(self, experiment: str) -> list[Run]:
        """The profile's runs that are recorded; those missing are left out (the paper profile is filled piece by piece)."""
        found = (self.find(config) for config in configurations(self.profile, experiment, self.root))
        return [run for run in found if run]

    def prune(self, experiment: str) -> list[str]:
        """Removes runs that the profile no longer names and what killed writers left; returns the runs' names. What is not a
        run's folder stays, and so does all of a profile outside the repository: another of its name may have the runs."""
        if not in_repository(self.profile, self.root):
            return []
        wanted = {self._place(config).name for config in configurations(self.profile, experiment, self.root)}
        gone = set()
        parts = [self.results / part for part in ("runs", "weights", "machine/runs")]
        for folder in (part / experiment for part in (*parts, self.checkpoints / "states")):
            for path in folder.iterdir() if folder.exists() else ():
                if path.name not in wanted and path.is_dir() and not path.is_symlink() and RUN.fullmatch(path.name):
                    remove(path)
                    gone.add(path.name)
            for path in leftovers(folder):
                remove(path)
        return sorted(gone)

    def _train(self, config: RunConfig, deadline: float, device: str, show: Callable[[str], None], backend: Backend | None,
               check: Callable[[], None]) -> Run:
        def shown(line: str) -> None:
            check()
            show(line)

        began, backend = time.monotonic(), backend or fastest_backend(config, device)
        origin = self.kept_state(config.branch) if config.branch else None
        noted: dict[str, Any] = {"origin": digest_of(origin)} if origin else {}
        broadcast(lambda: (config, backend, deadline - time.monotonic()))  # to the ranks that train it as well, if any do
        trainer = Trainer(config, self.scratch(config), self.root / "data", device, backend, origin)
        noted |= {"ranks": trainer.part.ranks} if trainer.part.ranks > 1 else {}
        progress = trainer.advance(deadline, shown)
        metrics = summarise(trainer, progress)
        if config.adaptive:
            metrics["adaptive"] = clean_and_noisy(trainer.average, trainer.task, config.solver.step)
        check()
        run = self._record(trainer, progress, metrics, noted, {"device": device, "wall": round(time.monotonic() - began, 1)})
        for folder in self.unfinished(config):
            remove(folder)
        return run

    def _record(self, trainer: Trainer, progress: Progress, metrics: dict, noted: dict, session: dict) -> Run:
        config = trainer.config
        run = self._place(config)
        for step in (*config.keep, config.steps):
            write_atomically(run.weights_folder / trainer.weights(step).name, trainer.weights(step).read_bytes())
            kept = state_path(self.checkpoints, f"{config.experiment}/{run.name}", step)
            write_atomically(kept, trainer.kept_state(step).read_bytes())
        curve, timing = evaluations(progress)
        write_atomically(run.machine_folder / "timing.csv", to_csv(timing))
        write_atomically(run.machine_folder / "machine.json", to_json(machine() | session | {
            "seconds": sum(progress.seconds), "sessions": progress.sessions}))
        # a third of the size; without a time, so that equal logs are equal files
        write_atomically(run.weights_folder / "log.csv.gz", gzip.compress(to_csv(progress.rows), mtime=0))
        publish(run.folder, {
            "config.json": to_json(plain(config)),
            "log.csv.gz": gzip.compress(to_csv(windows(progress.rows)), mtime=0),
            "curve.csv": to_csv(curve),
            "provenance.json": to_json({"source": source_digest(config), "backend": trainer.backend} | noted | versions()),
            "metrics.json": to_json(metrics)} | (self._sample(run) if trainer.task.vocabulary else {}),
            stands=lambda: self.find(config) is not None)
        return self._place(config)  # anew: nothing read before is kept

    def _sample(self, run: Run) -> dict[str, str]:
        try:
            return {"sample.txt": run.generate(PROMPT, self.sample)} if self.sample else {}
        except Exception as error:  # whatever it is, it is the sample's: the run stands
            warnings.warn(f"{run.config.experiment}/{run.config.name} is recorded without a sample of text: "
                          f"{type(error).__name__}: {error}", stacklevel=5)
            return {}

    def _state(self, branch: Branch) -> Path:
        return state_path(self.checkpoints, branch.run, branch.step)

    def _lease(self, config: RunConfig) -> Path:
        return self.checkpoints / "leases" / config.experiment / f"{self._place(config).name}.lock"

    def _place(self, config: RunConfig) -> Run:
        return Run(config, self.results / "runs" / config.experiment / run_folder(config), self.run)


def _mismatch(run: Run) -> str | None:
    """How the recorded configuration differs from the run's, in words. An option that was not there yet had its default."""
    try:
        recorded = plain(parse(RunConfig, run.recorded_config, f"{run.folder / 'config.json'}"))
    except ConfigurationError as error:
        return str(error)
    asked = plain(run.config)
    return "; ".join(f"{key} was {recorded.get(key)!r}, asked for is {asked[key]!r}" for key in asked
                     if recorded.get(key) != asked[key]) or None
