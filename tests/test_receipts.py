"""What a run leaves behind and how it is checked: the state of git, reference values, receipts, times, the page ARTIFACT.md."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from eplib import profiles, tasks
from pipelines import artifact, cells, claims, close, common, estimate, expected, plan, verify
from pipelines import tolerance as tolerances

ROOT = common.ROOT


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


# --- what git shows after a run ---

LOCK = {"schema": "2.0", "stages": {
    "train": {"cmd": "train", "deps": [{"path": "results/quick/sources/stages/train.json", "md5": "a"}],
              "outs": [{"path": "results/quick/runs/mnist", "md5": "b"}]},
    "notebook-mnist": {"cmd": "run", "deps": [{"path": "results/quick/sources/mnist.json", "md5": "c"},
                                              {"path": "results/quick/runs/mnist", "md5": "b"}],
                       "outs": [{"path": "results/quick/mnist", "md5": "d"}]}}}


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with one lock file."""
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(LOCK))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "dvc.lock")
    git(tmp_path, "commit", "--quiet", "-m", "a lock")
    return tmp_path


def after(checkout: Path, **md5: str) -> str:
    """What is said where outputs and inputs of these paths have other digests."""
    text = (checkout / "dvc.lock").read_text()
    for old, new in md5.items():
        text = text.replace(f"md5: {old}", f"md5: {new}")
    (checkout / "dvc.lock").write_text(text)
    return "\n".join(close.git_lines("quick", checkout))


def test_a_run_that_changes_nothing_says_so(checkout, tmp_path_factory):
    assert close.git_lines("quick", checkout) == ["git      nothing has changed"]
    assert close.git_lines("quick", tmp_path_factory.mktemp("no-checkout")) == []


def test_a_changed_lock_is_explained_stage_by_stage(checkout):
    said = after(checkout, b="z")
    assert f"{close.BYTES}: train\n" in said and f"{close.UPSTREAM}: notebook-mnist\n" in said and close.CODE not in said
    said = after(checkout, a="y")
    assert f"{close.CODE}: train\n" in said and f"{close.UPSTREAM}: notebook-mnist\n" in said and close.BYTES not in said
    (checkout / "mine.py").touch()
    assert "changed: dvc.lock, mine.py" in after(checkout)


# --- how values compare ---


def over_seeds(mean: float, half: float | None, n: int = 3) -> dict:
    """A mean over seeds and its interval, as results files hold them."""
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half, "n": n}


@pytest.mark.parametrize(
    ("reference", "found", "tolerance", "word"),
    [
        (0.99999, 0.99999, "12 digits", "equal"),
        (0.999990, 0.999991, "5 digits", "within"),
        (0.999990, 0.999991, "7 digits", "differs"),
        (0.99999, None, "5 digits", "differs"),
        (0.99999, float("nan"), "5 digits", "differs"),
        (7, 8, "±1", "within"),
        (7, 9, "±1", "differs"),
        (3e-9, 9e-9, "order of magnitude", "within"),
        (3e-9, -3e-9, "order of magnitude", "differs"),
        (3e-9, 3e-7, "order of magnitude", "differs"),
        ("EP", "BPTT", "exact", "differs"),
        (True, 1, "exact", "differs"),
        ("1.23e-4 of 5", "1.24e-4 of 5", "1 digits", "within"),
        ("1.23e-4 of 5", "1.24e-4 in 5", "1 digits", "differs"),
        (2.0, 2.1, "statistical", "within"),
        (2.0, 2.5, "statistical", "not decided"),
        (2.0, None, "statistical", "differs"), ("EP", "BPTT", "statistical", "differs"),
        ({"value": 1.0, "n": 48}, {"value": 1.2, "n": 48}, "statistical", "not decided"),
        (over_seeds(1.0, 0.2), over_seeds(1.3, 0.2), "statistical", "within"),
        (over_seeds(1.0, 0.2), over_seeds(1.5, 0.2), "statistical", "differs"),
        (over_seeds(1.0, None, 1), over_seeds(3.0, None, 1), "statistical", "not decided"),
        (over_seeds(1.0, 0.2), over_seeds(1.0, 0.2, 2), "9 digits", "differs"),
    ],
)
def test_two_values_compare_as_their_class_says(reference, found, tolerance, word):
    assert tolerances.compare(reference, found, tolerance) == word


