"""How long what is to be done will take: recorded times, times what a ten-second calibration says of this machine.

    python -m pipelines.estimate --profile P             a table: runs to train and notebooks to run, recorded and here
    python -m pipelines.estimate --profile P --measure   times the first steps of what is not recorded; the paper has the table
    python -m pipelines.estimate --profile P --left      that table without what has been recorded since, timing nothing

A run's time is that of the recorded run itself, else that of its arm, else of its experiment, by the step. The calibration
times one gradient on all processors at once, as training uses them, and is compared with the one kept in results/reference/:
so a factor is known for runs of that machine; other times are shown as recorded. Needs what `pipelines.train` needs.
First steps are those of initial weights: the phases of trained ones take longer, so what `--measure` says is the least.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import eplib
from eplib import blocks, estimators, models, solvers
from eplib.config import ConfigurationError
from eplib.data import DataError
from eplib.kernels import available
from eplib.profiles import configurations
from eplib.provenance import machine
from eplib.settings import name_of
from eplib.store.records import Store, save_machine
from eplib.training import OutOfTime, RunConfig, Trainer, fastest_backend
from pipelines.common import ROOT, PipelineError, command, dumps, load_profile, processors, read_json
from pipelines.plan import Plan
from pipelines.stages import decided_by
from pipelines.train import place

UNIT_SECONDS = 3.0  # of gradients with each backend
EVALUATIONS = 1.3  # a run's whole time over that of its steps, where the whole was not recorded (quick: 1,038 over 811 s)
FIRST_SECONDS = 4.0  # of a run's first steps
LONG = 60.0  # estimated seconds from which on a calibration is worth its time


class Recorded(NamedTuple):
    """The time that a run took on one processor, and which."""

    seconds: float
    processor: str


# --- this machine ---


def facts() -> dict[str, Any]:
    """Processor, versions, cores, vector instructions and whether the compiled kernel is built."""
    return machine() | {"cores": processors(), "instructions": torch.backends.cpu.get_cpu_capability(), "kernel": available()}


def unit(backend: models.Backend) -> float:
    """Median seconds of one gradient by linear response of a small language model, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=65, width=64, heads=4, context=64, block=blocks.Thick())
    ids = torch.randint(65, (16, 65))
    times, began = [], time.monotonic()
    while time.monotonic() - began < UNIT_SECONDS:
        started = time.perf_counter()
        eplib.gradient(model, ids[:, :-1], ids[:, 1:], estimator=estimators.DyadicEP(), backend=backend,
                       solver=solvers.Substitution(tol=1e-4), nudged=solvers.Substitution(tol=5e-3))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def calibrate() -> dict[str, float]:
    """Backend -> seconds of one gradient while every processor computes one: the slowest of them. Takes about ten seconds."""
    line = [sys.executable, "-m", "pipelines.estimate", "--unit"]
    busy = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(processors())]
    found = [process.communicate()[0].split() for process in busy]
    return {backend: max(float(times[place]) for times in found) for place, backend in enumerate(backends())}


def backends() -> list[models.Backend]:
    """The backends that compute here."""
    return ["torch", "compiled"] if available() else ["torch"]


def factor(ours: dict[str, float], theirs: dict[str, float]) -> float | None:
    """How much longer what trained there with its fastest backend takes here with ours; None where theirs was not taken."""
    fastest = theirs.get("compiled", theirs.get("torch"))
    return ours.get("compiled", ours["torch"]) / fastest if fastest else None


# --- recorded times ---


def recorded(profile: str, root: Path = ROOT) -> dict[str, list]:
    """experiment/folder -> [seconds on one processor, its name] of every run that a profile has recorded."""
    folder = root / "results" / name_of(profile) / "machine" / "runs"
    found = {}
    for path in sorted(folder.glob("*/*/machine.json")):
        run = read_json(path)
        whole = run.get("wall") if run.get("sessions") == 1 else None
        where = run.get("gpu") if run.get("device", "cpu") != "cpu" else run.get("processor")
        if seconds := whole or EVALUATIONS * (run.get("seconds") or 0.0):
            found[f"{path.parts[-3]}/{path.parts[-2]}"] = [round(seconds, 1), str(where)]
    return found


def path_of(profile: str, root: Path = ROOT) -> Path:
    """Where the reference values of a profile lie."""
    return root / "results" / "reference" / f"{name_of(profile)}.json"


