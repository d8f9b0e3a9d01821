"""The run store, profiles, and the command that fills the store."""

import gzip
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from scipy import stats

import eplib
from eplib import blocks, checkpoints, data, diagnostics, profiles, solvers
from eplib.config import ConfigurationError, digest, parse, plain, sparse
from eplib.estimators import AsymEP, OneStep
from eplib.runconfig import Branch
from eplib.solvers import FixedHorizon
from eplib.store import formats, records
from eplib.store.records import Run, Store, configurations
from eplib.training import Optimiser, OutOfTime, RunConfig, Trainer
from pipelines import horizon, train
from test_training import IMAGES, REPOSITORY, config, corpus, make_root, outcome  # noqa: F401  (corpus is a fixture)

COMMON = """
      common:
        data: {kind: Text, corpus: tinystories, validation: 0.02}
        model: {width: 8, heads: 2, context: 8, block: {kind: Thick}}
        solver: {kind: Relaxation, step: 0.8, max_steps: 4}
        estimator: {kind: DyadicEP, steps: 3}
        steps: 2
        batch: 2
        evaluation_batches: 1
"""
TWO = f"""
runs:
  tiny:
    - arms: {{ep: , bptt: {{estimator: {{kind: BPTT, steps: 2}}}}}}{COMMON}
"""


def write_profile(root: Path, text: str) -> None:
    (root / "pipelines" / "profiles" / "x.yaml").write_text(f"profile: x\nstale: retrain\n{text}\n")


@pytest.fixture
def root(tmp_path, corpus):  # noqa: F811
    return make_root(tmp_path / "root", corpus, TWO)


@pytest.fixture
def recorded(root):
    """A store with one short run in it."""
    run = config(steps=2, keep=(1,), penalties=())
    return Store("x", root), Store("x", root).run(run), run


# --- the store

def test_a_run_is_found_by_name_and_digest_and_not_trained_twice(recorded, monkeypatch):
    store, run, wanted = recorded
    assert run.folder.name == f"ep-lr0.01-seed0-{digest(sparse(wanted))}" and run.folder.parent.name == "tiny"
    assert json.loads((run.folder / "config.json").read_text()) == plain(wanted)
    assert set(run.provenance) == {"source", "backend", "torch", "numpy", "python"} and run.current
    assert run.provenance["backend"] == "torch"  # no kernel for a width of 8
    monkeypatch.setattr(records, "Trainer", None)
    assert store.run(wanted).metrics == run.metrics and store.find(wanted) == run
    for change in ({"seed": 1}, {"optimiser": Optimiser(lr=1.1e-2)}, {"evaluation_batches": 2}, {"steps": 3}):
        other = config(**{"steps": 2, "keep": (1,), "penalties": ()} | change)
        assert store.find(other) is None and store._place(other).folder.name != run.folder.name
    assert store.find(config(steps=2, keep=(1,), penalties=(), optimiser=Optimiser(lr=1e-2 * (1 + 1e-15)))) is None


def test_results_say_nothing_of_time_or_machine(recorded):
    store, run, _ = recorded
    machine = json.loads(next((store.results / "machine").rglob("machine.json")).read_text())
    assert machine["sessions"] == 1 and machine["device"] == "cpu" and machine["seconds"] > 0 and machine["processor"]
    read = {".gz": lambda path: gzip.decompress(path.read_bytes()).decode()}
    words = "".join(read.get(path.suffix, Path.read_text)(path) for path in run.folder.iterdir())
    assert "seconds" not in words and str(store.root) not in words
    assert run.seconds.shape == run.curve["step"].shape and run.seconds[-1] == pytest.approx(machine["seconds"])
    shutil.rmtree(store.results / "machine")
    assert store.find(run.config).seconds is None


def test_the_log_of_every_step_stays_beside_the_weights_and_is_missed_by_nobody(root):
    """1,600 steps: git gets windows of three, from the very rows that stay here."""
    whole = config(steps=1600, keep=(), penalties=(), solver=FixedHorizon(steps=1), estimator=OneStep(), evaluate_every=800,
                   optimiser=Optimiser(lr=1e-3))
    run = Store("x", root).run(whole)
    assert len(run.log["step"]) == 534 and run.log["step"][-1] == 1600 == len(run.full_log["step"])
    assert run.full_log["force_evaluations"].sum() == run.log["force_evaluations"].sum() == run.metrics["force_evaluations"]
    assert run.full_log["loss"][:3].mean() == pytest.approx(run.log["loss"][0], rel=1e-7)
    spent = run.full_log["force_evaluations"][:800].sum()
    assert run.curve["force_evaluations"].tolist() == [spent, run.metrics["force_evaluations"]]
    shutil.rmtree(run.weights_folder)
    fresh = Store("x", root).find(whole)
    assert fresh.full_log is None and fresh.log["step"][-1] == 1600