def test_the_digits_that_survive_are_counted_and_one_is_taken_off():
    assert tolerances.surviving(1.0, 1.0 + 3e-6) == "4 digits"
    assert tolerances.surviving(1.0, 1.0) == "12 digits"
    assert tolerances.surviving(3, 5) == "±4" and tolerances.surviving(3, 3) == "±1"
    assert tolerances.surviving(1e-9, 3e-9) == "order of magnitude" and tolerances.surviving(1e-9, -3e-9) == "statistical"
    assert tolerances.surviving("EP", "EP") == "exact" and tolerances.surviving(1.0, None) == "statistical"


def test_every_leaf_of_a_results_file_has_one_place_and_a_class():
    table = {"title": "A", "columns": ["arm", "loss"], "rows": [["EP", 0.5]], "gap": over_seeds(1.0, 1.0)}
    values = expected.places({"mnist/T2.json": table})
    keys = ("title", "columns.0", "columns.1", "rows.0.0", "rows.0.1", "gap")
    assert list(values) == [f"mnist/T2.json: {key}" for key in keys]
    one = expected.Reference("quick", digits={"mnist/T2.json: rows.0.1": "3 digits"})
    assert {one.tolerance(f"mnist/T2.json: {key}") for key in ("title", "columns.1")} == {"exact"}
    assert one.tolerance("mnist/T2.json: rows.0.1") == "3 digits" and one.tolerance("mnist/T2.json: gap") == "statistical"


# --- estimated times ---

RUNS = """
profile: quick
runs:
  toy:
    - common: {data: {kind: Text, corpus: plays}, model: {width: 8, heads: 2, context: 8, block: {kind: Thick}},
               estimator: {kind: DyadicEP}}
      arms: {ep: {steps: 100}, held: {steps: 200}, longer: {steps: 100}}
  other:
    - common: {data: {kind: Text, corpus: plays}, model: {width: 8, heads: 2, context: 8, block: {kind: Thick}},
               estimator: {kind: DyadicEP}, steps: 10}
      arms: {ep: }
"""


@pytest.fixture
def timed(tmp_path):
    """A root whose runs toy/ep and toy/held are recorded: 13 s with evaluations, and 20 s of steps alone."""
    common.write_text(tmp_path / "pipelines" / "profiles" / "quick.yaml", RUNS)
    ep, held, _ = profiles.configurations("quick", "toy", tmp_path)
    for config, times in ((ep, {"wall": 13.0, "seconds": 9.0, "sessions": 1}), (held, {"seconds": 20.0, "sessions": 2})):
        machine = {"processor": "P", "gpu": None, "device": "cpu"} | times
        place = tmp_path / "results" / "quick" / "machine" / "runs" / "toy" / profiles.run_folder(config) / "machine.json"
        common.write_text(place, json.dumps(machine))
    return tmp_path


def test_a_runs_time_is_the_recorded_one_else_that_of_its_likes_by_the_step(timed):
    ep, held, longer = profiles.configurations("quick", "toy", timed)
    [other] = profiles.configurations("quick", "other", timed)
    twice = dataclasses.replace(ep, steps=200)
    found = estimate.seconds_of([ep, held, twice, longer, other], "quick", timed)
    assert [one and one.seconds for one in found] == pytest.approx([13.0, 26.0, 26.0, 13.0, None])
    assert {one.processor for one in found if one} == {"P"}


def test_the_table_scales_the_times_of_the_reference_machine_and_says_what_is_unknown(timed, monkeypatch):
    monkeypatch.setattr(estimate, "calibrate", lambda: {"torch": 0.5})
    configs = [*profiles.configurations("quick", "toy", timed), *profiles.configurations("quick", "other", timed)]
    said = estimate.table(configs, 2, "quick", timed, {"mnist": 120.0})
    assert "not calibrated" in said and "train other: 1 runs, 1 of unknown time" in said
    reference = {"machine": {"processor": "P"}, "calibration": {"torch": 0.4, "compiled": 0.1}}
    common.write_text(timed / "results" / "reference" / "quick.json", json.dumps(reference))
    said = estimate.table(configs, 2, "quick", timed, {"mnist": 120.0})
    assert "takes 5.00 of the time of P" in said  # no kernel here, the compiled one there
    rows = {line[2:50].strip(): line[50:].split() for line in said.splitlines()[2:]}
    assert rows["train toy: 3 runs"] == ["0.4", "2.2"] and rows["notebook mnist"] == ["2.0", "10.0"]


