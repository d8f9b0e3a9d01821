"""The notebook runner, the notebooks in git and the DVC stages."""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eplib import log, markup, plotting, profiles, settings
from eplib.config import ConfigurationError
from eplib.store import records
from pipelines import cells, common, imports, new, notebook, plan, stages
from pipelines.common import PipelineError

ROOT = common.ROOT
PARAMETERS = 'profile = "quick"\ncount = 3\nrate = 1.0e-3\nnames = ["a"]\nflag = False'
CELL = """\
import os, pathlib, sys
here = pathlib.Path("results") / profile / "toy"
print("to standard output", object()); print("to standard error", file=sys.stderr); print("again")
if flag: raise ValueError("as asked")
(here / "value.json").write_text(str(count))
{"memory address": object()}"""


def made_of(*code: str) -> dict:
    """A notebook as JupyterLab might save it: a title, the parameters cell, then `code`."""
    made = [
        {"cell_type": "markdown", "id": "x1", "metadata": {}, "source": ["# Toy\n", "\n", "With $a^2$."]},
        {
            "cell_type": "code",
            "id": "x2",
            "metadata": {"tags": ["parameters"]},
            "source": PARAMETERS,
            "execution_count": 1,
            "outputs": [],
        },
    ]
    made += [
        {"cell_type": "code", "id": f"y{i}", "metadata": {}, "source": text, "execution_count": None, "outputs": []}
        for i, text in enumerate(code)
    ]
    return {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def tree(tmp_path):
    """A root folder with one notebook `toy` and a profile `quick`."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "toy.ipynb").write_text(cells.stripped(made_of(CELL)))
    set_profile(tmp_path, {"count": 5})
    return tmp_path


def set_profile(root: Path, values: dict) -> None:
    common.write_text(
        root / "pipelines" / "profiles" / "quick.yaml",
        yaml.safe_dump({"profile": "quick", "notebooks": {"toy": values}}),
    )


def execute(root: Path) -> Path:
    cells.write_source("toy", "quick", root)
    return notebook.run("toy", "quick", root)


# --- parameters ---


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cuont": 3}, ["'cuont'", "3", "count, flag, names, rate"]),
        ({"count": "3"}, ["count", "'3'", "string", "allowed is int"]),
        ({"count": True}, ["count", "True", "bool", "allowed is int"]),
        ({"count": 2.5}, ["count", "2.5", "float"]),
        ({"rate": "1e-3"}, ["rate", "'1e-3'", "1.0e-3"]),
        ({"flag": 0}, ["flag", "0", "allowed is bool"]),
        ({"names": ["a", 1]}, ["names", "['a', 1]", "list of string"]),
        ({"profile": "paper"}, ["profile"]),
    ],
)
def test_wrong_parameter_is_refused_with_key_value_and_what_is_allowed(tree, values, words):
    set_profile(tree, values)
    with pytest.raises(PipelineError) as caught:
        execute(tree)
    assert all(word in str(caught.value) for word in ["quick.yaml, notebooks.toy", *words]), caught.value
    assert not (tree / "results" / "quick" / "notebooks").exists()


def test_an_integer_may_stand_for_a_float_and_the_profile_is_injected(tree):
    source = cells.normalise("toy", cells.load_notebook("toy", tree))
    assert cells.validated(source, {"rate": 1}, "quick") == {"profile": "quick", "rate": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [("profile = 'a'\nn = f()", "literal"), ("n = 1", "`profile`"), ("profile = 'a'\nfor i in (): pass", "line 2")],
)
def test_a_parameters_cell_that_cannot_be_checked_is_refused(text, words):
    source = {"notebook": "toy", "cells": [{"cell_type": "code", "source": text, "tags": ["parameters"]}]}
    with pytest.raises(PipelineError, match=words):
        cells.validated(source, {}, "quick")


def test_unknown_notebook_and_profile_are_named_with_those_there_are(tree):
    with pytest.raises(PipelineError, match=r"'tyo'.*toy"):
        cells.load_notebook("tyo", tree)
    with pytest.raises(PipelineError, match=r"'qiuck'.*quick"):
        common.load_profile("qiuck", tree)


# --- execution ---


def test_two_executions_are_byte_identical_and_a_failure_keeps_the_last_good_one(tree):
    target = execute(tree)
    first = target.read_bytes()
    executed = json.loads(first)
    assert [cell["id"] for cell in executed["cells"]] == ["cell-01", "cell-02", "cell-03", "cell-04"]
    assert executed["cells"][2]["source"][1:3] == ['profile = "quick"\n', "count = 5\n"]
    streams = [output for output in executed["cells"][3]["outputs"] if output["output_type"] == "stream"]
    assert [stream["name"] for stream in streams] == ["stdout", "stderr"]
    assert execute(tree).read_bytes() == first

    value = tree / "results" / "quick" / "toy" / "value.json"
    assert value.read_text() == "5"
    set_profile(tree, {"count": 6, "flag": True})
    with pytest.raises(PipelineError) as caught:
        execute(tree)
    assert "ValueError: as asked" in str(caught.value) and len(str(caught.value).splitlines()) == 2
    failed = target.with_name("toy.failed.ipynb")
    assert "as asked" in failed.read_text()
    assert target.read_bytes() == first and value.read_text() == "5"
    assert sorted(p.name for p in (tree / "results" / "quick").iterdir()) == ["machine", "notebooks", "sources", "toy"]


def test_an_interrupted_run_leaves_no_kernel_and_no_half_result(tree):
    slow = 'import os, pathlib, time\npathlib.Path("pid").write_text(str(os.getpid())); time.sleep(60)'
    (tree / "notebooks" / "toy.ipynb").write_text(cells.stripped(made_of(slow)))
    cells.write_source("toy", "quick", tree)
    old = tree / "results" / "quick" / "toy" / "value.json"
    common.write_text(old, "before")
    code = (
        f"import pathlib, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from pipelines import notebook; notebook.run('toy', 'quick', pathlib.Path({str(tree)!r}))"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not (tree / "pid").exists() or not (tree / "pid").read_text():
        assert time.monotonic() - began < 30 and runner.poll() is None, "the kernel did not start"
        time.sleep(0.1)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tree / "pid").read_text()), 0)
    assert old.read_text() == "before"
    assert not (tree / "results" / "quick" / "notebooks").exists() and not list(tree.rglob("*.previous"))


# --- notebooks in git ---


def test_every_notebook_is_in_git_as_it_should_be():
    listed = subprocess.run(["git", "ls-files", "notebooks/*.ipynb"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [Path(name).stem for name in listed.stdout.split()]  # others are the reader's own
    assert names, "there is no notebook in notebooks/"
    assert {name: problems for name in names if (problems := cells.problems(name))} == {}


def test_no_notebook_uses_a_name_that_it_does_not_define_or_imports_one_that_it_does_not_use():
    for name in common.notebook_names():
        code = ast.unparse(imports.code_of(cells.normalise(name, cells.load_notebook(name))))
        done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--output-format=concise",
                               "--config", 'builtins=["display"]', "-"], input=code, capture_output=True, text=True)
        assert done.returncode == 0, f"notebooks/{name}.ipynb: {done.stdout}{done.stderr}"


def test_strip_drops_outputs_and_check_sees_them(tree):
    saved = made_of(CELL)
    saved["cells"][2] |= {"execution_count": 7, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["x"]}]}
    (tree / "notebooks" / "toy.ipynb").write_text(json.dumps(saved))
    assert "outputs" in cells.problems("toy", tree)[0]
    assert cells.strip("toy", tree) and not cells.strip("toy", tree)
    assert cells.problems("toy", tree) == []


def test_saving_outputs_does_not_change_the_normalised_copy_and_an_edit_does(tree):
    before = cells.write_source("toy", "quick", tree).read_bytes()
    saved = made_of(CELL, "")  # JupyterLab adds an empty cell when the last one is run with Shift-Enter
    saved["cells"][2] |= {"execution_count": 7, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["x"]}]}
    (tree / "notebooks" / "toy.ipynb").write_text(json.dumps(saved))
    assert cells.write_source("toy", "quick", tree).read_bytes() == before
    (tree / "notebooks" / "toy.ipynb").write_text(json.dumps(made_of(CELL + "\n1 + 1")))
    assert cells.write_source("toy", "quick", tree).read_bytes() != before


@pytest.mark.parametrize(("stage", "expected"), [(None, ["source", "run"]), ("notebook-toy", ["run"])])
def test_by_hand_a_notebook_runs_as_it_is_now_and_a_stage_what_it_depends_on(stage, expected, monkeypatch):
    called = []
    monkeypatch.setattr(notebook, "write_source", lambda *of: called.append("source"))
    monkeypatch.setattr(notebook, "run", lambda *of: called.append("run"))
    monkeypatch.setattr(notebook.signal, "signal", lambda *of: None)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    if stage:
        monkeypatch.setenv("DVC_STAGE", stage)
    assert notebook.main(["run", "toy", "--profile", "quick"]) == 0 and called == expected


def test_the_save_hook_of_jupyter_drops_only_empty_cells_at_the_end():
    model = {"type": "notebook", "content": made_of("1", "", "2", "", " \n")}
    notebook.drop_empty_end(model, path="x", contents_manager=None)
    assert [cell["source"] for cell in model["content"]["cells"][2:]] == ["1", "", "2"]


# --- stages ---


def test_the_pipeline_files_are_what_the_generator_makes():
    assert stages.out_of_date(["quick", "paper"]) == []


def loaded(statement: str) -> set[str]:
    """The files of this repository that Python itself loads for a statement."""
    listing = "import sys\nfor m in list(sys.modules.values()): print(getattr(m, '__file__', None) or '')"
    code = f"{statement}\n{listing}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = (Path(line) for line in done.stdout.splitlines())
    return {
        str(path.relative_to(ROOT))
        for path in paths
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in imports.PACKAGES
    }


def test_every_stage_depends_on_the_code_that_it_loads():
    decides = plan.Plan("quick", ROOT).decides()
    for stage in ("data", "train", "claims", "paper", "report"):
        assert loaded(f"import pipelines.{stage}") <= set(decides[stage]["code"]), stage
    for name in common.planned(common.load_profile("quick")):
        source = cells.normalise(name, cells.load_notebook(name))
        lines = [node for node in ast.walk(imports.code_of(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        files = loaded("\n".join(ast.unparse(line) for line in lines))
        assert files <= set(decides[f"notebook-{name}"]["code"]), name


@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_what_notebooks_read_of_runs_is_what_the_training_stage_makes(profile):
    made, groups = stages.build(profile)["stages"], common.load_profile(profile)["runs"]
    trained = {path for entry in made["train"]["outs"] for path in entry}
    runs = tuple(f"results/{profile}/{kind}/" for kind in ("runs", "weights"))
    assert trained == {f"{place}{group}" for place in runs for group in groups}
    assert {path for stage in made.values() for path in stage.get("deps", ()) if path.startswith(runs)} <= trained


def test_starting_a_notebook_stage_builds_no_grammars():
    """rfc3987_syntax would build 38 of them at import, with lark: seconds, in every stage."""
    code = ("import sys\nfrom pipelines import kernel\nkernel.to_nbformat({'cells': []})\n"
            "import papermill, nbconvert\nprint('lark' in sys.modules, 'jsonschema' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_imports_are_found_in_every_form(tmp_path):
    package = tmp_path / "eplib"
    package.mkdir()
    (package / "__init__.py").write_text('_LAZY = {"gradient": "estimators"}\n')
    (package / "estimators.py").write_text("from .solvers import solve\n")
    (package / "solvers.py").write_text("import numpy\ndef solve():\n    from eplib import late\n")
    for name in ("late", "plotting", "unused"):
        (package / f"{name}.py").write_text("")

    def found(code: str) -> list[str]:
        return [Path(p).stem for p in imports.closure(imports.imports(ast.parse(code), None, tmp_path), tmp_path)]

    assert found("import eplib as e\ne.gradient(1)") == ["__init__", "estimators", "late", "solvers"]
    assert (
        found("import eplib.plotting")
        == found("from eplib import plotting")
        == found("import eplib\neplib.plotting.save")
        == ["__init__", "plotting"]
    )
    assert found("from eplib.solvers import solve") == ["__init__", "late", "solvers"]


@pytest.fixture
def repository(tree, monkeypatch):
    """The tree with the pipeline's own code, in git and DVC, as the current folder."""
    for folder, names in {"pipelines": [path.name for path in (ROOT / "pipelines").glob("*.py")],
                          "eplib": ["__init__.py", "files.py", "settings.py", "sources.py"]}.items():
        (tree / folder).mkdir(exist_ok=True)
        for name in names:
            shutil.copy(ROOT / folder / name, tree / folder)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    common.write_text(tree / ".dvc" / "config", "[core]\n    analytics = false\n    check_update = false\n")
    common.write_text(tree / ".dvcignore", "__pycache__\n")
    common.write_text(tree / "dvc.yaml", stages.text_of("quick", tree))
    monkeypatch.chdir(tree)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return tree


def reproduced(*targets: str) -> list[str]:
    """The stages that DVC runs in the current folder."""
    from dvc.repo import Repo

    with Repo(".") as repo:
        return [stage.name for stage in repo.reproduce(targets=list(targets) or None)]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")
def test_dvc_runs_a_notebook_again_for_an_edited_cell_and_not_for_saved_outputs(repository):
    path = repository / "notebooks" / "toy.ipynb"
    assert reproduced("notebook-toy") == ["sources", "notebook-toy"]
    assert reproduced("notebook-toy") == []

    saved = json.loads(path.read_text())
    saved["cells"][2] |= {
        "execution_count": 7,
        "outputs": [{"output_type": "stream", "name": "stdout", "text": ["a\tb\x1b[0m"]}],
    }
    saved["metadata"]["toc"] = {"a": 1}
    path.write_text(json.dumps(saved, indent=1))
    assert reproduced("notebook-toy") == ["sources"]
    saved["cells"].append({**saved["cells"][2], "source": ["2 + 2"]})
    path.write_text(json.dumps(saved, indent=1))
    assert reproduced("notebook-toy") == ["sources", "notebook-toy"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")
def test_dvc_runs_nothing_but_the_digests_for_a_comment_a_docstring_or_a_notebook_of_the_readers_own(repository):
    assert reproduced("notebook-toy") == ["sources", "notebook-toy"]
    edit(repository / "pipelines" / "kernel.py", '"""A fresh notebook', '# to be read\n    """A fresh, new notebook')
    (repository / "notebooks" / "Untitled.ipynb").write_text("not even a notebook")
    assert reproduced("notebook-toy") == ["sources"]
    edit(repository / "pipelines" / "kernel.py", "def short_folder", "THREE = 3\n\n\ndef short_folder")
    assert reproduced("notebook-toy") == ["sources", "notebook-toy"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")
def test_dvc_stops_with_the_remedy_where_the_pipeline_file_lacks_a_new_group_of_runs(repository, capfd):
    from dvc.exceptions import ReproductionError

    reproduced("sources")
    before = cells.source_path("toy", "quick", repository).read_bytes()
    with (repository / "pipelines" / "profiles" / "quick.yaml").open("a") as file:
        file.write("runs:\n  mine: [{arms: {a: {}}}]\n")
    with pytest.raises(ReproductionError):
        reproduced("notebook-toy")
    assert "python -m pipelines.stages --write" in capfd.readouterr().err
    assert cells.source_path("toy", "quick", repository).read_bytes() == before
    common.write_text(repository / "dvc.yaml", stages.text_of("quick", repository))
    assert reproduced("sources") == ["sources"]


def test_a_pipeline_file_that_is_written_anew_takes_stages_that_are_no_more_out_of_its_lock(tree):
    kept = {"sources": {"cmd": "python"}, "source-toy": {"cmd": "python", "params": {"a": "a" * 200}}}
    common.write_text(tree / "dvc.lock", yaml.safe_dump({"schema": "2.0", "stages": kept}))
    stages.write("quick", tree)
    assert common.load_yaml(tree / "dvc.lock") == {"schema": "2.0", "stages": {"sources": {"cmd": "python"}}}
    assert stages.out_of_date(["quick"], tree) == []


def test_the_runs_of_a_profile_decide_training_and_their_looks_only_the_notebooks(tree):
    def decided(label: str, damping: float) -> dict:
        runs = {"toy": [{"arms": {"a": {"label": label, "model": {"damping": damping}}}}]}
        profile = {"notebooks": {"toy": {}}, "runs": runs}
        common.write_text(tree / "pipelines" / "profiles" / "quick.yaml", yaml.safe_dump(profile))
        return plan.Plan("quick", tree).decides()

    first, renamed, changed = decided("one", 0.5), decided("two", 0.5), decided("one", 0.6)
    assert first["train"] == renamed["train"] != changed["train"]
    assert first["notebook-toy"] != renamed["notebook-toy"] and first["notebook-toy"] != changed["notebook-toy"]


@pytest.mark.parametrize(("call", "words"), [
    ('plotting.save(fig, "F1", profile, "other")', "both make the figure 'F1'"),
    ('records.save_result(profile, "other", "T1", {})', "both make the result 'T1'"),
    ('records.save_machine(profile, "T2", {})', "both make the result 'T2'"),
    ('plotting.save(fig, "F9", profile, "toy")', "other.ipynb: save writes into the folder of 'toy'")])
def test_two_notebooks_that_make_one_figure_or_table_are_refused(tree, call, words):
    first = ('plotting.save(fig, "F1", profile, "toy")\nrecords.save_result(profile, "toy", "T1", {})\n'
             'records.save_machine(profile, "T2", {})\nrecords.save_result(profile, "toy", "summary", {})')
    for name, code in (("toy", first), ("other", call)):
        (tree / "notebooks" / f"{name}.ipynb").write_text(cells.stripped(made_of(code)))
    common.write_text(tree / "pipelines" / "profiles" / "quick.yaml", "notebooks: {toy: {}, other: {}}\n")
    with pytest.raises(PipelineError, match=re.escape(words)):
        stages.build("quick", tree)


# --- experiments and profiles of one's own ---


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """This repository's code, notebooks and profiles in another folder, with the prepared corpus, as the current folder."""
    for folder in ("eplib", "pipelines", "notebooks", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "build"))
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "plays.txt.xz", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    call("data", "plays-chars")
    return tmp_path


def call(module: str, *arguments: str, code: int = 0) -> str:
    """What a pipeline's command of the current folder prints, output and errors."""
    done = subprocess.run([sys.executable, "-m", f"pipelines.{module}", *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_a_new_experiment_runs_at_once_at_smoke_size(checkout):
    assert "notebooks/mine.ipynb" in call("new", "mine")
    assert cells.problems("mine", checkout) == [] and stages.out_of_date(["quick", "paper"], checkout) == []
    for profile in ("smoke", "quick"):
        made = plan.Plan(profile, checkout)
        assert made.read["mine"] == ["mine"]
        assert plan.Made("figure", "mine_losses", "mine") in plan.made_by(made.notebooks["mine"])
    call("train", "--profile", "smoke", "--experiment", "mine")
    call("notebook", "source", "mine", "--profile", "smoke")
    call("notebook", "run", "mine", "--profile", "smoke")
    assert (checkout / "figures" / "smoke" / "mine" / "mine_losses.svg").is_file()
    table = common.read_json(checkout / "results" / "smoke" / "mine" / "mine_table.json")
    assert len(table["rows"]) == 6 and table["rows"][0][0] == "EP, linear response"


@pytest.mark.parametrize(("name", "words"), [("Mine", "lower-case"), ("mnist", "already"), ("mnist_grid", "already"),
                                             ("sources", "already")])
def test_a_new_experiment_with_a_name_that_cannot_be_is_refused_and_nothing_written(tmp_path, name, words):
    for folder in ("pipelines", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(PipelineError, match=words):
        new.create(name, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


BLOCK = """\
from eplib.blocks import Thick
from eplib.config import configuration


@configuration
class Stiff(Thick):
    damping: float = 2.0
"""


def test_a_profile_outside_the_repository_names_plugins_that_are_imported_before_it_is_parsed(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "my_blocks.py").write_text(BLOCK)
    profile = profile_file(folder, "plugins: [my_blocks]\n" + ARMS.replace("{kind: Thick}", '{kind: "my_blocks:Stiff"}')
                           .replace("model: {block: {damping: 0.5}}", "penalties: []").replace("DyadicEP", "AsymEP"))
    assert "toy/nameless" in call("train", "--profile", profile, "--experiment", "toy", "--only", "nameless")
    [run] = (checkout / "results" / "mine" / "runs" / "toy").glob("nameless-*")
    assert common.read_json(run / "config.json")["model"]["block"]["kind"] == "my_blocks:Stiff"
    assert str(folder / "my_blocks.py") in plan.Plan(profile, checkout).decides()["train"]["code"]


def test_a_plugin_that_is_not_there_is_named_with_the_places_it_was_looked_for_in(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no module 'my_blcks' in .*PYTHONPATH"):
        profiles.configurations(profile_file(tmp_path, "plugins: [my_blcks]\n" + ARMS), "toy")


def test_a_profile_elsewhere_with_the_name_of_one_of_ours_is_refused(tmp_path):
    with pytest.raises(PipelineError, match=r"has a profile 'quick'.*rename the file"):
        common.load_profile(profile_file(tmp_path, ARMS, "quick"))


@pytest.mark.parametrize("module", ["claims", "notebook", "sources", "stages", "train"])
def test_a_fault_in_a_profiles_yaml_is_one_line_and_no_traceback(tmp_path, module):
    arguments = (["run", "mnist"] if module == "notebook" else []) + ["--profile", profile_file(tmp_path, "runs: [a: {")]
    said = call(module, *arguments, code=2 if module == "train" else 1)
    assert "mine.yaml, line 2" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("arguments", ["train --profile quick --list", "claims --profile smoke", "notebook --help"])
def test_a_reader_that_closes_the_pipe_ends_a_command_in_silence(arguments):
    code = f"set -o pipefail; {sys.executable} -u -m pipelines.{arguments} | head -c 1"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr


def test_a_notebook_run_by_hand_says_where_its_parameters_are_not_those_of_its_stage(tree, capsys):
    set_profile(tree, {"count": 5, "rate": 0.1})
    settings.by_hand("quick", "toy", {"count": 5, "rate": 0.1, "other": 1}, tree)
    assert capsys.readouterr().out == ""
    settings.by_hand("quick", "toy", {"count": 3, "rate": 0.1, "other": 1}, tree)
    assert capsys.readouterr().out == "run by hand: quick.yaml gives this notebook count = 5 (here 3)\n"


def test_a_result_that_is_a_table_shows_itself_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    value = {"title": "Losses", "columns": ["arm", "loss", "held"], "rows": [["EP <b>", 1.23456789, None], ["BPTT", 2, True]]}
    assert "nan" not in markup.table("T1", value | {"rows": [["EP", float("nan"), None]]})
    shown = records.save_result("quick", "toy", "T1", value)
    assert json.loads(shown.path.read_text())["rows"][1] == ["BPTT", 2, True]
    page = shown._repr_html_()
    assert all(part in page for part in ("T1. Losses", "<td>EP &lt;b&gt;</td>", ">1.2346</td>", "<td>–</td>", "<td>yes</td>"))
    assert records.save_result("quick", "toy", "points", {"a": [1]})._repr_html_() is None


@pytest.mark.parametrize(("quiet", "shown"), [("", "\rhalf of it"), ("1", "")])
def test_progress_is_shown_in_a_notebook_run_by_hand_and_not_by_the_pipeline(monkeypatch, quiet, shown):
    class Shell:
        kernel = object()

    ipython = type(sys)("IPython")
    ipython.get_ipython = Shell
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setenv("TQDM_DISABLE", quiet)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        log.show_on_terminal("half of it")
    assert said.getvalue().startswith(shown) and bool(said.getvalue()) == bool(shown)


# --- arms: their names and colours ---


def profile_file(folder: Path, text: str, name: str = "mine") -> str:
    """A profile outside the repository, as --profile takes it."""
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


ARMS = """\
runs:
  toy:
    - common: {data: {kind: Text, corpus: plays, validation: 0.001},
               model: {width: 8, heads: 2, context: 8, block: {kind: Thick}},
               solver: {kind: Relaxation}, estimator: {kind: DyadicEP}, steps: 2}
      arms:
        mine: {label: "my rule, damped", colour: "#123456", model: {block: {damping: 0.5}}}
        ep_linear: {colour: "#000000"}
        nameless: {}
"""


def test_an_arm_brings_its_label_and_colour_and_an_unknown_one_has_its_name_and_a_stable_colour(tmp_path):
    profile = profile_file(tmp_path, ARMS)
    plotting.use(profile)
    assert (plotting.label("mine"), plotting.colour("mine")) == ("my rule, damped", "#123456")
    assert (plotting.label("ep_linear"), plotting.colour("ep_linear")) == ("EP, linear response", "#000000")
    assert plotting.label("nameless") == "nameless" and plotting.colour("nameless") in plotting.PALETTE
    code = f"from eplib import plotting; plotting.use({profile!r}); print(plotting.look('nameless'))"
    seen = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert seen == {f"{plotting.look('nameless')}\n"}
    _, (ax,) = plotting.figure()
    plotting.seeds(ax, [0, 1], [[2, 1]], "nameless")
    assert [line.get_label() for line in ax.lines] == ["nameless"]


def test_what_an_arm_says_of_its_looks_is_no_part_of_its_configuration(tmp_path):
    plain = ARMS.replace('label: "my rule, damped", colour: "#123456", ', "").replace('{colour: "#000000"}', "{}")
    described, bare = (profiles.configurations(profile_file(tmp_path, text, name), "toy")
                       for text, name in ((ARMS, "described"), (plain, "bare")))
    assert described == bare and described[0].model.block.damping == 0.5


@pytest.mark.parametrize(("change", "words"), [
    (("#123456", "red"), "colour 'red'.*#rrggbb"), (('"my rule, damped"', "3"), "label 3.*text"),
    (('"#123456"', '"#123456", line: nonsense'), "line 'nonsense'; a line is one of '-', '--'"),
    (('"#123456"', '"#123456", line: [0]'), r"line \[0\]; .* \[0, \[6, 1\]\]"),
    (('"#123456"', '"#123456", line: [0, [6]]'), r"line \[0, \[6\]\]; .*an even number of lengths"),
    (("    - common:", "    - foo\n    - common:"), r"mine.yaml, runs.toy: got 'foo'; give a mapping")])
def test_a_look_that_cannot_be_drawn_is_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        plotting.use(profile_file(tmp_path, ARMS.replace(*change)))


def test_smoke_says_that_it_proves_nothing_by_its_path_too(tmp_path):
    fig, _ = plotting.figure()
    (tmp_path / "pipelines" / "profiles").mkdir(parents=True)
    plotting.save(fig, "F1", "pipelines/profiles/smoke.yaml", "toy", root=tmp_path)
    assert plotting.SMOKE in [text.get_text() for text in fig.texts]
    assert (tmp_path / "figures" / "smoke" / "toy" / "F1.svg").exists()


def test_an_arm_has_one_look_in_a_profile(tmp_path):
    twice = ARMS + "    - arms:\n        mine: {colour: '#654321'}\n"
    with pytest.raises(ValueError, match=r"arm mine: colour is '#654321' here and '#123456' elsewhere"):
        plotting.use(profile_file(tmp_path, twice))