def test_the_repository_is_where_one_works_wherever_the_package_is_installed(tmp_path):
    site, elsewhere = tmp_path / "site-packages" / "eplib", tmp_path / "elsewhere"
    site.mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copy(REPOSITORY / "eplib" / "files.py", site)
    for folder, expected in ((REPOSITORY, REPOSITORY), (REPOSITORY / "notebooks", REPOSITORY), (elsewhere, site.parent)):
        found = subprocess.run([sys.executable, "-c", "from eplib.files import ROOT; print(ROOT)"], cwd=folder, text=True,
                               env=os.environ | {"PYTHONPATH": str(site.parent)}, capture_output=True, check=True)
        assert found.stdout.strip() == str(expected)


def test_key_order_does_not_matter(root):
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1}) != digest({"a": 1})
    families = yaml.safe_load((root / "pipelines" / "profiles" / "x.yaml").read_text())["runs"]["tiny"]

    def turned(value):
        return {key: turned(item) for key, item in reversed(value.items())} if isinstance(value, dict) else value

    before = {run.arm: digest(sparse(run)) for run in configurations("x", "tiny", root)}
    write_profile(root, yaml.safe_dump({"runs": {"tiny": [turned(family) for family in families]}}, sort_keys=False))
    assert {run.arm: digest(sparse(run)) for run in configurations("x", "tiny", root)} == before


def test_weights_are_given_back_in_the_model_or_missed_with_instructions(recorded, root):
    _, run, wanted = recorded
    last, first = run.model(), run.model(1)
    assert not torch.equal(last.readout.weight, first.readout.weight)
    solution = last.settle(torch.zeros(1, 8, dtype=torch.long), wanted.solver)
    assert solution.value.isfinite().all() and run.has_weights() and run.has_weights(1) and not run.has_weights(3)
    path = run.weights_folder / "step-000002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid"):
        run.model()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"step 2 are not at .*step-000002.*train the run here, or add the step"):
        run.model()
    with pytest.raises(FileNotFoundError, match="step 7"):
        run.model(7)


def test_a_run_without_its_metrics_does_not_count(recorded):
    store, run, wanted = recorded
    (run.folder / "metrics.json").unlink()
    assert store.find(wanted) is None
    assert store.run(wanted).metrics["final"]["loss"] > 0


def older(run: Run) -> None:
    """Makes a run look recorded by older source, with a metric that gives it away."""
    for name, changes in (("provenance", {"source": "0" * 12}), ("metrics", {"old": 1})):
        path = run.folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        run.__dict__.pop(name, None)  # read anew


def test_runs_of_older_source_are_kept_or_trained_again(recorded, root, corpus, tmp_path):  # noqa: F811
    store, run, wanted = recorded
    older(run)
    assert not run.current
    keeping = make_root(tmp_path / "keeping", corpus, stale="keep")
    shutil.copytree(root / "results", keeping / "results")
    kept = Store("x", keeping).run(wanted)
    assert kept.metrics["old"] == 1 and not kept.current
    assert store.find(wanted) is None
    again = store.run(wanted)
    assert "old" not in again.metrics and again.current


@pytest.mark.parametrize("stale", [False, True])
def test_a_kill_before_the_metrics_are_written_leaves_no_run(stale, recorded, monkeypatch):
    """Metrics come last; those of older source do not pass for the new run's."""
    store, run, wanted = recorded
    older(run) if stale else shutil.rmtree(run.folder)
    write, written = Path.write_bytes, []

    def killed(path, content):
        if path.name == "metrics.json":
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            store.run(wanted)
    assert {"config.json", "log.csv.gz", "curve.csv", "provenance.json"} <= set(written)
    assert Store("x", store.root).find(wanted) is None
    assert "old" not in store.run(wanted).metrics


def test_recorded_runs_and_pruning(root):
    store = Store("x", root)
    assert store.recorded("tiny") == []
    runs = store.runs("tiny")
    assert [run.config.arm for run in runs] == [run.config.arm for run in store.recorded("tiny")] == ["ep", "bptt"]
    assert store.prune("tiny") == []
    before = outcome(root)
    write_profile(root, TWO.replace("ep: , ", ""))
    assert store.prune("tiny") == [runs[0].folder.name] and store.prune("tiny") == []
    assert outcome(root) == {name: content for name, content in before.items() if runs[0].folder.name not in name}
    assert not list((store.results / "machine").rglob(runs[0].folder.name)) and outcome(root)


# --- what is written

def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    values = {1: (math.nan, -math.inf, 1.5), "b": [np.float32(2), np.int64(3), np.float64("nan"), None, True, "x"]}
    assert formats.finite(values) == {"1": [None, None, 1.5], "b": [2.0, 3, None, None, True, "x"]}
    path = records.save_result("x", "tiny", "table", {"rows": [[math.nan, "é"]]}, tmp_path).path
    assert path == tmp_path / "results" / "x" / "tiny" / "table.json"
    assert json.loads(path.read_text()) == {"rows": [[None, "é"]]} and path.read_text().endswith("}\n")
    machine = json.loads(records.save_machine("x", "cost", {"seconds": 1.0}, tmp_path).path.read_text())
    assert machine["seconds"] == 1.0 and machine["machine"]["threads"] >= 1
    assert list(tmp_path.rglob("*.partial")) == []