def test_nothing_to_do_is_said_at_once(timed, monkeypatch):
    monkeypatch.setattr(estimate, "calibrate", lambda: pytest.fail("nothing is to be calibrated for"))
    assert estimate.table([], 2, "quick", timed) == "estimate: nothing to train and no notebook to run"


def test_what_was_never_recorded_is_measured_by_its_first_steps(timed, monkeypatch):
    found = estimate.unrecorded("quick", timed)  # what has a time has no record in a store here
    rows = estimate.measured(found, timed)["rows"]  # no text lies there
    assert sorted(row[:4] for row in rows) == [["other", 1, 1, 10], ["toy", 3, 3, 400]] and {row[4] for row in rows} == {None}
    monkeypatch.setattr(estimate, "FIRST_SECONDS", 0.01)
    path = timed / "text.txt"
    path.write_text("a text of one's own, and another " * 30)
    longer = next(config for config in found if config.arm == "longer")
    own = dataclasses.replace(longer, data=tasks.Text(path=str(path), validation=0.2))
    [row] = estimate.measured([own, longer], timed)["rows"]
    assert row[:4] == ["toy", 2, 1, 200] and 0 <= row[4] < 1 and row[5] == "longer"


def test_the_table_of_hours_is_brought_up_to_what_was_recorded_since(timed):
    found = estimate.unrecorded("quick", timed)
    table = {"title": "hours", "rows": [["toy", 3, 0, 400, 4.0, "longer", 0.1], ["other", 1, 1, 10, None, None, None],
                                        ["whole", 2, 0, 50, 1.0, "ep", 0.1]]}
    toy = [config for config in found if config.experiment == "toy"]
    rest = [config for config in found if config is not toy[0]]
    now = 400 - toy[0].steps
    assert estimate.left(table, rest)["rows"] == [["toy", 2, 0, now, 4.0 * now / 400, "longer", 0.1],
                                                  ["other", 1, 1, 10, None, None, None]]
    with pytest.raises(common.PipelineError, match="run --measure"):
        estimate.hours_of("a-profile-of-nobody")


def test_make_paper_prepares_the_data_of_the_runs_whose_weights_are_in_git():
    [named] = [line.split()[2:] for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("RECORDED :=")]
    listed = subprocess.run(["git", "ls-files", "results/paper/weights"], cwd=ROOT, capture_output=True, text=True, check=True)
    weights = {"/".join(Path(line).parts[3:5]) for line in listed.stdout.splitlines()}
    assert weights and sorted(named) == verify.data_of(
        config for config in verify.weighted(plan.Plan("paper", ROOT)) if verify.place(config) in weights)


# --- make verify, with an estimator that is right and one that is broken ---

