"""Runs as jobs: on this machine, and under a Slurm of two nodes that is started for the tests."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from submitit import SlurmJob
from submitit.core.utils import DelayedSubmission

import eplib.data
from eplib.store.leases import Lost, lease
from eplib.store.records import Store, configurations
from pipelines import jobs, train
from pipelines.jobs import Job
from pipelines.sweep import Sweep, main
from test_training import REPOSITORY, corpus, make_root, outcome  # noqa: F401  (corpus is a fixture)

SLURM = Path(__file__).with_name("slurm.sh")
PROFILE = """
plugins: [patched]
runs:
  tiny:
    - common: {{data: {{kind: Text, corpus: tinystories, validation: 0.02}}, estimator: {{kind: DyadicEP, steps: 4}},
               model: {{width: 8, heads: 2, context: 8, block: {{kind: Thick}}}}, steps: 30, batch: 4,
               solver: {{kind: Relaxation, step: 0.8, max_steps: 4}}, evaluation_batches: 1}}
      arms: {{{arms}}}
"""
# In every process: the corpus of the tests, a checkpoint a step, and runs that are killed or told that their time is over. The
# signal comes while the checkpoint of step 9 is not yet written.
PATCHED = """
import os, signal
from pathlib import Path
import eplib.data, eplib.training
eplib.data.CORPORA["tinystories"] = eplib.data.{file!r}
eplib.training.CHECKPOINT_SECONDS = 0.0
step = eplib.training.Trainer._step
def disturbed(trainer):
    step(trainer)
    arm, marker = trainer.config.arm, Path({folder!r}, trainer.config.arm)
    if trainer.progress.step == 9 and arm in ("killed", "late", "always") and (arm == "always" or not marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGUSR2 if arm == "late" else signal.SIGKILL)
eplib.training.Trainer._step = disturbed
"""
COMMAND = """
import sys
from pipelines import sweep
sweep.TURN["slurm"] = 0.5
sys.exit(sweep.main(sys.argv[1:]))
"""


@pytest.fixture
def tree(corpus, tmp_path):  # noqa: F811
    """A function that makes a repository whose profile x has these arms, and what these runs give undisturbed."""
    def make(arms: str) -> tuple[Path, dict[str, bytes]]:
        profile = PROFILE.format(arms=arms)
        whole, folder = (make_root(tmp_path / name, corpus, profile) for name in ("whole", "tree"))
        (tmp_path / "marks").mkdir()
        (folder / "pipelines" / "profiles" / "patched.py").write_text(
            PATCHED.format(file=eplib.data.CORPORA["tinystories"], folder=str(tmp_path / "marks")))
        (folder / "command.py").write_text(COMMAND)
        (whole / "pipelines" / "profiles" / "patched.py").touch()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as jobs do
        try:
            [Store("x", whole).run(config) for config in configurations("x", "tiny", whole) if config.arm != "always"]
        finally:
            torch.set_num_threads(threads)
        return folder, outcome(whole)

    return make


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "command.py", "--profile", "x", *arguments], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment)


def ended(*calls: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit codes and what was said, to the end."""
    try:
        said = [one.communicate(timeout=400) for one in calls]
    finally:
        for one in calls:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
    return [(one.returncode, *both) for one, both in zip(calls, said, strict=True)]


def sessions(folder: Path) -> dict[str, int]:
    return {path.parent.name.split("-")[0]: json.loads(path.read_text())["sessions"]
            for path in (folder / "results").rglob("machine.json")}


def logs(folder: Path) -> dict[str, str]:
    return {path.name.split("-")[0]: path.read_text() for path in (folder / "checkpoints" / "x" / "logs" / "tiny").iterdir()}


@pytest.mark.slow
def test_two_sweeps_at_once_a_killed_job_and_a_time_out_end_as_if_nothing_had_happened(tree):
    folder, whole = tree("fine: , killed: , late: ")
    found = ended(*(start(folder, "--executor", "local", "--parallel", "1") for _ in range(2)))
    assert [code for code, *_ in found] == [0, 0], found
    assert outcome(folder) == whole and sessions(folder) == {"fine": 1, "killed": 2, "late": 2}, found
    said = logs(folder)
    assert said.keys() == {"fine", "killed", "late"} and all(" recorded\n" in text for text in said.values())
    assert "stopped; goes on from its checkpoint" in said["late"] and "stopped" not in said["killed"]
    assert sum(out.count("was killed; it goes on once more") for _, out, _ in found) == 1