@pytest.mark.parametrize("name", ["log.csv.gz", "curve.csv"])
def test_a_log_comes_back_as_it_was_written(name, tmp_path):
    path = tmp_path / name
    rows = [{"step": 1, "loss": 0.1, "status": "ok"}, {"step": 2, "loss": math.nan, "late": 3.0}]
    content = formats.to_csv(rows)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    columns = formats.columns(path)
    assert columns["step"].tolist() == [1, 2] and columns["status"].tolist() == ["ok", ""]
    assert np.array_equal(columns["loss"], [0.1, math.nan], equal_nan=True)
    assert np.array_equal(columns["late"], [math.nan, 3.0], equal_nan=True)


def test_a_loss_that_is_not_finite_is_recorded_as_null(root, monkeypatch):
    step = records.Trainer._step

    def broken(trainer):
        step(trainer)
        with torch.no_grad():
            trainer.model.embedding.weight.fill_(torch.nan)

    monkeypatch.setattr(records.Trainer, "_step", broken)
    run = Store("x", root).run(config())
    assert run.metrics["final"]["loss"] is None and run.metrics["best_loss"] is None
    assert run.metrics["excursions"] == run.metrics["skipped"] == 5 and run.metrics["first_excursion"] == 2
    assert np.isnan(run.log["loss"][1:]).all() and run.log["status_nonfinite"].tolist() == [0, 1, 1, 1, 1, 1]


def test_arms_are_compared_at_their_best_rate_and_seed_by_seed():
    def made(arm, lr, seed, loss):
        return SimpleNamespace(config=SimpleNamespace(arm=arm, optimiser=SimpleNamespace(lr=lr), seed=seed),
                               metrics={"final": {"loss": loss}})

    runs = [made("ep", 1, 0, 2.0), made("ep", 1, 1, 3.0), made("ep", 2, 0, 1.0), made("ep", 2, 1, None),
            made("bp", 1, 0, 5.0), made("bp", 2, 1, 1.0), made("bp", 2, 0, 1.5)]
    arms = records.best_of_grid(runs)
    assert list(arms) == ["ep", "bp"] and arms["ep"] == runs[:2] and arms["bp"] == runs[5:]
    assert records.mean_loss(arms, "ep") == 2.5 and records.mean_loss(arms, "no") is None
    assert records.mean_loss({"ep": runs[2:4]}, "ep") is None
    assert records.spread(arms, "ep") == pytest.approx(0.5 ** 0.5)
    assert records.spread({"ep": runs[:1]}, "ep") is None and records.spread({"ep": runs[2:4]}, "ep") is None
    assert records.differences({"ep": runs[:1], "bp": runs[5:6]}, "ep", "bp") == []


# --- profiles

def test_families_expand_in_order(root):
    write_profile(root, f"""
runs:
  tiny:
    - over: {{optimiser.lr: [1.0e-2, 2.0e-2], seed: [1, 0]}}
      arms: {{b: , a: {{estimator: {{steps: 7}}}}}}{COMMON}
    - arms: {{c: {{estimator: {{kind: BPTT, steps: 2}}, model: {{width: 4}}}}}}{COMMON}
""")
    found = configurations("x", "tiny", root)
    assert [run.name for run in found] == [f"{arm}-lr{lr}-seed{seed}" for arm in "ba" for lr in ("0.01", "0.02")
                                           for seed in (1, 0)] + ["c-lr0.003-seed0"]
    assert {run.estimator.steps for run in found} == {3, 7, 2} and found[4].estimator.kind == "DyadicEP"
    assert found[-1].model.width == 4 and found[-1].model.context == 8 and found[-1].estimator.kind == "BPTT"
    assert found[0].optimiser.warmup == Optimiser().warmup


def test_merging_replaces_a_block_of_another_kind_and_completes_one_of_the_same():
    base = {"estimator": {"kind": "AsymEP", "beta": 0.1}, "solver": {"step": 0.5}, "list": [{"kind": "a"}], "n": 1}
    merge = profiles._merge
    assert merge(base, {"estimator": {"kind": "BPTT", "steps": 2}})["estimator"] == {"kind": "BPTT", "steps": 2}
    for more in ({"steps": 2}, {"kind": "AsymEP", "steps": 2}):
        assert merge(base, {"estimator": more})["estimator"] == {"kind": "AsymEP", "beta": 0.1, "steps": 2}
    assert merge(base, {"solver": {"kind": "Relaxation"}})["solver"] == {"kind": "Relaxation", "step": 0.5}
    assert merge(base, {"list": [], "n": {"a": 1}}) == base | {"list": [], "n": {"a": 1}}
    shaped = {"model": {"width": 8}}  # a Transformer, which need not be said
    assert merge(shaped, {"model": {"kind": "LayeredHopfield"}})["model"] == {"kind": "LayeredHopfield"}
    assert merge(shaped, {"model": {"kind": "Transformer"}})["model"] == {"kind": "Transformer", "width": 8}
    assert merge({"model": {"kind": "LayeredHopfield"}}, {"model": {"a": 1}})["model"] == {"kind": "LayeredHopfield", "a": 1}
    assert base["solver"] == {"step": 0.5}  # untouched


