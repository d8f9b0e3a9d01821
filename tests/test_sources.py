"""Which source a run's numbers depend on: what trains, and the classes that its configuration uses."""

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from eplib import blocks, controllers, estimators, sources
from eplib.config import parse, plain
from eplib.training import Mnist, RunConfig, Text, Trainer, Transformer
from pipelines import imports

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = RunConfig(experiment="x", arm="ep", steps=1, data=Text(corpus="plays"), estimator=estimators.AsymEP(beta=0.2),
                   model=Transformer(context=8, block=blocks.Thick()))
OWN = '''"""A block of the user's own."""

from eplib import blocks, diagnostics
from eplib.config import configuration

SCALE = 2.0


@configuration
class Mine(blocks.Thick):
    """Mine."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the library whose source is digested anew each time it is asked for."""
    folder = tmp_path / "eplib"
    shutil.copytree(sources.FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__", "build"))
    monkeypatch.setattr(sources, "FOLDER", folder)

    def digest(config=CONFIG):
        for cached in (sources._tree, sources._text, sources._imports, sources._listed, sources._foreign):
            cached.cache_clear()
        return sources.source_digest(config)

    yield folder, digest
    monkeypatch.undo()
    digest()  # and nothing of the copy is remembered


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\n\nEDITED = 1\n")


def test_comments_and_docstrings_do_not_count_and_all_else_does():
    text = (sources.FOLDER / "config.py").read_text()
    same = [text.replace('"""Hexadecimal digest of', '"""Anew: # a\n\ndigest of'), "# first\n\n" + text + "\n\n# end\n",
            text.replace("# as YAML", "#  now, as YAML"), text.replace("\n\n\n", "\n\n\n\n")]
    other = [text.replace("length: int = 8", "length: int = 9"), text.replace('"forbid"', '"ignore"'),
             text + "\n\nEXTRA = '# not a comment'\n"]
    for changed, expected in [(t, True) for t in same] + [(t, False) for t in other]:
        assert (sources.without_comments(changed) == sources.without_comments(text)) is expected, changed[:80]


def test_a_docstring_on_a_line_of_code_does_not_hide_the_code():
    found = [sources.without_comments(f'def f({argument}): """Words."""\n\n\nclass A:\n    """Words."""; x = "{argument}"\n')
             for argument in ("a", "b")]
    assert found[0] != found[1] and "x = " in found[0]


def test_what_trains_counts_for_every_run_and_what_only_some_use_does_not():
    every = set(sources.closure({sources.TRAINING}))
    assert every >= {f"eplib.{name}" for name in ("training", "evaluation", "runconfig", "config", "files", "log")}
    others = ("controllers.mode", "controllers.norms", "blocks.monotone", "blocks.attractor", "blocks.linear", "blocks.layered",
              "estimators.holomorphic", "estimators.tracking", "estimators.baselines", "diagnostics.gdu", "plotting")
    assert all((sources.FOLDER / f"{name.replace('.', '/')}.py").is_file() for name in others)
    assert not every & {f"eplib.{name}" for name in others}
    theirs = {Path(path).with_suffix("").as_posix().removesuffix("/__init__").replace("/", ".")
              for path in imports.closure(every, REPOSITORY)}
    assert every <= theirs  # found by another reading of the imports


def test_an_edit_of_a_class_makes_those_runs_stale_that_use_it(package):
    folder, digest = package
    using = replace(CONFIG, penalties=(controllers.Homeostasis(),))
    before, path = (digest(), digest(using)), folder / Path(*controllers.Homeostasis.__module__.split(".")[1:])
    edit(path.with_suffix(".py"))
    assert digest() == before[0] and digest(using) != before[1]


def test_what_makes_the_metrics_counts_and_what_only_some_runs_ask_for_counts_for_these(package):
    folder, digest = package
    asking = replace(CONFIG, data=Mnist(), model=Transformer(block=blocks.Thick(causal=False)), adaptive=True)
    silent = replace(asking, adaptive=False)
    before = digest(asking), digest(silent)
    edit(folder / "diagnostics" / "adaptive.py")
    assert digest(asking) != before[0] and digest(silent) == before[1]
    edit(folder / "store" / "summary.py")
    assert digest(silent) != before[1]


def test_a_field_with_a_default_changes_no_digest_but_that_of_its_source():
    again = parse(RunConfig, {"experiment": "x", "arm": "ep", "steps": 1, "data": {"kind": "Text", "corpus": "plays"},
                              "estimator": {"kind": "AsymEP", "beta": 0.2},
                              "model": {"context": 8, "block": {"kind": "Thick"}}}, "x")
    assert again == CONFIG and sources.source_digest(again) == sources.source_digest(CONFIG)


def test_a_class_of_your_own_counts_with_its_file_and_what_that_imports(package, tmp_path, monkeypatch):
    digest = package[1]
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_here.py").write_text(OWN)
    import mine_here

    config = replace(CONFIG, model=replace(CONFIG.model, block=mine_here.Mine()))
    before = digest(config)
    assert before != digest()
    (tmp_path / "mine_here.py").write_text(OWN.replace("2.0", "3.0"))
    assert digest(config) != before
    (tmp_path / "mine_here.py").write_text(OWN.replace("of the user's own", "of mine"))
    assert digest(config) == before
    blocks.Block.members.pop("mine_here:Mine")
    sys.modules.pop("mine_here")


def test_imports_for_the_type_checker_compute_nothing_and_a_package_is_seen_through():
    text = ("from typing import TYPE_CHECKING\nimport eplib.controllers.norms as n\nfrom . import controllers, spectra\n"
            "if TYPE_CHECKING:\n    from .plotting import use\n\nX = [controllers.LeadingMode(), spectra.edges]\n")
    found = sources.names(ast.parse(text), "eplib")
    assert "eplib.plotting.use" not in found and {sources._module_of(name) for name in found} == {
        None, "eplib.controllers.norms", "eplib.controllers.mode", "eplib.spectra"}


ALONE = """
import sys
from eplib.config import parse, plain
from eplib.runconfig import RunConfig
from eplib.training import Trainer

config = parse(RunConfig, {config!r}, "x")
print(Trainer(config, "run").advance(show=lambda line: None).curve[-1]["loss"])
print(sys.modules["eplib"].__file__)
"""


def test_a_run_trains_alike_where_there_is_no_other_source(tmp_path):
    """What is left out of the digest decides nothing: without it the run has the same loss."""
    (tmp_path / "own.txt").write_text("".join(f"{number} foxes and a tall oak.\n" for number in range(60, 200)))
    config = replace(CONFIG, data=Text(path=str(tmp_path / "own.txt")), penalties=(controllers.Homeostasis(),), batch=2,
                     model=replace(CONFIG.model, width=16))
    kept = {sources._file(module) for module in sources.modules_of(config)}
    shutil.copytree(sources.FOLDER, tmp_path / "eplib", ignore=shutil.ignore_patterns("__pycache__", "build"))
    for path in (tmp_path / "eplib").rglob("*.py"):
        if path.name != "__init__.py" and sources.FOLDER / path.relative_to(tmp_path / "eplib") not in kept:
            path.unlink()
    for index in (tmp_path / "eplib").rglob("__init__.py"):  # which then lists less
        tree = ast.parse(index.read_text())
        tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.level == 1)
                     or any((index.parent / f"{node.module}{end}").exists() for end in (".py", "/__init__.py"))]
        index.write_text(ast.unparse(tree))
    done = subprocess.run([sys.executable, "-P", "-c", ALONE.format(config=plain(config))], cwd=tmp_path, text=True,
                          capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    alone, there = done.stdout.split()
    whole = Trainer(config, tmp_path / "whole").advance(show=lambda _: None).curve[-1]["loss"]
    assert float(alone) == pytest.approx(whole, rel=1e-6) and there == str(tmp_path / "eplib" / "__init__.py")
    assert len(list((tmp_path / "eplib").rglob("*.py"))) < 0.9 * len(list(sources.FOLDER.rglob("*.py")))


def test_a_class_without_source_is_refused_with_where_to_put_it():
    """As one of `python -c` is."""
    made = dataclass(type("Mine", (), {"__module__": "nowhere"}))
    sys.modules["nowhere"] = type(sys)("nowhere")
    try:
        with pytest.raises(ValueError, match=r"the source of Mine .*`python -c` .* goes into a file"):
            sources.source_digest(made())
    finally:
        del sys.modules["nowhere"]
