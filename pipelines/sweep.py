"""Trains the runs of a profile as jobs of submitit, on this machine or under Slurm. Needs submitit: pip install '.[sweep]'.

    python -m pipelines.sweep --profile paper --executor slurm --parallel 32 --minutes 240 --slurm partition=long
    python -m pipelines.sweep --profile paper --executor slurm --device cuda --share 4 --slurm partition=gpu
    python -m pipelines.sweep --profile smoke --executor local
    python -m pipelines.sweep --profile paper --dry

It keeps no list: what is recorded and what is at work the store says, what waits squeue, so it may be called again at any time,
and twice at once. A job whose time is over goes back to the queue and on from the checkpoint; one that was killed is submitted
once more, and again as long as its run gets on. One log a run: checkpoints/<profile>/logs/. Ctrl-C ends local jobs and leaves
those of Slurm in the queue, where the next call finds them.
Exit status: 0 all runs are there, 1 a run failed (the others are finished first), 2 bad arguments.
"""

import shutil
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, JobPaths, pickle_load

from eplib.config import ConfigurationError
from eplib.store.records import Store
from eplib.training import RunConfig
from pipelines import estimate
from pipelines.common import command, processors
from pipelines.jobs import Job, Part, log_of
from pipelines.train import absent, awaits, check, chosen, keep_memory, parser_of_runs, place

TURN = {"local": 0.5, "slurm": 5.0}  # seconds between two looks
MOST = 1000  # jobs that wait at a time: Slurm's default limit of an array
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")  # Slurm's words
NOTICE = 120  # seconds before its end at which a job is told, at most