@pytest.mark.parametrize("change, parts", [
    ("optimiser: {rate: 1.0}", ["optimiser.rate", "Unexpected", "1.0"]),
    ("optimiser: {lr: 1e-3}", ["optimiser.lr", "valid number", "'1e-3'"]),
    ("optimiser: {lr: -1.0}", ["optimiser.lr", "greater than 0", "-1.0"]),
    ("batch: 2.5", ["batch", "integer", "2.5"]),
    ("batch: 0", ["batch", "greater than or equal to 1", "0"]),
    ("batch: true", ["batch", "integer", "True"]),
    ("solver: {kind: Relaxation, step: 3.0}", ["solver.step", "less than or equal to 2", "3.0"]),
    ("estimator: {kind: Magic}", ["estimator", "DyadicEP", "Backprop", "Magic"]),
    ("estimator: {kind: Backprop}", ["Feedforward goes with Backprop"]),
    ("data: {kind: Text, corpus: novels}", ["data.corpus", "plays", "novels"]),
    ("penalties: [{kind: ContractionRate, target: 1.5}]", ["penalties.0.target", "less than 1", "1.5"]),
    ("arm: 'A b'", ["arm", "pattern", "A b"]),
])
def test_a_wrong_value_is_named_with_its_profile_experiment_arm_and_key(change, parts, root):
    write_profile(root, f"runs:\n  tiny:\n    - arms:\n        good:\n        wrong: {{{change}}}{COMMON}")
    with pytest.raises(ConfigurationError) as error:
        configurations("x", "tiny", root)
    for part in ["x.yaml, runs.tiny, arm wrong", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize("family, parts", [
    ("{common: {}}", ["has no arms"]),
    ("{arms: {a: }, steps: 3}", ["unknown key steps", "common, arms and over"]),
    ("{arms: {a: }, over: {seed: 3}}", ["over.seed: got 3", "list"]),
])
def test_a_family_that_is_none_is_refused(family, parts, root):
    write_profile(root, f"runs:\n  tiny:\n    - {family}")
    with pytest.raises(ConfigurationError) as error:
        configurations("x", "tiny", root)
    for part in ["x.yaml, runs.tiny", *parts]:
        assert part in str(error.value)


def test_one_run_named_twice_is_refused(root):
    """Two workers would train it in one folder."""
    write_profile(root, f"runs:\n  tiny:\n    - over: {{seed: [1, 1]}}\n      arms: {{a: }}{COMMON}")
    with pytest.raises(ConfigurationError, match=r"arm a: a-lr0.003-seed1 is named twice"):
        configurations("x", "tiny", root)


def test_empty_groups_have_no_runs_and_an_unknown_profile_is_named(root):
    write_profile(root, "runs: {tiny: }")
    assert configurations("x", "tiny", root) == []
    with pytest.raises(ConfigurationError, match="no profile 'y'; there are: x"):
        Store("y", root)


@pytest.mark.parametrize("profile", sorted(path.stem for path in (REPOSITORY / "pipelines/profiles").glob("*.yaml")))
def test_the_profiles_of_the_repository_are_valid(profile):
    groups = profiles.load_profile(profile)["runs"]
    found = {group: configurations(profile, group) for group in groups}
    assert found and all(found.values())


def test_every_recorded_run_of_the_paper_profile_is_one_that_it_names():
    """In its folder's name is the digest of its configuration, which parses today and is the profile's."""
    store = Store("paper")
    wanted = {(config.experiment, store._place(config).folder.name): config
              for experiment in profiles.load_profile("paper")["runs"] for config in configurations("paper", experiment)}
    recorded = sorted((store.results / "runs").glob("*/*"))
    assert len(recorded) >= 385
    for folder in recorded:
        found = parse(RunConfig, json.loads((folder / "config.json").read_text()), str(folder))
        assert folder.name == f"{found.name}-{digest(sparse(found))}"
        assert wanted[folder.parent.name, folder.name] == found and (run := store.find(found))
        assert {"without_gradient", "force_evaluations", "training", "baselines"} <= run.metrics.keys()
        assert {"settled", "excursions"} <= run.metrics["final"].keys() and (folder / "log.csv.gz").stat().st_size < 60_000
    for folder in (store.results / "machine" / "runs").glob("*/*"):
        assert (folder.parent.name, folder.name) in wanted


# --- the command

@pytest.fixture
def command(root, monkeypatch):
    """`python -m pipelines.train --profile x ...` on the temporary root, with threads for worker processes."""
    for name in ("load_profile", "configurations", "train"):
        monkeypatch.setattr(train, name, partial(getattr(train, name), root=root))
    monkeypatch.setattr(train, "Store", lambda profile, _=None: Store(profile, root))
    monkeypatch.setattr(train, "ProcessPoolExecutor", lambda workers, mp_context, **how: ThreadPoolExecutor(workers, **how))
    return lambda *arguments: train.main(["--profile", "x", "--workers", "1", *arguments])


def test_command_trains_what_is_absent_and_a_second_call_nothing(command, root, capsys, monkeypatch):
    assert command("--list") == 0
    said = capsys.readouterr().out
    assert "x: 2 runs, 0 recorded, 2 to train" in said and said.count(": absent") == 2 and outcome(root) == {}
    assert command("--only", "tiny/bptt") == 0  # as --list names it
    said = capsys.readouterr().out
    assert "1 runs, 0 recorded, 1 to train" in said and "tiny/bptt-lr0.003-seed0: done (1 of 1" in said
    assert command("--experiment", "tiny") == 0
    assert "2 runs, 1 recorded, 1 to train" in capsys.readouterr().out
    before = outcome(root)
    monkeypatch.setattr(records, "Trainer", None)
    assert command() == 0 and command("--list") == 0
    said = capsys.readouterr().out
    assert "2 runs, 2 recorded, 0 to train" in said and said.count(": recorded\n") == 2 and outcome(root) == before
    write_profile(root, TWO.replace("ep: , ", ""))
    assert command("--only", "bptt") == 0 and outcome(root) == before  # a part of the runs prunes nothing
    assert command() == 0 and "removed tiny/ep-lr0.003-seed0-" in capsys.readouterr().out
    assert {Path(name).parts[2][:4] for name in outcome(root)} == {"bptt"}


def test_command_lists_runs_of_older_source(command, root, capsys):
    assert command() == 0
    for path in (root / "results" / "x" / "runs").rglob("provenance.json"):
        path.write_text(json.dumps({"source": "older"}))
    assert command("--list") == 0 and capsys.readouterr().out.count(": absent") == 2  # the profile trains them again
    profile = root / "pipelines" / "profiles" / "x.yaml"
    profile.write_text(profile.read_text().replace("stale: retrain", "stale: keep"))
    assert command("--list") == 0 and capsys.readouterr().out.count(": recorded by older source") == 2


@pytest.mark.parametrize("arguments, message", [
    (["--only", "nothing"], "no run of profile x has 'nothing' in its name"),
    (["--experiment", "other"], "no runs for 'other'; it has tiny"),
    (["--budget", "soon"], "such as 500s or 2h; got 'soon'"),
    (["--profile", "y"], "no profile 'y'; there are: x"),
    (["--device", "cuda"], "device 'cuda' was asked for"),
])
def test_command_refuses_what_it_cannot_do(arguments, message, command, root, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(*arguments) == 2
    assert message in capsys.readouterr().err and outcome(root) == {}


def test_command_refuses_a_wrong_profile_and_unknown_options(command, root, capsys):
    write_profile(root, TWO.replace("batch: 2", "batch: -2"))
    assert command() == 2 and "runs.tiny, arm ep" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        command("--budgets", "3s")
    assert exit.value.code == 2


@pytest.mark.parametrize("text, expected", [("500", 500), ("500s", 500), ("10m", 600), ("2h", 7200), ("1.5m", 90),
                                            ("0", 0)])
def test_budget_forms(text, expected):
    assert train.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "s", "5d", "-3", "1e3", "1 h", "1h30m", "inf"])