def kept(profile: str, root: Path = ROOT) -> dict[str, Any]:
    """The reference of a profile as its file has it, {} where there is none."""
    path = path_of(profile, root)
    return read_json(path) if path.is_file() else {}


def seconds_of(configs: Iterable[RunConfig], profile: str, root: Path = ROOT) -> list[Recorded | None]:
    """What each run took where it, or else one of its arm or its experiment, was recorded; None where none was."""
    known = kept(profile, root).get("runs", {}) | recorded(profile, root)
    steps = {place(one): one for group in load_profile(profile, root).get("runs") or {}
             for one in configurations(profile, group, root)}
    found: list[Recorded | None] = []
    for config in configs:
        if own := known.get(place(config)):
            found.append(Recorded(*own))
            continue
        alike = [(one, known[name]) for name, one in steps.items() if name in known and one.experiment == config.experiment]
        alike = [pair for pair in alike if pair[0].arm == config.arm] or alike
        rates = [seconds / (one.steps - one.first) for one, (seconds, _) in alike]
        found.append(Recorded(statistics.mean(rates) * (config.steps - config.first), alike[0][1][1]) if rates else None)
    return found


# --- the table ---


def table(configs: Sequence[RunConfig], workers: int, profile: str, root: Path = ROOT,
          notebooks: Mapping[str, float | None] = MappingProxyType({})) -> str:
    """Estimated times of runs, by experiment, and of notebooks (name -> recorded seconds or None), as text."""
    times = seconds_of(configs, profile, root)
    reference = kept(profile, root) or kept("quick", root)
    there = reference.get("machine", {}).get("processor")
    long = sum(one.seconds for one in times if one) + sum(filter(None, notebooks.values())) > LONG
    scale = factor(calibrate(), reference.get("calibration", {})) if long and there else None
    rows = []
    for name in dict.fromkeys(config.experiment for config in configs):
        own = [one for config, one in zip(configs, times, strict=True) if config.experiment == name]
        told = [one for one in own if one]
        unknown = f", {len(own) - len(told)} of unknown time" if len(told) < len(own) else ""
        here = sum(one.seconds * (scale or 1.0 if one.processor == there else 1.0) for one in told)
        rows.append((f"train {name}: {len(own)} runs{unknown}", sum(one.seconds for one in told) / workers, here / workers))
    rows += [(f"notebook {name}{'' if seconds else ', of unknown time'}", seconds or 0.0, (seconds or 0.0) * (scale or 1.0))
             for name, seconds in notebooks.items()]
    if not rows:
        return "estimate: nothing to train and no notebook to run"
    rows.append(("in all, as far as known", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    said = f"this machine takes {scale:.2f} of the time of {there}" if scale else "as recorded: this machine was not calibrated"
    lines = [f"  {what:48}{minutes(before)}{minutes(here) if scale else ''}" for what, before, here in rows]
    head = f"estimated minutes, {workers} at a time ({said}):\n  {'':48}recorded{'    here' if scale else ''}"
    return "\n".join([head, *lines])


def minutes(seconds: float) -> str:
    """A cell of the table; empty where nothing is known."""
    return f"{seconds / 60:8.1f}" if seconds else f"{'':8}"


def unrecorded(profile: str, root: Path = ROOT) -> list[RunConfig]:
    """The runs of a profile that its store does not have."""
    store = Store(profile, root)
    return [config for group in Plan(profile, root).groups for config in configurations(profile, group, root)
            if store.find(config) is None]


def to_do(profile: str, root: Path = ROOT) -> tuple[list[RunConfig], dict[str, float | None]]:
    """What of a profile is to be done: the runs that are not recorded, and the notebooks that have not run as they stand now,
    with their recorded seconds."""
    plan = Plan(profile, root)
    absent = [] if plan.in_git else unrecorded(profile, root)
    trained, decides = {config.experiment for config in absent}, plan.decides()
    seconds = kept(profile, root).get("seconds", {})
    names = {}
    for name in plan.notebooks:
        path = decided_by(f"notebook-{name}", profile, root)
        same = path.is_file() and path.read_text(encoding="utf-8") == dumps(decides[f"notebook-{name}"])
        ran = (root / "results" / plan.name / name / "index.json").is_file()
        if not (same and ran) or trained & {*plan.read[name]}:
            own = root / "results" / plan.name / "machine" / "stages" / f"{name}.json"
            names[name] = read_json(own)["seconds"] if own.is_file() else seconds.get(name)
    return absent, names


# --- what was never recorded ---


def first_steps(config: RunConfig, root: Path = ROOT) -> float | None:
    """Median seconds of a run's first steps on one thread, from its initial weights; None where its data is not here."""
    torch.set_num_threads(1)
    begun = replace(config, branch=None, keep=(), audit_every=None, evaluate_every=config.steps)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = Trainer(begun, Path(folder), root / "data", backend=fastest_backend(begun))
        except DataError:
            return None
        with suppress(OutOfTime):
            trainer.advance(time.monotonic() + FIRST_SECONDS, show=lambda line: None)
        return statistics.median(trainer.progress.seconds[1:] or trainer.progress.seconds)  # the first one warms up


def measured(configs: Sequence[RunConfig], root: Path = ROOT) -> dict[str, Any]:
    """A table: for each experiment how many of these runs there are, and what their first steps say of the time they take."""
    def kind(config: RunConfig) -> tuple:
        """What runs have in common that take the same time a step."""
        return config.experiment, config.arm, str(config.model), str(config.data)

    step: dict[tuple, float | None] = {}
    rows = []
    for name in dict.fromkeys(config.experiment for config in configs):
        own = [config for config in configs if config.experiment == name]
        for config in own:
            if (key := kind(config)) not in step:
                step[key] = first_steps(config, root)
                print(f"  {name}/{config.name}: {'its data is not here' if step[key] is None else f'{step[key]:.3g} s a step'}")
        times = [(step[kind(config)], config) for config in own]
        hours = sum(each * (config.steps - config.first) for each, config in times if each) / 3600 * EVALUATIONS
        known = {config.arm: each for each, config in times if each}
        slowest = max(known.items(), key=lambda one: one[1], default=(None, math.nan))
        rows.append([name, len(own), sum(each is None for each, _ in times), sum(config.steps - config.first for config in own),
                     *((round(hours, 1), slowest[0], round(slowest[1], 2)) if known else (None, None, None))])
    return {"title": "What is not recorded, and the least that it takes", "rows": rows,
            "columns": ["experiment", "runs", "without data here", "steps", "hours of one core", "slowest arm", "its step (s)"],
            "note": f"Median of the first steps within {FIRST_SECONDS:g} s, initial weights, one thread, times {EVALUATIONS:g} "
                    "for evaluations: the phases of trained weights take longer. Without data here: not in the hours."}


def hours_of(profile: str) -> Path:
    """Where `--measure` writes its table; raises `PipelineError` where it has not."""
    path = ROOT / "results" / name_of(profile) / "machine" / "hours.json"
    if not path.is_file():
        raise PipelineError(f"{path.relative_to(ROOT)} is not there: nothing was timed at profile {profile}; run --measure")
    return path


def left(found: dict[str, Any], configs: Sequence[RunConfig]) -> dict[str, Any]:
    """The table of an earlier `measured` for the runs that are not recorded now, their hours by their share of the steps."""
    rows = []
    for name, _, without, steps, hours, *slowest in found["rows"]:
        if own := [config for config in configs if config.experiment == name]:
            now = sum(config.steps - config.first for config in own)
            share = None if hours is None else round(hours * now / steps, 1)
            rows.append([name, len(own), min(without, len(own)), now, share, *slowest])
    return found | {"rows": rows}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.estimate", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profile")
    parser.add_argument("--measure", action="store_true", help="time the first steps of what is not recorded")
    parser.add_argument("--left", action="store_true", help="bring what --measure wrote up to what is recorded since")
    parser.add_argument("--unit", action="store_true", help=argparse.SUPPRESS)  # what `calibrate` starts
    options = parser.parse_args(arguments)
    if options.unit:
        print(*map(unit, backends()))
        return 0
    if not options.profile:
        parser.error("give --profile")
    try:
        if options.measure or options.left:
            missing = unrecorded(options.profile)
            found = measured(missing) if options.measure else left(read_json(hours_of(options.profile)), missing)
            save_machine(options.profile, "hours", found)
            print(*found["rows"], sep="\n")
            return 0
        absent, names = to_do(options.profile)
    except (ConfigurationError, PipelineError) as error:
        print(f"estimate: {error}", file=sys.stderr)
        return 2
    print(table(absent, min(processors(), max(1, len(absent))), options.profile, notebooks=names))
    return 0


if __name__ == "__main__":
    command(main)
