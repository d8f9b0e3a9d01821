"""Check a profile's numbers: run its cheap stages again in a scratch folder, compare every value with the reference under its
tolerance class, and write a receipt.

    python -m pipelines.verify --profile quick          the cheapest stages that take five minutes together, training included
    python -m pipelines.verify --profile quick --all    every stage, from the raw data on
    python -m pipelines.verify --profile quick --stage mnist    this one

What is not run again is compared as its last run left it here, in results/. The paper profile's runs are not trained again: its
notebooks read the recorded ones. The receipt is paper/build/P/receipt.html and receipt.json. Exit code 0: no value
differs by more than its tolerance or is missing, and every claim has its verdict (a number that a training ends at, without an
interval and more than ten percent away, decides nothing); 1: some do; 2: nothing could be compared.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from eplib.profiles import configurations
from eplib.settings import name_of
from eplib.store.records import Store
from eplib.tasks import Mnist, Text
from eplib.training import RunConfig
from pipelines import estimate, receipt
from pipelines.common import ROOT, PipelineError, command, processors
from pipelines.expected import Reference, gather, load
from pipelines.plan import Plan
from pipelines.smoke import copy_tree, environment
from pipelines.train import place

CHEAP = 300.0  # recorded seconds of the stages that are run again by default
OTHER = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}  # PyTorch and MKL without vector instructions


def runs_of(plan: Plan, names: Iterable[str]) -> list[RunConfig]:
    """The runs that are trained for some notebooks of a profile; none where the recorded ones are in git."""
    groups = [] if plan.in_git else sorted({group for name in names for group in plan.read[name]})
    return [config for group in groups for config in configurations(plan.profile, group, plan.root)]


def weighted(plan: Plan) -> list[RunConfig]:
    """The recorded runs whose weights are here: of runs that are not trained again a notebook reads the data of these alone."""
    store = Store(plan.profile, plan.root)
    found = {config: store.find(config) for group in plan.groups for config in configurations(plan.profile, group, plan.root)}
    return [config for config, run in found.items() if run and run.has_weights()]


def cost(known: Reference, plan: Plan) -> dict[str, float | None]:
    """Notebook -> recorded seconds of it and of training what it reads; None where they are not all known."""
    found: dict[str, float | None] = {}
    for name in plan.notebooks:
        configs = runs_of(plan, [name])
        times = [known.runs.get(place(one)) for one in configs]
        own, workers = known.seconds.get(name), min(known.machine.get("cores") or processors(), max(1, len(configs)))
        found[name] = None if own is None or None in times else own + sum(one[0] for one in times if one) / workers
    return found


def cheap(known: Reference, plan: Plan) -> dict[str, float]:
    """The notebooks of a profile that are run again by default, the cheapest and as many as fit, with their seconds; raises
    PipelineError if no recorded time says which."""
    times = {name: seconds for name, seconds in cost(known, plan).items() if seconds is not None}
    if not times:
        raise PipelineError(f"profile {known.profile}: no time of a stage is recorded, none is known to be cheap; give --all")
    found = dict[str, float]()
    for name in sorted(times, key=times.__getitem__):
        if not found or sum(found.values()) + times[name] <= CHEAP:
            found[name] = times[name]
    return found


@contextmanager
def scratch_tree(root: Path) -> Iterator[Path]:
    """A copy of the working tree with the data that are here, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="eplib-verify-"))
    try:
        copy_tree(root, folder)
        if (root / "data" / "prepared").is_dir():  # whose digests are checked at every read
            shutil.copytree(root / "data" / "prepared", folder / "data" / "prepared", dirs_exist_ok=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def data_of(configs: Iterable[RunConfig]) -> list[str]:
    """The data sets that runs are trained on, as `pipelines.data` names them."""
    texts = {f"{one.data.corpus}-{one.data.tokens}" for one in configs if isinstance(one.data, Text) and one.data.corpus}
    return sorted(texts | {"mnist" for one in configs if isinstance(one.data, Mnist)})


def rerun(profile: str, names: Sequence[str], scratch: Path, settings: dict[str, str] | None = None) -> dict[str, str]:
    """Run notebooks, and train the runs that they read, in a scratch tree without results of theirs, with further `settings` of
    the environment; what failed, in words."""
    plan, failed = Plan(profile, scratch), dict[str, str]()
    configs = runs_of(plan, names)

    def call(module: str, *arguments: str) -> bool:
        line = [sys.executable, "-m", f"pipelines.{module}", *arguments]
        print(f"== {' '.join(line[1:])}", flush=True)
        return subprocess.run(line, cwd=scratch, env=environment() | (settings or {}), check=False).returncode == 0

    for name in names:
        shutil.rmtree(scratch / "results" / plan.name / name, ignore_errors=True)
    if not call("stages", "--write", "--profile", profile) or not call("sources", "--profile", profile):
        raise PipelineError("the sources of the stages could not be written: see above")
    data = data_of(weighted(plan) if plan.in_git else configs)
    if data and not call("data", *data):
        raise PipelineError("the data could not be prepared: see above")
    for group in dict.fromkeys(one.experiment for one in configs):
        if not call("train", "--profile", profile, "--experiment", group):
            failed[f"train {group}"] = "training ended with an error"
    for name in names:
        if not call("notebook", "run", name, "--profile", profile):
            failed[name] = "the notebook ended with an error"
    return failed


def verify(profile: str, names: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Do what the module says, with the stages of these notebooks, the cheap ones by default; returns the exit code."""
    known, plan, began = load(profile, root), Plan(profile, root), time.monotonic()
    names = list(cheap(known, plan)) if names is None else list(names)
    if unknown := [name for name in names if name not in plan.notebooks]:
        raise PipelineError(f"profile {profile} has no stage {', '.join(unknown)}; it has {', '.join(plan.notebooks)}")
    print(f"== verify, profile {plan.name}: {', '.join(names)} once more, in a scratch folder")
    print(estimate.table(runs_of(plan, names), processors(), profile, root, {name: known.seconds.get(name) for name in names}))
    with scratch_tree(root) as scratch:
        failed = rerun(profile, names, scratch)
        ours = gather(profile, scratch)
    found = receipt.made(known, ours, gather(profile, root), names, failed, root) | {
        "seconds": round(time.monotonic() - began)}
    target = root / "paper" / "build" / name_of(profile) / "receipt.html"
    receipt.write(found, target)
    print("\n".join(receipt.lines(found)))
    print(f"receipt  {target.relative_to(root)}, receipt.json beside it")
    return 2 if not found["counts"] else 0 if found["agrees"] else 1


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.verify", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profile", required=True)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="run every stage again, not the cheap ones alone")
    which.add_argument("--stage", nargs="+", metavar="NOTEBOOK", help="run these again")
    options = parser.parse_args(arguments)
    try:
        return verify(options.profile, list(Plan(options.profile, ROOT).notebooks) if options.all else options.stage)
    except PipelineError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    command(main)