@dataclass
class Sweep:
    """The state of one call: the runs that are left, the jobs that it submitted and that are not over, and what failed."""

    store: Store
    executor: submitit.AutoExecutor
    job: Job  # without runs
    share: int
    room: int
    left: list[RunConfig]
    active: dict[str, submitit.Job] = field(default_factory=dict)
    stood: dict[str, float] = field(default_factory=dict)  # the time of the checkpoint of a run whose job was killed
    failed: set[str] = field(default_factory=set)
    said: str = ""

    def turn(self) -> bool:
        """Looks once, and submits what can go; whether there is more to come."""
        states = self.states()
        for number in [number for number in self.active if states.get(number) in (None, *OVER)]:
            self.settle(self.active.pop(number), states.get(number) == "CANCELLED")
        for config in self.left:
            if config.branch and config.branch.run in self.failed:
                self.fail(place(config), f"goes on from {config.branch.run}, which failed")
        left = [config for config in self.left if place(config) not in self.failed]
        self.left = [config for config in left if awaits(config, left) or not self.store.find(config)]
        held = {place(config) for config in self.left if self.store.holder(config)}
        queued = {part.place for number, state in states.items() if state not in OVER for part in self.parts(number)}
        queued &= set(map(place, self.left)) - held
        ready = [config for config in self.left if place(config) not in held | queued and not awaits(config, self.left)]
        fresh = self.submit(ready)
        self.say(f"{len(self.left)} runs left: {len(held)} at work, {len(queued) + fresh} in the queue")
        return bool(self.left)

    def states(self) -> dict[str, str]:
        """The state of every job, in Slurm's words. squeue has those that have ended for minutes; accounting is not asked."""
        if self.executor.cluster == "local":
            return {number: "COMPLETED" if job.done() else "RUNNING" for number, job in self.active.items()}
        asked = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T"]
        while (told := subprocess.run(asked, capture_output=True, text=True)).returncode:
            self.say(f"squeue does not answer: {told.stderr.strip()}")
            time.sleep(TURN["slurm"])
        return dict(line.split() for line in told.stdout.splitlines())

    def parts(self, number: str) -> tuple[Part, ...]:
        """The runs of a job of this profile, whoever submitted it; none of another's."""
        submitted = JobPaths(self.executor.folder, job_id=number).submitted_pickle
        return _parts(submitted) if submitted.exists() else ()

    def submit(self, ready: list[RunConfig]) -> int:
        """Submits as many jobs as there is room for, and returns how many runs these have."""
        starts = range(0, len(ready), self.share)[:max(0, self.room - len(self.active))]
        jobs = [replace(self.job, parts=tuple(map(Part.of, ready[start:start + self.share]))) for start in starts]
        if jobs:
            with self.executor.batch():
                submitted = [self.executor.submit(job) for job in jobs]
            self.active |= {job.job_id: job for job in submitted}
        return sum(len(job.parts) for job in jobs)

    def settle(self, job: submitit.Job, cancelled: bool) -> None:
        """Says what became of the runs of a job that is over, and removes what submitit kept of it but for its output."""
        waiting = {place(config): config for config in self.left}
        for rank, part in enumerate(self.parts(job.job_id)):
            config, result = waiting.get(part.place), job.task(rank).paths.result_pickle
            outcome, value = pickle_load(result) if result.exists() else ("killed", "")
            result.unlink(missing_ok=True)
            if config is None or self.store.find(config) or outcome == "success":  # recorded, or left to who has it
                continue
            if outcome == "error":
                self.fail(part.place, value.strip().splitlines()[-1])
            elif cancelled:
                self.fail(part.place, f"its job {job.job_id} was cancelled")
            else:
                self.again(config, job.job_id)
        job.paths.submitted_pickle.unlink(missing_ok=True)

    def again(self, config: RunConfig, number: str) -> None:
        """Leaves a run whose job was killed to be submitted again, unless it stands where it stood when that happened last."""
        where, checkpoint = place(config), self.store.scratch(config) / "checkpoint.safetensors"
        stands = checkpoint.stat().st_mtime if checkpoint.exists() else 0.0
        if self.stood.get(where) == stands:
            self.fail(where, "its job was killed twice at the same place")
        else:
            self.stood[where] = stands
            self.say(f"{where}: its job {number} was killed; it goes on once more from its checkpoint")

    def fail(self, where: str, why: str) -> None:
        self.failed.add(where)
        print(f"failed: {where}: {why} ({log_of(self.store, where)})", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        if line != self.said:
            self.said = line
            print(f"{time.strftime('%T')} {line}", flush=True)


@cache
def _parts(submitted: Path) -> tuple[Part, ...]:
    job = DelayedSubmission.load(submitted).function
    assert isinstance(job, Job), submitted
    return job.parts


def executor_of(options: Namespace, folder: Path) -> submitit.AutoExecutor:
    """What submits. Raises `ConfigurationError` where Slurm was asked for and is not here."""
    if options.executor == "slurm" and not shutil.which("sbatch"):
        raise ConfigurationError("--executor slurm: there is no sbatch here; call this where jobs are submitted")
    more = dict(one.partition("=")[::2] for one in options.slurm)
    executor = submitit.AutoExecutor(folder, cluster=options.executor, slurm_max_num_timeout=10**6, local_max_num_timeout=10**6)
    executor.update_parameters(
        name=f"sweep-{Path(options.profile).stem}", timeout_min=options.minutes, cpus_per_task=1, tasks_per_node=options.share,
        gpus_per_node=int(options.device != "cpu") or None, slurm_array_parallelism=options.parallel,
        slurm_signal_delay_s=min(NOTICE, 30 * options.minutes),
        slurm_additional_parameters={"requeue": True} | {key: value or True for key, value in more.items()})
    return executor


def sweep(options: Namespace, store: Store, left: list[RunConfig]) -> int:
    """Submits the runs and follows them to their end; returns the exit status."""
    keep_memory()
    profile = str(Path(options.profile).resolve()) if options.profile.endswith(".yaml") else options.profile
    job = Job(profile, store.root, options.device, options.backend)
    room = options.parallel if options.executor == "local" else MOST
    work = Sweep(store, executor_of(options, store.checkpoints / "jobs"), job, options.share, room, left)
    try:
        while work.turn():
            time.sleep(TURN[options.executor])
    except KeyboardInterrupt:
        if options.executor == "slurm":
            print("the jobs stay in the queue: call again to follow them; scancel --me ends them", flush=True)
        else:
            for one in work.active.values():
                one.cancel()
        raise
    print(f"{len(left) - len(work.failed)} of {len(left)} runs are recorded", flush=True)
    return 1 if work.failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = parser_of_runs(__doc__)
    parser.add_argument("--executor", choices=tuple(TURN), default="local", help="where: on this machine, or under Slurm")
    parser.add_argument("--parallel", type=int, default=processors(), help="jobs at a time; by default one a processor")
    parser.add_argument("--share", type=int, default=1, help="runs that share a job, and its card; 1 by default")
    parser.add_argument("--minutes", type=int, default=240, help="time of a job, after which it waits anew; 240 by default")
    parser.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE",
                        help="more for sbatch, e.g. partition=gpu or mem=8G; may be given several times")
    parser.add_argument("--dry", action="store_true", help="say what there is to do and how long it takes, and stop")
    options = parser.parse_args(arguments)
    try:
        check("cpu" if options.executor == "slurm" or options.dry else options.device, options.parallel)
        wanted = chosen(options.profile, options.experiment, options.only)
        if min(options.share, options.minutes) < 1:
            raise ConfigurationError(f"--share {options.share}, --minutes {options.minutes}: both are at least 1")
        store = Store(options.profile)
        left = absent(store, wanted)
        print(f"{options.profile}: {len(wanted)} runs, {len(wanted) - len(left)} recorded, {len(left)} to train", flush=True)
        if options.dry and left:
            print(estimate.table(left, min(options.parallel * options.share, len(left)), options.profile, store.root))
        if options.dry or not left:
            return 0
        return sweep(options, store, left)
    except (ConfigurationError, FailedJobError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    command(main)
