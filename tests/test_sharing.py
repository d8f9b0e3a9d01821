"""Several processes on one store: leases, commands that share the runs, workers that are killed, what killed writers leave."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

import eplib.data
from eplib import files, profiles, training
from eplib.store import leases, records
from eplib.store.leases import Held, Lost, lease
from eplib.store.records import Store, configurations
from eplib.training import OutOfTime, Trainer
from pipelines import common, train
from test_records import TWO, command, root, write_profile  # noqa: F401  (fixtures)
from test_training import KILLED, REPOSITORY, SCRIPT, config, corpus, make_root, outcome  # noqa: F401

HOLDER = """
import sys, time
from pathlib import Path
from eplib.store.leases import lease
with lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def dead() -> int:
    """The number of a process that was there."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return gone.pid


# --- leases

def lock_of(path: Path, host: str, pid: int, ends: float) -> None:
    """A lock as a process somewhere made it, which ends so many seconds from now."""
    claim = path.with_name(f"{path.name}|{host}|{pid}|{time.monotonic_ns()}")
    claim.write_text(str(claim))
    os.utime(claim, (time.time() + ends,) * 2)
    linked = path.with_name(f"{claim.name}.link")
    os.link(claim, linked)
    linked.replace(path)


def test_a_lease_has_one_holder_and_is_free_when_it_is_given_back(tmp_path):
    path = tmp_path / "leases" / "run.lock"
    with lease(path) as check:
        check()
        assert leases.holder(path) == f"process {os.getpid()} on {files.HOST}"
        with pytest.raises(Held, match=f"process {os.getpid()} on"), lease(path):
            pass
        check()
    assert list(path.parent.iterdir()) == [] and leases.holder(path) is None
    with pytest.raises(KeyError), lease(path):
        raise KeyError
    with lease(path):
        pass


def test_the_lease_of_a_killed_process_is_taken_over_at_once_and_that_of_a_living_one_is_not(tmp_path):
    path = tmp_path / "run.lock"
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Held, match=f"process {other.pid} on"), lease(path):
            pass
    finally:
        other.kill()
        other.communicate()
    assert path.exists() and leases.holder(path) is None
    with lease(path) as check:
        check()
    assert list(tmp_path.iterdir()) == []


def test_the_lease_of_another_host_is_taken_over_when_nobody_has_renewed_it(tmp_path):
    path = tmp_path / "run.lock"
    for pid in (os.getpid(), dead()):  # numbers of processes here say nothing of those there
        lock_of(path, "elsewhere", pid, -leases.CLOCKS + 3)
        with pytest.raises(Held, match=f"process {pid} on elsewhere"), lease(path):
            pass
    os.utime(path, (time.time() - leases.CLOCKS - 2,) * 2)
    assert leases.holder(path) is None
    with lease(path) as check:
        check()
    path.write_text("")  # as a full disk or a power failure leaves it
    with pytest.raises(Held, match="if nobody trains the run, remove"), lease(path):
        pass


def test_a_holder_renews_its_lease_and_stops_at_once_when_another_has_taken_it(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    monkeypatch.setattr(leases, "RENEW", 0.01)
    with lease(path):
        os.utime(path, (time.time() - 100,) * 2)
        until = time.monotonic() + 10
        while path.stat().st_mtime < time.time() + leases.LIFETIME - 5:
            assert time.monotonic() < until, "not renewed"
            time.sleep(0.005)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it

    def long_computation(until: float) -> None:  # which asks nothing
        lock_of(path, "elsewhere", 1, 60)
        while time.monotonic() < until:
            pass

    with pytest.raises(Lost, match="so process 1 on elsewhere took it over"), lease(path):
        long_computation(time.monotonic() + 10)
    signal.signal(signal.SIGINT, before)
    assert path.exists()  # what is not its own is not given back
    path.unlink()
    monkeypatch.setattr(leases, "RENEW", 100.0)
    with lease(path) as check:
        path.unlink()
        with pytest.raises(Lost, match=r"so .* took it over"):
            check()
    with pytest.raises(KeyboardInterrupt), lease(path):
        raise KeyboardInterrupt


def test_no_two_ever_hold_a_lease_that_is_fought_for_and_left_behind(tmp_path):
    path, inside, most, rounds, failures = tmp_path / "run.lock", [], [0], [0], []
    gone, guard = dead(), threading.Lock()

    def fight() -> None:
        until = time.monotonic() + 60
        for turn in range(15):
            while True:
                try:
                    with lease(path) as check:
                        with guard:
                            inside.append(turn)
                            most[0] = max(most[0], len(inside))
                            rounds[0] += 1
                        check()
                        with guard:
                            inside.remove(turn)
                        if turn % 3 == 0:
                            lock_of(path, files.HOST, gone, 60)  # as if this process had died in it
                    break
                except Held:
                    if time.monotonic() > until:
                        failures.append(turn)
                        return
                except Lost:
                    failures.append(turn)
                    return

    threads = [threading.Thread(target=fight) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and rounds == [90] and most == [1]


# --- the store

def test_a_run_that_another_trains_is_waited_for_or_left(root, monkeypatch):  # noqa: F811
    store, wanted = Store("x", root), configurations("x", "tiny", root)[0]
    monkeypatch.setattr(records, "POLL", 0.01)
    said, results = [], []
    with lease(store._lease(wanted)):
        assert store.holder(wanted)
        with pytest.raises(Held):
            store.run(wanted, wait=False)
        with pytest.raises(OutOfTime, match=r"process .* still trains it"):
            store.run(wanted, deadline=time.monotonic() + 0.05)
        waiting = threading.Thread(target=lambda: results.append(store.run(wanted, show=said.append)))
        waiting.start()
        until = time.monotonic() + 60
        while not said:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert "waits for process" in said[0] and outcome(root) == {}
    waiting.join()
    assert [run.config for run in results] == [wanted] and store.find(wanted) and not store.holder(wanted)


def test_who_has_lost_its_run_writes_nothing(root, monkeypatch):  # noqa: F811
    store, wanted = Store("x", root), configurations("x", "tiny", root)[0]
    step = Trainer._step

    def taken_over(trainer):
        step(trainer)
        lock_of(store._lease(wanted), "elsewhere", 1, 60)

    monkeypatch.setattr(Trainer, "_step", taken_over)
    with pytest.raises(Lost, match="process 1 on elsewhere took it over"):
        store.run(wanted)
    assert outcome(root) == {} and store.holder(wanted) == "process 1 on elsewhere"


def test_a_run_is_published_whole_or_not_at_all_and_the_first_to_publish_it_wins(root, monkeypatch):  # noqa: F811
    store, wanted = Store("x", root), configurations("x", "tiny", root)[0]

    def everything() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in store._place(wanted).folder.parent.rglob("*") if path.is_file()}

    write = Path.write_bytes

    def killed(path, content):
        if path.name == "metrics.json":
            raise KeyboardInterrupt
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            store.run(wanted)
    assert everything() == {}
    run = store.run(wanted)
    (run.folder / "curve.csv").write_text("the first's")
    store._train(wanted, float("inf"), "cpu", lambda _: None, None, lambda: None)  # by who does not know that it has lost it
    assert everything()["curve.csv"] == b"the first's"
    provenance = json.loads((run.folder / "provenance.json").read_text())
    (run.folder / "provenance.json").write_text(json.dumps(provenance | {"source": "older"}))
    (run.folder / "horizon.json").write_text("of the older run")
    assert store.run(wanted).current and "horizon.json" not in everything() and everything()["curve.csv"] != b"the first's"
    assert [path.name for path in run.folder.parent.iterdir()] == [run.name]


def test_who_has_lost_its_run_does_not_write_over_the_checkpoint_of_who_has_it(root, monkeypatch):  # noqa: F811
    store, wanted = Store("x", root), configurations("x", "tiny", root)[0]
    step = Trainer._step

    def suspended(trainer):
        step(trainer)
        lock_of(store._lease(wanted), "elsewhere", 1, 60)
        trainer.folder.mkdir(parents=True)
        trainer.checkpoint.write_text("the other's")

    monkeypatch.setattr(Trainer, "_step", suspended)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Lost):
        store.run(wanted)
    assert (store.scratch(wanted) / "checkpoint.safetensors").read_text() == "the other's"


def test_a_run_begun_by_older_source_is_named_and_cleaned_once_the_run_is_there(root, command, capsys):  # noqa: F811
    store, [first, second] = Store("x", root), configurations("x", "tiny", root)
    older = store.checkpoints / ("0" * 12) / "tiny" / store.scratch(first).name
    older.mkdir(parents=True)
    (older / "checkpoint.safetensors").write_bytes(b"")
    store.scratch(second).mkdir(parents=True)
    assert command("--list") == 0
    said = capsys.readouterr().out
    assert "tiny/ep-lr0.003-seed0: absent; older source has begun it, which is not gone on from" in said
    assert "tiny/bptt-lr0.003-seed0: begun; goes on from its checkpoint" in said
    with lease(store._lease(second)):
        assert command("--list") == 0 and "bptt-lr0.003-seed0: being trained by process" in capsys.readouterr().out
    assert command() == 0 and store.unfinished(first) == store.unfinished(second) == []


def test_only_runs_and_what_dead_writers_left_are_pruned(root):  # noqa: F811
    store = Store("x", root)
    [run, _] = store.runs("tiny")
    gone, mine = run.folder.with_name("gone-lr0.01-seed0-0123abcd"), f"{files.HOST}.{os.getpid()}-0"
    shutil.copytree(run.folder, gone)
    kept = [run.folder.parent / name for name in ("notes.txt", "notes/plan.txt", "gone-lr0.01-seed0-0123abc/x",
                                                  f".a.{mine}.partial", ".a.elsewhere.1-0.partial")]
    left = run.folder / f".log.csv.gz.{files.HOST}.{dead()}-3.partial"
    staged = run.folder.with_name(f".{run.name}.{files.HOST}.{dead()}-4.partial")
    for path in [*kept, left, staged / "metrics.json"]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (run.folder.parent / "file-lr0.01-seed0-0123abcd").write_text("named like a run, but a file")
    assert store.prune("tiny") == [gone.name] and store.prune("tiny") == []
    assert all(path.exists() for path in kept) and not left.exists() and not gone.exists() and store.find(run.config)
    assert not staged.exists()
    assert (run.folder.parent / "file-lr0.01-seed0-0123abcd").exists()


@pytest.mark.parametrize("name", ["a-lr0.003-seed0-0123abcd", "a-b.c_1-lr1e-05-seed12-ffffffff", "x-lr3-seed0-00000000"])
def test_a_run_is_known_by_its_folders_name(name):
    assert records.RUN.fullmatch(name)
    assert not any(records.RUN.fullmatch(other) for other in (name[:-1], f"{name}0", f".{name}", name.replace("-seed", "-")))


def test_what_is_being_written_is_known_by_host_and_process(tmp_path, monkeypatch):
    """So a second host on the same store never takes it for its own, and once the process is gone it is cleaned away."""
    written = []
    monkeypatch.setattr(files.os, "replace", lambda partial, path: written.append(Path(partial).name))
    files.write_atomically(tmp_path / "metrics.json", "{}")
    files.write_atomically(tmp_path / "metrics.json", "{}")
    first, second = written
    assert first != second and all(name.startswith(f".metrics.json.{files.HOST}.{os.getpid()}-") for name in written)
    for number, left in ((dead(), True), (os.getpid(), False)):
        partial = tmp_path / first.replace(f".{os.getpid()}-", f".{number}-")
        partial.touch()
        assert (partial in files.leftovers(tmp_path)) == left
    (tmp_path / first.replace(files.HOST, "elsewhere-1").replace(f".{os.getpid()}-", f".{dead()}-")).touch()
    assert len(list(files.leftovers(tmp_path))) == 1


def test_a_file_that_is_written_by_many_at_once_is_always_whole(tmp_path):
    path, texts = tmp_path / "a.json", [str(n) * 20_000 for n in range(4)]
    files.write_atomically(path, texts[0])
    threads = [threading.Thread(target=lambda text=text: [files.write_atomically(path, text) for _ in range(30)])
               for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_text() in texts
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_run_is_recorded_although_its_sample_cannot_be_drawn(root, monkeypatch):  # noqa: F811
    profile = root / "pipelines" / "profiles" / "x.yaml"
    profile.write_text(profile.read_text() + "sample: 5\n")
    [first, second] = configurations("x", "tiny", root)
    monkeypatch.setattr(records, "PROMPT", "€")
    with pytest.warns(UserWarning, match="without a sample of text: DataError: cannot encode '€'"):
        run = Store("x", root).run(first)
    assert run.metrics["final"]["loss"] > 0 and run.sample is None and Store("x", root).find(first)
    monkeypatch.setattr(records, "PROMPT", "The king")
    monkeypatch.setattr(eplib.data.Chars, "encode", lambda *_: (_ for _ in ()).throw(ImportError("no tokenizers")))
    with pytest.warns(UserWarning, match="ImportError: no tokenizers"):
        assert Store("x", root).run(second).metrics["final"]["loss"] > 0


def test_a_run_recorded_under_another_default_does_not_stand_for_todays(root):  # noqa: F811
    store, wanted = Store("x", root), configurations("x", "tiny", root)[0]
    path = store.run(wanted).folder / "config.json"
    recorded = json.loads(path.read_text())
    del recorded["frozen"]  # an option that was not there yet
    path.write_text(json.dumps(recorded))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.find(wanted)
    for change, said in (({"gate": 0.5}, "gate was 0.5, asked for is None"), ({"speed": 3}, "speed: Unexpected")):
        path.write_text(json.dumps(recorded | change))
        with pytest.warns(UserWarning, match=said):
            assert store.find(wanted) is None
    assert store.run(wanted).recorded_config["gate"] is None  # trained again, recorded as it is


# --- profiles

def test_a_misspelt_experiment_is_refused_with_those_there_are(root):  # noqa: F811
    (root / "pipelines" / "profiles" / "y.yaml").write_text("runs: {other: }\n")
    for ask in (lambda: configurations("x", "tniy", root), lambda: Store("x", root).runs("tniy"),
                lambda: Store("x", root).recorded("tniy"), lambda: Store("x", root).prune("tniy")):
        with pytest.raises(profiles.ConfigurationError, match="'tniy'; profile x has tiny; other profiles have other"):
            ask()
    assert configurations("x", "other", root) == []  # another profile's: this one leaves it out


@pytest.mark.parametrize("text, said", [
    ("runs: {tiny: [}", r"x.yaml, line 3, column 15: this is not YAML: "),
    ("runs:\n  tiny:\n\t- arms", r"x.yaml, line 5, column 1: this is not YAML: found character that cannot start any token"),
    ("runs: [tiny]", "x.yaml, runs: got .'tiny'.; give a mapping"),
    ("runs: {tiny: {arms: {a: }}}", "x.yaml, runs.tiny: got .*; an experiment is a list of families"),
    ("runs: {tiny: [3]}", "x.yaml, runs.tiny: got 3; give a mapping"),
    ("runs: {tiny: [{arms: [a]}]}", "x.yaml, runs.tiny, arms: got .'a'.; give a mapping"),
    ("runs: {tiny: [{arms: {a: 3}}]}", "x.yaml, runs.tiny, arm a: got 3; give a mapping"),
    ("run: {tiny: }", "x.yaml: unknown key run; a profile has profile, stale, sample, plugins, notebooks, runs"),
    ("sample: -1", "x.yaml, sample: got -1; give a number of tokens"),
    ("sample: true", "x.yaml, sample: got True; give a number of tokens"),
])
def test_a_profile_that_cannot_be_read_is_refused_with_file_line_and_what(text, said, root, command, capsys):  # noqa: F811
    write_profile(root, text)
    with pytest.raises(profiles.ConfigurationError, match=said):
        configurations("x", "tiny", root)
    assert command("--list") == 2 and "train: " in capsys.readouterr().err


def test_a_misspelt_word_for_what_becomes_of_older_runs_does_not_mean_to_train_them_again(root):  # noqa: F811
    path = root / "pipelines" / "profiles" / "x.yaml"
    path.write_text(path.read_text().replace("stale: retrain", "stale: keeep"))
    with pytest.raises(profiles.ConfigurationError, match=r"x.yaml, stale: got 'keeep'; .* is keep or retrain"):
        Store("x", root)


def test_runs_of_a_profile_outside_the_repository_stay_whoever_shares_its_name(root, tmp_path):  # noqa: F811
    own = (root / "pipelines" / "profiles" / "x.yaml").read_text()
    first, second = tmp_path / "a" / "mine.yaml", tmp_path / "b" / "mine.yaml"
    for path, text in ((first, own), (second, own.replace("ep: , ", ""))):
        path.parent.mkdir()
        path.write_text(text)
    folder = Store(str(first), root)._place(configurations(str(first), "tiny", root)[0]).folder
    folder.mkdir(parents=True)
    assert Store(str(second), root).prune("tiny") == [] and folder.exists()
    (root / "pipelines" / "profiles" / "mine.yaml").write_text(second.read_text())
    assert Store("mine", root).prune("tiny") == [folder.name] and not folder.exists()


# --- the command

def test_runs_that_another_process_trains_are_left_to_it(root, command, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train, "BUSY_SECONDS", 0.05)
    store, [first, second] = Store("x", root), configurations("x", "tiny", root)
    codes = []
    calls = threading.Thread(target=lambda: codes.append(command()))
    with lease(store._lease(first)):
        calls.start()
        until = time.monotonic() + 120
        while not store.find(second):
            assert time.monotonic() < until and calls.is_alive()
            time.sleep(0.05)
        assert calls.is_alive() and store.find(first) is None
        assert command("--only", "ep-", "--budget", "0.3s") == 3  # what another trains is unfinished here
        store._train(first, float("inf"), "cpu", lambda _: None, None, lambda: None)
        calls.join(120)
    said = capsys.readouterr().out
    assert codes == [0] and "tiny/bptt-lr0.003-seed0: done (1 of 2" in said and "1 of 1 runs are unfinished" in said
    assert "tiny/ep-lr0.003-seed0: recorded already (2 of 2" in said


def test_workers_are_as_many_as_the_processors_that_this_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "QUOTA", tmp_path / "cpu.max")
    for allowed, quota, expected in ((range(8), None, 8), ([3], None, 1), (range(8), "max 100000", 8),
                                     (range(8), "250000 100000", 2), (range(8), "20000 100000", 1),
                                     ([1, 2], "900000 100000", 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: set(allowed), raising=False)
        if quota:
            common.QUOTA.write_text(quota)
        assert common.processors() == expected


@pytest.fixture
def tree(corpus, tmp_path):  # noqa: F811
    """A function that makes a repository with a profile, and the command that trains it in real processes."""
    def make(profile: str, script: str = "") -> tuple[Path, list[str]]:
        folder = make_root(tmp_path / "tree", corpus, profile)
        (folder / "command.py").write_text(SCRIPT.format(file=eplib.data.CORPORA["tinystories"]).replace(
            "if __name__", f"{script}\nif __name__"))
        return folder, [sys.executable, "command.py", "--profile", "x", "--workers"]

    return make


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    long = folder / ("temporary" * 20)  # no socket's path has room for it
    long.mkdir(exist_ok=True)
    return subprocess.Popen(arguments, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(long)})


@pytest.mark.slow
def test_two_commands_on_one_store_share_its_runs(tree):
    folder, arguments = tree(KILLED.replace("steps: 150", "steps: 40").replace("{ep: }", "{a: , b: , c: }"))
    both = [start(folder, [*arguments, "1"]) for _ in range(2)]
    try:
        said = [one.communicate(timeout=240) for one in both]
    finally:
        for one in both:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
    assert [one.returncode for one in both] == [0, 0], said
    assert sum(out.count(": done (") for out, _ in said) == 3  # each run by one of them
    machines = [json.loads(path.read_text()) for path in (folder / "results").rglob("machine.json")]
    assert [machine["sessions"] for machine in machines] == [1] * 3
    assert {run.config.arm for run in Store("x", folder).recorded("tiny")} == set("abc")


@pytest.mark.slow
def test_a_killed_worker_costs_no_other_run_and_its_own_is_tried_once_more(tree):
    dying = """