@pytest.fixture(scope="module")
def slurm():
    """The SLURM_CONF of a Slurm of two nodes of this machine."""
    if not shutil.which("slurmctld"):
        assert os.environ.get("CI") != "true", "there is no Slurm here; .ci/run installs it"
        pytest.skip("Slurm is not installed (Debian: slurmctld slurmd slurm-client munge)")
    folder = tempfile.mkdtemp(prefix="slurm", dir="/tmp")  # short: a socket lies in it
    subprocess.run([SLURM, "start", folder], check=True)
    yield f"{folder}/slurm.conf"
    subprocess.run([SLURM, "stop", folder], check=True)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_an_array_of_ten_under_slurm_with_a_killed_job_and_a_time_out_ends_as_if_nothing_had_happened(tree, slurm):
    folder, whole = tree("a: , b: , c: , d: , e: , f: , g: , killed: , late: , always: ")
    [(code, out, err)] = ended(start(folder, "--executor", "slurm", "--parallel", "4", "--backend", "torch", SLURM_CONF=slurm))
    assert code == 1 and outcome(folder) == whole, (out, err)
    assert sessions(folder) == dict.fromkeys("abcdefg", 1) | {"killed": 2, "late": 2}
    assert err.startswith("failed: tiny/always-") and err.count("\n") == 1
    assert "its job was killed twice at the same place" in err
    assert "10 runs left: 0 at work, 10 in the queue" in out and "9 of 10 runs are recorded" in out
    assert "stopped; goes on from its checkpoint" in logs(folder)["late"]


# --- what a job and a sweep decide, in this process

BRANCHED = PROFILE.replace("plugins: [patched]", "").replace("steps: 30", "steps: 3").format(
    arms="origin: , other: ") + """
    - common: {data: {kind: Text, corpus: tinystories, validation: 0.02}, estimator: {kind: DyadicEP, steps: 4}, steps: 4,
               model: {width: 8, heads: 2, context: 8, block: {kind: Thick}}, batch: 4, evaluation_batches: 1,
               solver: {kind: Relaxation, step: 0.8, max_steps: 4}, branch: {run: origin, step: 3}}
      arms: {branched: }
"""