def test_budget_forms_that_are_none(text):
    with pytest.raises(ValueError, match="a budget is a number with s, m or h"):
        train.seconds(text)


def test_a_run_that_fails_is_reported_and_the_others_go_on(command, root, capsys):
    write_profile(root, TWO.replace("ep: ,", "ep: {data: {corpus: tinyshakespeare}},"))
    assert command() == 1
    said = capsys.readouterr()
    assert "failed: tiny/ep-lr0.003-seed0: DataError: cannot read" in said.err
    assert "python -m pipelines.data" in said.err and "tiny/bptt-lr0.003-seed0: done (1 of 2" in said.out
    assert {Path(name).parts[2][:4] for name in outcome(root)} == {"bptt"}


def test_a_budget_that_ends_gives_status_3_and_the_next_call_goes_on(command, root, capsys, monkeypatch):
    assert command("--budget", "0s") == 3
    assert "out of time: 2 of 2 runs are unfinished; call again" in capsys.readouterr().out and outcome(root) == {}

    def late(trainer, deadline, show):
        trainer._step()
        trainer.progress.seconds.append(0.1)
        trainer._save()
        assert 0 < deadline - time.monotonic() < 600
        raise OutOfTime("stopped at step 1 of 2")

    with monkeypatch.context() as patch:
        patch.setattr(records.Trainer, "advance", late)
        assert command("--budget", "10m") == 3
    assert "2 of 2 runs are unfinished" in capsys.readouterr().out
    assert len(list((root / "checkpoints").rglob("checkpoint.safetensors"))) == 2
    assert command("--budget", "10m") == 0
    assert [json.loads(path.read_text())["sessions"] for path in (root / "results").rglob("machine.json")] == [2, 2]