E1 = """\
import eplib, torch
from eplib import estimators
from eplib.diagnostics import LinearSystem
from eplib.solvers import Relaxation
from eplib.store import records
free, nudged = Relaxation(step=0.5, max_steps=4000, tol=1e-12), Relaxation(step=0.5, max_steps=4000, tol=1e-10)
drive, goal = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
found = []
for t in (0.2, 0.4):
    matrix = torch.diag(torch.linspace(-1.5, -0.8, 6, dtype=torch.float64)) + t * torch.ones(6, 6, dtype=torch.float64).triu(1)
    system = LinearSystem(matrix, torch.eye(6, dtype=torch.float64))
    exact = system.closed_form(drive, goal)["inflow"].flatten()
    for estimator in (estimators.AsymEP(beta=1e-3), estimators.VectorField(beta=1e-3)):
        grad = eplib.gradient(system, drive, goal, estimator=estimator, solver=free, nudged=nudged).grads["inflow"].flatten()
        found.append((torch.cosine_similarity(grad, exact, dim=0).item(), (grad.norm() / exact.norm()).item()))
ep, field = found[::2], found[1::2]
records.save_result(profile, "gradients", "summary", {
    "ep_cosine_min": ep[0][0], "ep_norm_ratio_error": abs(ep[0][1] - 1), "rho_corrected_cosine_min": ep[1][0],
    "vectorfield_cosine_trained": field[1][0]})"""


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """A checkout whose E1 is a linear system with a closed form, and the reference values of one run of it."""
    root = tmp_path_factory.mktemp("laboratory")
    for name in ("eplib", "pipelines", "paper"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.partial"))
    shutil.copy(ROOT / ".gitignore", root)
    parameters = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": 'profile = "quick"'}
    notebook = {"cells": [parameters, {"cell_type": "code", "source": E1}]}
    common.write_text(root / "notebooks" / "gradients.ipynb", cells.stripped(notebook))
    common.write_text(root / "pipelines" / "profiles" / "quick.yaml", "profile: quick\nnotebooks: {gradients: }\n")
    git(root, "init", "--quiet")
    assert verify.rerun("quick", ["gradients"], root) == {}
    found = expected.gather("quick", root)
    digits = {place: "6 digits" for place in found.leaves("gradients")}
    common.write_text(expected.path_of("quick", root), expected.text_of(dataclasses.replace(found, digits=digits)))
    return root


def receipt_of(root: Path) -> tuple[int, dict]:
    code = verify.verify("quick", None, root)
    return code, json.loads((root / "paper" / "build" / "quick" / "receipt.json").read_text())


def test_a_second_run_on_one_machine_is_equal_in_every_value(laboratory):
    code, receipt = receipt_of(laboratory)
    assert code == 0 and receipt["agrees"] and receipt["counts"] == {"equal": 4}


def test_a_correction_that_is_a_tenth_too_small_turns_the_claims_that_rest_on_it_red(laboratory, capsys):
    path = laboratory / "eplib" / "estimators" / "nudged.py"
    right = path.read_text()
    assert right.count("sign * asymmetric(") == 1
    path.write_text(right.replace("sign * asymmetric(", "0.9 * sign * asymmetric("))
    try:
        code, receipt = receipt_of(laboratory)
    finally:
        path.write_text(right)
    words = {claim["id"]: claim["word"] for claim in receipt["claims"]}
    red = {"gradient-direction", "gradient-length", "gradient-rho"}
    assert code == 1 and not receipt["agrees"] and {name for name, word in words.items() if word == "differs"} == red
    assert words["gradient-vector-field"] == "equal", "the uncorrected field has no correction to break"
    assert words["mnist-accuracy"] == "not here"
    assert "claim    gradient-direction: " in capsys.readouterr().out
    page = (laboratory / "paper" / "build" / "quick" / "receipt.html").read_text()
    assert "gradients/summary.json: ep_cosine_min" in page and '<span class="word differs">differs</span>' in page


def test_a_stage_that_fails_is_no_agreement(laboratory):
    path = laboratory / "notebooks" / "gradients.ipynb"
    right = path.read_text()
    path.write_text(right.replace("import eplib, torch", "raise ValueError"))
    try:
        code, receipt = receipt_of(laboratory)
    finally:
        path.write_text(right)
    assert code == 1 and receipt["failed"] == {"gradients": "the notebook ended with an error"}
    assert receipt["counts"] == {"missing": 4}


# --- the page of claims, commands, times and numbers ---


def test_the_page_and_readmes_table_are_those_of_the_claims_and_reference_values():
    assert artifact.out_of_date() == [], "run `python -m pipelines.artifact --write`"
    page = (ROOT / "ARTIFACT.md").read_text()
    stages = {name for profile in ("quick", "paper") for name in plan.Plan(profile, ROOT).notebooks}
    for claim in claims.load():
        assert f"| **{claim['id']}** {claim['text']} |".replace("|·|", "absolute value") in page
        assert claim["value"]["file"].split("/")[0] in stages
    assert all(f"\n| {name} | " in page for name in stages)


def test_a_readme_without_a_place_for_the_claims_is_refused(laboratory):
    (laboratory / "README.md").write_text("# Mine\n")
    shutil.copy(ROOT / "pipelines" / "profiles" / "paper.yaml", laboratory / "pipelines" / "profiles")
    with pytest.raises(common.PipelineError, match=r"0 places .* written by python -m pipelines.artifact"):
        artifact.pages(laboratory)