@pytest.fixture
def store(corpus, tmp_path) -> Store:  # noqa: F811
    return Store("x", make_root(tmp_path / "root", corpus, BRANCHED))


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process the task of a rank of job 7."""
    def become(rank: int) -> None:
        monkeypatch.setattr(jobs, "JobEnvironment", lambda: SimpleNamespace(global_rank=rank, job_id="7"))

    become(0)
    return become


def submitted(store: Store, tmp_path: Path, room: int = 10) -> tuple[Sweep, list[str]]:
    """A sweep, and the list that what it submits is added to."""
    executor = SimpleNamespace(folder=tmp_path / "jobs", cluster="local", batch=nullcontext)
    found: list[str] = []

    def submit(job: Job) -> SlurmJob:
        found.extend(part.place.split("/")[1].split("-")[0] for part in job.parts)
        made = SlurmJob(tmp_path / "jobs", str(len(found)))
        made.paths.folder.mkdir(exist_ok=True)
        DelayedSubmission(job).dump(made.paths.submitted_pickle)
        return made

    executor.submit = submit
    runs = configurations("x", "tiny", store.root)
    return Sweep(store, executor, Job("x", store.root, "cpu", None), 1, room, runs), found


def test_a_job_whose_source_or_profile_has_changed_trains_nothing_and_says_what_to_do(store, as_rank):
    config = configurations("x", "tiny", store.root)[0]
    changed = jobs.Part(train.place(config), "0" * 12)
    gone = replace(jobs.Part.of(config), place=train.place(config).replace("seed0", "seed1"))
    for part, said in ((changed, "was submitted with the source 000000000000, and here it is .*; call the sweep again"),
                       (gone, "profile x no longer names tiny/origin-lr0.003-seed1")):
        with pytest.raises(jobs.SourceChanged, match=said):
            Job("x", store.root, "cpu", None, (part,))()
    assert "job 7 on" in jobs.log_of(store, changed.place).read_text() and outcome(store.root) == {}


def test_the_first_task_of_a_job_stays_until_the_others_have_ended_and_one_without_a_run_ends(store, as_rank, monkeypatch):
    first, second = configurations("x", "tiny", store.root)[:2]
    job = Job("x", store.root, "cpu", None, (jobs.Part.of(first), jobs.Part.of(second)))
    monkeypatch.setattr(jobs, "STARTING", 0.0)
    with lease(store._lease(second)):
        task = threading.Thread(target=job)
        task.start()
        until = time.monotonic() + 60
        while not store.find(first):
            assert time.monotonic() < until
            time.sleep(0.05)
        task.join(1.5)
        assert task.is_alive()
        as_rank(1)
        job()  # held: left to who trains it
        said = jobs.log_of(store, train.place(second)).read_text()
        assert store.find(second) is None and "left to who trains it: process" in said
    task.join(60)
    assert not task.is_alive()
    job()
    assert store.find(second)
    as_rank(2)
    job()


def test_a_run_that_branches_waits_for_its_origin_and_fails_with_it(store, tmp_path, capsys):
    sweep, asked = submitted(store, tmp_path)
    origin, other, branched = sweep.left
    assert sweep.turn() and asked == ["origin", "other"]
    for config in (origin, other):
        store.run(config)
    assert sweep.turn() and asked == ["origin", "other", "branched"]
    store.run(branched)
    assert not sweep.turn() and sweep.failed == set()

    shutil.rmtree(store.results)
    sweep, asked = submitted(store, tmp_path)
    sweep.turn()
    sweep.settle(sweep.active["1"], cancelled=True)
    assert sweep.turn() and sweep.failed == {train.place(origin), train.place(branched)} and asked == ["origin", "other"]
    assert "was cancelled" in capsys.readouterr().err


def test_what_waits_or_is_at_work_is_not_submitted_again_and_there_is_room_for_so_many_jobs(store, tmp_path, monkeypatch):
    sweep, asked = submitted(store, tmp_path, room=1)
    sweep.turn()
    assert asked == ["origin"] and sweep.turn() and asked == ["origin"]
    monkeypatch.setattr(sweep, "states", lambda: {"1": "PENDING", "999": "RUNNING"})  # of a sweep before, and of something else
    again, more = submitted(store, tmp_path)
    monkeypatch.setattr(again, "states", sweep.states)
    with lease(store._lease(again.left[1])):
        again.turn()
    assert more == []


def test_what_cannot_be_swept_is_refused_in_words(store, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.sweep.chosen", lambda *_: configurations("x", "tiny", store.root))
    monkeypatch.setattr("pipelines.sweep.Store", lambda _: store)
    monkeypatch.setattr("shutil.which", lambda _: None)
    for arguments, said in ((["--executor", "slurm"], "there is no sbatch here"), (["--share", "0"], "--share 0"),
                            (["--parallel", "0"], "at least one")):
        assert main(["--profile", "x", *arguments]) == 2 and said in capsys.readouterr().err


def test_a_dry_sweep_says_how_long_it_takes_by_recorded_runs_and_submits_nothing(store, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.sweep.chosen", lambda *_: configurations("x", "tiny", store.root))
    monkeypatch.setattr("pipelines.sweep.Store", lambda _: store)
    run = store.run(configurations("x", "tiny", store.root)[1])  # other, of 3 steps
    path = run.machine_folder / "machine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"wall": 60.0}))
    assert main(["--profile", "x", "--dry", "--parallel", "1"]) == 0
    said = capsys.readouterr().out
    # 3 steps of the origin and 1 of what goes on from it, at 20 seconds a step: 80 seconds
    assert "x: 3 runs, 1 recorded, 2 to train" in said and re.search(r"train tiny: 2 runs +1\.3\n", said)
    assert not (store.checkpoints / "jobs").exists()


def test_a_job_that_has_lost_its_run_leaves_it_and_does_not_fail(store, as_rank, monkeypatch):
    config = configurations("x", "tiny", store.root)[0]
    monkeypatch.setattr(jobs, "work", lambda *_, **__: (_ for _ in ()).throw(Lost("not renewed")))
    Job("x", store.root, "cpu", None, (jobs.Part.of(config),))()
    assert "left to who trains it: not renewed" in jobs.log_of(store, train.place(config)).read_text()