def test_the_interval_of_a_mean_is_students():
    """Against the t statistic by hand; one value has no interval."""
    values = [0.10, 0.20, 0.05, 0.10, 0.15]
    found = records.compare(values)
    half = stats.t.isf(0.025, 4) * statistics.stdev(values) / math.sqrt(5)
    assert math.isclose(found.mean, 0.12) and found.pairs == 5
    assert math.isclose(found.low, 0.12 - half, rel_tol=1e-9) and math.isclose(found.high, 0.12 + half, rel_tol=1e-9)
    assert records.compare([0.1]) == records.Comparison(1, 0.1) and records.compare([]).mean is None


def test_ranks_are_those_of_scipy():
    values = torch.tensor([3, 1, 2, 2, 5, 2, 1, 7])
    assert (diagnostics.ranks(values) + 1).tolist() == stats.rankdata(values.numpy()).tolist()


# --- runs that go on from others

EVER = Optimiser(lr=1e-2, warmup=0.0, decay=0.0, ema=0.9)  # the same rate at every step, however many there are


@pytest.mark.parametrize("changes", [{}, {"optimiser": EVER}], ids=["schedule", "average"])
def test_a_run_that_goes_on_from_a_kept_state_is_the_whole_one_bit_for_bit(changes, root):
    store, whole = Store("x", root), config(steps=6, keep=(2,), evaluate_every=2, **changes)
    run = store.run(whole)
    rest = store.run(replace(whole, keep=(4,), branch=Branch(run=f"tiny/{run.name}", step=2)))
    assert rest.name != run.name and rest.log["step"].tolist() == [3, 4, 5, 6] and rest.has_weights(4)
    assert all(torch.equal(a, b) for a, b in zip(run.model().parameters(), rest.model().parameters(), strict=True))
    for name in ("loss", "gradient_norm", "lr"):
        assert rest.log[name].tolist() == run.log[name][2:].tolist()
    spent = run.log["force_evaluations"][2:].sum()
    assert rest.metrics["force_evaluations"] == rest.curve["force_evaluations"][-1] == spent
    assert rest.curve["step"].tolist() == [4, 6] and rest.metrics["final"] == run.metrics["final"]


def test_a_run_is_extended_with_its_moments_and_stays_when_the_profile_is_pruned(root, command):
    store, short = Store("x", root), config(steps=3, keep=(), optimiser=EVER)
    run = store.run(short)
    longer, whole = run.extend(2).extend(1, backend="torch"), store.run(replace(short, steps=6))
    assert longer.config.steps == 6 and longer.config.first == 5 and longer.config.experiment == "extended"
    assert all(torch.equal(a, b) for a, b in zip(longer.model().parameters(), whole.model().parameters(), strict=True))
    assert command() == 0 and not store.find(short) and store.find(longer.config)
    assert not list((store.checkpoints / "states").rglob(run.name))


def test_an_extended_run_keeps_the_beta_at_which_its_annealing_ended(root, monkeypatch):
    run = Store("x", root).run(config(steps=3, keep=(), optimiser=EVER, estimator=AsymEP(beta=0.1, steps=4), anneal=0.2))
    assert run.log["beta"].tolist() == pytest.approx([0.1, 0.15, 0.2])
    assert run.extend(2).log["beta"].tolist() == pytest.approx([0.2, 0.2])


