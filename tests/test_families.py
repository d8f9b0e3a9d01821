"""Families: members are found by their kind, in eplib or in a file of one's own; what is not there is named."""

import sys
from datetime import date

import pytest

from eplib import blocks, controllers, estimators, models, solvers, tasks
from eplib.config import ConfigurationError, configuration, parse, plain
from eplib.families import Family
from eplib.runconfig import RunConfig

RUN = {"experiment": "x", "arm": "a", "data": {"kind": "Text", "corpus": "plays"}, "steps": 3,
       "estimator": {"kind": "DyadicEP"},
       "model": {"width": 8, "heads": 2, "context": 8, "block": {"kind": "Thick"}}}
MINE = """
from eplib.config import configuration
from eplib.solvers import Relaxation

@configuration
class Patient(Relaxation):
    patience: int = 3
"""


class Shape(Family, default="Round"):
    """A family of this file's own."""


class Cornered(Shape):
    """Not a member: it is no configuration."""


@configuration
class Round(Shape):
    radius: float = 1.0


@configuration
class Square(Cornered):
    side: float = 1.0


@configuration
class Drawing:
    shape: Shape = Round()
    others: tuple[Shape, ...] = ()


def test_a_member_is_found_by_its_class_name_and_its_family_knows_it():
    run = parse(RunConfig, RUN | {"solver": {"kind": "Anderson", "memory": 3}}, "run")
    assert run.solver == solvers.Anderson(memory=3) and isinstance(run.model.block, blocks.Block)
    assert plain(run)["solver"]["kind"] == "Anderson" == solvers.Anderson.kind


@pytest.mark.parametrize(("kind", "said"), [
    ({"kind": "Andersen"}, r"solver\.kind: 'Andersen' is not one of Anderson, FixedHorizon"),
    ({"step": 0.5}, r"solver\.kind: say which kind it is"),
    ({"kind": 3}, r"solver\.kind: kind is to be a name; got 3"),
    ({"kind": "no_such_module:X"}, r"solver\.kind: .*cannot be imported .*PYTHONPATH"),
    ({"kind": ".solvers:Mine"}, r"solver\.kind: '.solvers:Mine' starts with a dot.* package.module:Class"),
    ({"kind": "eplib.blocks:Thick"}, r"solver\.kind: 'eplib.blocks:Thick' is not one of"),
    ({"kind": "Anderson", "memroy": 3}, r"solver\.memroy: .*got 3"),
    ({"kind": "Anderson", "step": "1e-3"}, r"solver\.step: .*valid number"),
    ("Anderson", r"solver: give a Solver, a mapping with its kind; got 'Anderson'"),
])
def test_what_is_no_member_or_does_not_fit_it_is_named_with_what_there_is(kind, said):
    with pytest.raises(ConfigurationError, match=said):
        parse(RunConfig, RUN | {"solver": kind}, "run")


def test_a_class_in_a_file_of_ones_own_is_a_member_by_module_and_name_and_by_name_once_imported(tmp_path, monkeypatch):
    (tmp_path / "my_solvers.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(ConfigurationError, match="'Patient' is not one of"):
            parse(RunConfig, RUN | {"solver": {"kind": "Patient"}}, "run")
        run = parse(RunConfig, RUN | {"solver": {"kind": "my_solvers:Patient", "patience": 5}}, "run")
        assert plain(run)["solver"] | {"kind": "my_solvers:Patient", "patience": 5} == plain(run)["solver"]
        assert parse(RunConfig, RUN | {"solver": {"kind": "Patient", "patience": 5}}, "run") == run == \
            parse(RunConfig, plain(run), "again")
    finally:
        solvers.Solver.members.pop("my_solvers:Patient", None)
        sys.modules.pop("my_solvers", None)


def test_only_configurations_are_members_and_a_default_kind_is_left_out():
    assert parse(Drawing, {"shape": {"radius": 2.0}}, "drawing") == Drawing(shape=Round(radius=2.0))
    assert Shape.find("Square") is Square
    with pytest.raises(ValueError, match=f"'Cornered' is not one of {__name__}:Round, {__name__}:Square; your own is"):
        Shape.find("Cornered")
    for drawing in (Drawing(), Drawing(shape=Square()), Drawing(others=(Round(), Square(side=2.0)))):
        assert parse(Drawing, plain(drawing), "again") == drawing


def test_a_class_of_ones_own_with_the_name_of_one_of_eplibs_leaves_that_one_reachable(tmp_path, monkeypatch):
    (tmp_path / "mine_too.py").write_text(MINE.replace("Patient", "Anderson"))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        own = solvers.Solver.find("mine_too:Anderson")
        assert solvers.Solver.find("Anderson") is solvers.Anderson is not own
        for one in (own(patience=4), solvers.Anderson()):
            run = parse(RunConfig, RUN | {"solver": plain(one)}, "run")
            assert run.solver == one and type(run.solver) is type(one)
    finally:
        solvers.Solver.members.pop("mine_too:Anderson", None)
        sys.modules.pop("mine_too", None)


def test_what_json_does_not_have_is_named_with_its_key():
    day = date(2026, 1, 2)
    for value, said in (({"solver": {"kind": "Anderson", "step": day}}, r"solver\.step: got datetime.date\(2026, 1, 2\)"),
                        ({"penalties": [{"since": {3}}]}, r"penalties\.0\.since: got \{3\}"),
                        ({"solver": {day: 1}}, r"solver: the key datetime.date")):
        with pytest.raises(ConfigurationError, match=f"(?s)run: .*{said}.*a date, which YAML reads"):
            parse(RunConfig, RUN | value, "run")
    with pytest.raises(ValueError, match=r"side: got datetime.date"):
        Drawing(shape={"kind": "Square", "side": day})


def test_two_classes_of_one_name_are_told_apart_by_their_modules(tmp_path, monkeypatch):
    for module in ("mine_a", "mine_b"):
        (tmp_path / f"{module}.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        first, second = solvers.Solver.find("mine_a:Patient"), solvers.Solver.find("mine_b:Patient")
        assert first is not second
        with pytest.raises(ValueError, match="several Patient, say which: mine_a:Patient, mine_b:Patient"):
            solvers.Solver.find("Patient")
    finally:
        for module in ("mine_a", "mine_b"):
            solvers.Solver.members.pop(f"{module}:Patient", None)
            sys.modules.pop(module, None)


def test_what_a_class_of_ones_own_leaves_out_is_named_with_its_arguments():
    owing = [(controllers.Penalty, lambda one: one(None, 1.0, {}), r"__call__\(problem, step, carried\)"),
             (blocks.Block, lambda one: one.build(8, 2, 8), r"build\(width, heads, context\)"),
             (models.Model, lambda one: one.predict(None), r"predict\(h\)"),
             (models.Architecture, lambda one: one.build(None), r"build\(signal\)"),
             (tasks.Task, lambda one: one.load(None, batch=1), r"load\(root, batch, seed, context\)"),
             (tasks.Dataset, lambda one: one.batch(0), r"batch\(step\)"),
             (estimators.Estimator, lambda one: one.gradient(None, None, None), r"gradient\(batch, solver, nudged\)"),
             (estimators.ByAdjoint, lambda one: one.adjoint(None, None), r"adjoint\(problem, solver\)")]
    for base, use, said in owing:
        mine = type("Mine", (base,), {})
        with pytest.raises(NotImplementedError, match=f"Mine does not define {said}"):
            use(mine())
