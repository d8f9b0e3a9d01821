"""Configurations: that they come back from JSON as they were, and that equal digests mean equal configurations."""

import math
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib import import_module
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from eplib.blocks import Block
from eplib.config import ConfigurationError, configuration, digest, parse, plain, sparse
from eplib.controllers import Penalty
from eplib.estimators import Estimator
from eplib.families import Family
from eplib.models import Architecture
from eplib.optimisers import UpdateRule
from eplib.solvers import Solver
from eplib.tasks import Signal, Task, Text

MODULES = ("blocks", "controllers", "estimators", "optimisers", "solvers", "starts", "tasks", "models", "training")
CLASSES = sorted({kind for module in MODULES for kind in vars(import_module(f"eplib.{module}")).values()
                  if is_dataclass(kind) and hasattr(kind, "__pydantic_config__") and not kind.__name__.startswith("_")},
                 key=lambda kind: kind.__name__)
BARE = {bool: st.booleans(), NoneType: st.none(), str: st.sampled_from(["a", "b_1", "shakespeare"])}


def values(kind: Any, bounds: dict[str, float] | None = None) -> st.SearchStrategy:
    """Values of an annotated type within its bounds."""
    bounds, origin, parts = bounds or {}, get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = [item for info in parts[1:] for item in (info.metadata if isinstance(info, FieldInfo) else [info])]
        limits = {key: getattr(item, key) for item in found for key in ("ge", "gt", "le", "lt", "multiple_of")
                  if hasattr(item, key)}
        return values(parts[0], limits)
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in (Union, UnionType):
        return st.one_of([values(part) for part in parts])
    if origin is tuple:
        return st.lists(values(parts[0]), max_size=2).map(tuple)
    if kind is int:
        factor = bounds.get("multiple_of", 1)
        return st.integers(bounds.get("ge", 0), bounds.get("ge", 0) + 9).map(lambda n: factor * max(1, n) if factor > 1 else n)
    if kind is float:
        low, high = bounds.get("ge", bounds.get("gt", -10.0)), bounds.get("le", bounds.get("lt", 10.0))
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds)
    if kind in (Architecture, Block, Estimator, Penalty, Signal, Solver, Task, UpdateRule):
        return st.sampled_from([found for found in CLASSES if issubclass(found, kind)]).flatmap(configured)
    return BARE[kind] if kind in BARE else configured(kind)


@st.composite
def configured(draw: Any, kind: type) -> Any:
    """A configuration of a class: what it needs, and such of its options as go together."""
    hints, optional = get_type_hints(kind, include_extras=True), []
    needed = []
    for field in fields(kind):
        missing = (field.default is MISSING and field.default_factory is MISSING) or (kind, field.name) == (Text, "corpus")
        (needed if missing else optional).append(field.name)
    made, chosen = None, needed
    while made is None:
        try:
            made = kind(**{name: __file__ if name == "path" else draw(values(hints[name])) for name in chosen})
        except ValidationError:  # some are refused as long as nothing in them would act: then their options are needed too
            chosen = needed + [name for name in optional if draw(st.booleans())]
    for name in optional:
        if draw(st.booleans()):
            made = changed(made, name, draw(values(hints[name])))
    return made


def changed(made: Any, name: str, value: Any) -> Any:
    """The configuration with another value of one key, or as it was if that value is refused."""
    try:
        return replace(made, **{name: value})
    except ValidationError:
        return made


def generated(kind: type) -> settings:
    """A run consists of parts that go together: several are drawn until they do, which takes its time."""
    return settings(derandomize=True, max_examples=12 if kind.__name__ == "RunConfig" else 30, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_configuration_comes_back_whole_from_all_it_says_and_from_what_is_no_default(kind):
    @generated(kind)
    @given(configured(kind))
    def holds(made):
        assert parse(kind, plain(made), "plain") == made
        assert parse(kind, sparse(made), "sparse") == made

    holds()


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if fields(kind)], ids=lambda kind: kind.__name__)
def test_digests_are_equal_where_configurations_are(kind):
    hints = get_type_hints(kind, include_extras=True)

    @generated(kind)
    @given(st.data())
    def holds(data):
        made = data.draw(configured(kind))
        name = data.draw(st.sampled_from([field.name for field in fields(kind)]))
        other = changed(made, name, data.draw(values(hints[name])))
        assert (digest(sparse(made)) == digest(sparse(other))) == (made == other)
        assert digest(sparse(made)) == digest(sparse(parse(kind, plain(made), "again")))

    holds()


def test_every_kind_of_configuration_is_among_those_generated():
    names = {kind.__name__ for kind in CLASSES}
    assert {"RunConfig", "Thick", "Anderson", "DyadicEP", "BPTT", "ContractionRate", "ResidualDriven", "LinearStart"} <= names


class Part(Family):
    """A family of this file's own."""


@configuration
class Inner(Part):
    depth: int = 1


@configuration
class Old:
    rate: float = 0.5
    inner: tuple[Part, ...] = ()


class NewPart(Family):
    """The same a version later."""


@configuration
class NewInner(NewPart):
    depth: int = 1
    width: int = 4


NewInner.kind = Inner.kind = "Inner"  # one class, in two versions of the library


@configuration
class New:
    rate: float = 0.5
    inner: tuple[NewPart, ...] = ()
    option: int | None = None


def test_an_option_that_is_added_with_a_default_changes_no_digest():
    before, after = Old(inner=(Inner(depth=2),)), New(inner=(NewInner(depth=2),))
    assert sparse(before) == sparse(after) == {"inner": [{"kind": "Inner", "depth": 2}]}
    assert digest(sparse(before)) == digest(sparse(after)) != digest(sparse(New(option=1)))
    assert digest(plain(before)) != digest(plain(after))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(ValidationError, match="finite number"):
        Old(rate=value)
    with pytest.raises(ConfigurationError, match=r"x: the configuration is not valid\n  rate: .*finite number"):
        parse(Old, {"rate": value}, "x")