@pytest.fixture
def one_thread():
    """As workers compute: two threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_branch_is_stale_when_its_origin_has_another_state(command, root, capsys):
    """A recorded origin without its state is a dead end that the message leads out of."""
    write_profile(root, BRANCHED)
    origin, linear, _ = configurations("x", "tiny", root)
    store = Store("x", root)
    first = store.run(origin)
    state = store.kept_state(linear.branch)
    branched = store.run(linear)
    assert branched.provenance["origin"] == hashlib.sha256(state.read_bytes()).hexdigest() and branched.current
    before, scratch, losses = state.read_bytes(), store.scratch(linear), branched.log["loss"].tolist()
    tensors, header = checkpoints.read(state)
    checkpoints.write(state, {name: value + 0.01 * name.startswith("model") for name, value in tensors.items()}, header)
    assert not branched.current and store.find(linear) is None
    assert store.scratch(linear) != scratch  # what began from the old state is not gone on from
    assert store.run(linear).current and store.run(linear).log["loss"][0] != losses[0]
    (first.folder / "metrics.json").unlink()  # trained again, the origin has its first state
    assert command() == 0 and "failed" not in capsys.readouterr().out
    assert state.read_bytes() == before and store.find(linear).log["loss"].tolist() == losses
    state.unlink()
    (state.parent / f".{state.name}.elsewhere.1-0.partial").touch()  # a writer's that was killed
    assert store.find(linear).current  # nothing here says otherwise
    with pytest.raises(FileNotFoundError, match=rf"remove {re.escape(str(first.folder))} and train it again"):
        store.kept_state(linear.branch)


def test_a_run_that_cannot_go_on_says_why(root, tmp_path):
    store, short = Store("x", root), config(steps=3, keep=())
    run = store.run(short)
    name = f"tiny/{run.name}"
    with pytest.raises(FileNotFoundError, match=rf"after 2 updates is not at .*; there are: {name} after 3\. .* `keep`"):
        store.run(replace(short, branch=Branch(run=name, step=2)))
    other = replace(short, steps=4, model=replace(short.model, width=4), branch=Branch(run=name, step=3))
    with pytest.raises(ValueError, match=r"which is of another model: size mismatch"):
        store.run(other)
    thin = replace(short, steps=4, model=replace(short.model, block=blocks.Thin()), branch=Branch(run=name, step=3))
    with pytest.raises(ValueError, match=r"which is of another model: "):
        store.run(thin)
    with pytest.raises(ValueError, match="give the state of that run as origin"):
        Trainer(other, tmp_path, root / "data")
    for wrong in ({"steps": 3}, {"steps": 5, "keep": (3,)}):
        with pytest.raises(ValueError, match="the run goes on after step 3"):
            replace(short, branch=Branch(run=name, step=3), **wrong)
    shutil.rmtree(store.checkpoints / "states")
    with pytest.raises(FileNotFoundError, match="there are: none like it"):
        run.extend(1)


SETTLED = COMMON.replace("max_steps: 4", "max_steps: 60, tol: 1.0e-5").replace("DyadicEP, steps: 3", "DyadicEP").replace(
    "steps: 2\n", "steps: 5\n")
BRANCHED = f"""
runs:
  tiny:
    - arms: {{origin: {{keep: [2]}}}}{SETTLED}
    - arms:
        linear: {{branch: {{run: origin, step: 2}}}}
        implicit: {{branch: {{run: origin, step: 2}}, estimator: {{kind: Implicit}}}}{SETTLED}