import os, pathlib, signal
step = eplib.training.Trainer._step
def dies(trainer):
    step(trainer)
    marker = pathlib.Path("once")
    if trainer.progress.step == 9 and trainer.config.arm == "always":
        os.kill(os.getpid(), signal.SIGKILL)
    if trainer.progress.step == 9 and trainer.config.arm == "once" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
eplib.training.Trainer._step = dies
"""
    folder, arguments = tree(KILLED.replace("steps: 150", "steps: 40").replace("{ep: }", "{fine: , once: , always: }"), dying)
    one = start(folder, [*arguments, "2"])
    try:
        out, err = one.communicate(timeout=240)
    finally:
        if one.poll() is None:
            os.killpg(one.pid, signal.SIGKILL)
    assert one.returncode == 1, (out, err)
    assert {run.config.arm for run in Store("x", folder).recorded("tiny")} == {"fine", "once"}
    assert err.count("its worker was killed (") == 2 and "failed: tiny/always-lr0.003-seed0: its worker was killed twice" in err
    sessions = {path.parent.name.split("-")[0]: json.loads(path.read_text())["sessions"]
                for path in (folder / "results").rglob("machine.json")}
    assert sessions == {"fine": 1, "once": 2} and "Traceback" not in err


@pytest.mark.parametrize("arguments, read", [(["pipelines.train", "--profile", "paper", "--list"], 1),
                                             (["pipelines.smoke", "--help"], 0)])
def test_a_reader_who_has_seen_enough_gets_no_traceback(arguments, read):
    one = subprocess.Popen([sys.executable, "-m", *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
    for _ in range(read):
        one.stdout.readline()
    one.stdout.close()
    error = one.stderr.read()
    assert one.wait(60) in (0, 128 + signal.SIGPIPE) and error == ""