"""


def test_branches_of_an_arm_are_trained_after_it_and_differ_by_their_rule_alone(command, root, capsys):
    """The linear response and the implicit gradient by autograd are one gradient, up to where the phases end."""
    write_profile(root, BRANCHED)
    origin, linear, implicit = configurations("x", "tiny", root)
    store = Store("x", root)
    assert linear.branch == implicit.branch == Branch(run=f"tiny/{profiles.run_folder(origin)}", step=2)
    assert command("--workers", "2") == 0  # with a worker to spare, the branches have to wait for their origin
    assert "failed" not in capsys.readouterr().out
    one, other = store.find(linear), store.find(implicit)
    assert one.log["step"].tolist() == other.log["step"].tolist() and one.log["step"][0] == 3
    assert one.log["loss"][0] == other.log["loss"][0] == store.find(origin).log["loss"][2]  # weights, moments and batch
    assert one.metrics["final"]["loss"] == pytest.approx(other.metrics["final"]["loss"], abs=1e-3)
    write_profile(root, BRANCHED.replace("run: origin", "run: nobody"))
    with pytest.raises(ConfigurationError, match=r"arm linear, branch.run: got 'nobody', an arm of which .* have 0 runs"):
        configurations("x", "tiny", root)


# --- what leaves the store

@pytest.mark.parametrize("changes", [{}, IMAGES], ids=["text", "images"])
def test_an_exported_model_works_without_data_and_store(changes, root, tmp_path):
    store = Store("x", root)
    run = store.run(config(**changes, keep=(2,)))
    inputs = run.task().batch(0)[0][:2]
    model, early = run.model(), run.model(2)
    with torch.no_grad():
        expected = model.predict(model.block.output(run.config.solver.settle(model.block, model.clamp(inputs)).value))
    text = run.generate("The king", 12) if run.task().vocabulary else None
    path = run.export(tmp_path / "shared" / "mine.safetensors")
    run.export(tmp_path / "early.safetensors", step=2)
    shutil.rmtree(root)
    found = eplib.load(path)
    assert found.config == run.config and found.step == run.config.steps
    assert torch.equal(found.predict(inputs), expected) and not found.predict(inputs).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(eplib.load(tmp_path / "early.safetensors").model.parameters(),
                                                 early.parameters(), strict=True))
    if text:
        assert found.generate("The king", 12) == text and load_file(path).keys() == model.state_dict().keys()
        with pytest.raises(data.DataError, match="cannot encode '€'"):
            found.generate("€", 1)
    else:
        with pytest.raises(ValueError, match="was not trained on text"):
            found.generate("The king", 1)


def test_what_is_no_trained_model_is_refused_with_what_it_lacks(recorded, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        eplib.load(path)
    save_file({"readout.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"no trained model: its header lacks config, signal, step, vocabulary; Run.export"):
        eplib.load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x.safetensors is damaged"):
        eplib.load(path)
    found = recorded[1].trained()
    header = {"config": plain(found.config) | {"speed": 3}, "step": 2, "signal": plain(found.signal), "vocabulary": None}
    checkpoints.write(path, found.model.state_dict(), header)
    with pytest.raises(ConfigurationError, match="speed: Unexpected"):
        eplib.load(path)
    checkpoints.write(path, {"other": torch.zeros(2)}, header | {"config": plain(found.config)})
    with pytest.raises(ValueError, match=r"another model than its header describes .*other"):
        eplib.load(path)


def test_a_file_imports_no_module_that_it_names_unless_it_may(recorded, tmp_path, monkeypatch):
    found, path, module = recorded[1].trained(), tmp_path / "x.safetensors", tmp_path / "unheard.py"
    module.write_text("from eplib import config, solvers\n@config.configuration\nclass Own(solvers.Relaxation):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    values = plain(found.config) | {"solver": plain(solvers.Relaxation()) | {"kind": "unheard:Own"}}
    header = {"config": values, "step": 2, "signal": plain(found.signal), "vocabulary": None}
    checkpoints.write(path, found.model.state_dict(), header)
    try:
        with pytest.raises(ConfigurationError, match=r"has classes of unheard, .*first, or give plugins=True"):
            eplib.load(path)
        assert "unheard" not in sys.modules
        assert type(eplib.load(path, plugins=True).config.solver).__name__ == "Own"
        assert eplib.load(path).config.solver.kind == "unheard:Own"  # imported now
    finally:
        solvers.Solver.members.pop("unheard:Own", None)
        sys.modules.pop("unheard", None)


# --- text

def test_text_is_generated_from_a_checkpoint_and_travels_with_a_run_whose_profile_asks_for_it(recorded, root, monkeypatch):
    _, run, wanted = recorded
    assert run.sample is None  # profile x asks for none
    drawn = run.generate("The king", 12)
    assert drawn == run.generate("The king", 12) and len(drawn) == 20 and drawn.startswith("The king")
    assert len({run.generate("The king", 12, seed=seed) for seed in range(3)}) > 1
    assert run.generate("The king", 12, temperature=1e-6, step=1) != drawn
    greedy = {run.generate("The king", 12, temperature=0, seed=seed) for seed in range(2)}
    likeliest = {run.generate("The king", 12, seed=seed, top_k=1) for seed in range(2)}
    assert greedy == likeliest and len(greedy) == 1
    with pytest.raises(data.DataError, match="cannot encode '€'"):
        run.generate("€", 1)
    asking = root / "pipelines" / "profiles" / "y.yaml"
    asking.write_text("profile: y\nsample: 12\nruns: {}\n")
    travelled = Store("y", root).run(wanted)
    shutil.rmtree(travelled.weights_folder)
    assert travelled.sample == drawn
    (travelled.folder / "metrics.json").unlink()
    assert Store("y", root).run(wanted).sample == drawn
    shutil.rmtree(travelled.weights_folder)
    with pytest.raises(FileNotFoundError, match="train the run here"):
        travelled.generate()


def test_the_horizon_of_bptt_is_measured_where_the_weights_are_and_travels_with_the_run(root, monkeypatch, capsys):
    store, wanted = Store("x", root), configurations("x", "tiny", root)[0]
    run = store.run(wanted)
    assert run.recorded_horizon is None
    near, far = run.horizon((1, 60))
    assert (near["steps"], far["steps"]) == (1, 60) and far["settled"] < 1e-5
    assert far["cosine"] > 1 - 1e-6 and abs(far["ratio"] - 1) < 1e-4 and far["residual"] < 1e-5  # long: the settled gradient
    assert near["residual"] > 100 * far["residual"] and near["cosine"] < far["cosine"]
    monkeypatch.setattr(horizon, "Store", lambda profile: Store(profile, root))
    monkeypatch.setattr(horizon, "load_profile", lambda profile: profiles.load_profile(profile, root))
    ask = ["--profile", "x", "--experiment", "tiny", "--steps"]
    assert horizon.main([*ask, "1", "60"]) == 0 and run.recorded_horizon == [near, far]
    assert horizon.main([*ask, "2"]) == 0 and run.recorded_horizon == [near, far]  # what is recorded stays
    assert "steps 60" in (shown := capsys.readouterr().out) and "recorded before at other horizons" in shown
    shutil.rmtree(run.weights_folder)
    assert run.recorded_horizon == [near, far]
    with pytest.raises(FileNotFoundError, match="train the run here"):
        run.horizon((1,))
    assert horizon.main([*ask, "1"]) == 1 and "no recorded run of tiny" in capsys.readouterr().err
    for wrong, said in ((["0"], "at least one step; got 0"), (["1", "--experiment", "none"], "has no runs for 'none'")):
        assert horizon.main([*ask, *wrong]) == 2 and said in capsys.readouterr().err
    (run.folder / "metrics.json").unlink()  # trained again: the old weights' horizon does not stay with the new ones
    assert store.run(wanted).recorded_horizon is None


def test_what_never_ran_has_not_stayed_stable():
    runs = [SimpleNamespace(metrics={"excursions": count}) for count in (0, 3)]
    assert records.excursions(runs) == 3 and records.excursions(runs[:1]) == 0
    assert records.excursions([]) is None
    assert records.excursions(runs[:1], absent=["thin"]) is None and records.excursions(runs, absent=["thin"]) == 3
