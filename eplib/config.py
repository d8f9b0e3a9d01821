"""Validated, frozen configuration dataclasses.

A configuration refuses what it does not know: an unknown key, a value of the wrong type or out of its range is a
`pydantic.ValidationError` that names the key, the value and what is allowed. Nothing is coerced except int to float, so the
string "1e-3" (what YAML makes of a number without a dot) is refused instead of being guessed at. Numbers are finite.
"""

import json
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from hashlib import sha256
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configuration(kind: type[T]) -> type[T]:
    """Class decorator of every configuration: frozen, keyword-only, strict."""
    strict = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=False, allow_inf_nan=False)
    return cast("type[T]", dataclass(frozen=True, kw_only=True, config=strict)(kind))


class ConfigurationError(ValueError):
    """A configuration that cannot be used; the message names each key, its value and what is allowed."""


def parse(kind: Any, values: dict, what: str) -> Any:
    """Builds a configuration of type `kind` from plain `values` (as read from YAML or JSON).

    Raises `ConfigurationError` with one line per offending key; `what` names the configuration in it.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        lines = [f"{what}: the configuration is not valid"]
        for item in error.errors(include_url=False):
            # a location names the member of a union too (solver.Relaxation.step); the reader's keys are in lower case
            where = ".".join(str(part) for part in item["loc"] if not str(part)[:1].isupper()) or "(whole)"
            lines.append(f"  {where}: {item['msg']}; got {item['input']!r}")
        raise ConfigurationError("\n".join(lines)) from None


@cache  # a store asks for hundreds of runs
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def plain(configuration: Any) -> dict:
    """The configuration as JSON-compatible values, every default written out."""
    return json.loads(json.dumps(asdict(configuration)))


def sparse(configuration: Any) -> dict:
    """What of the configuration differs from the defaults, as JSON-compatible values that `parse` makes whole again.

    A `kind` stays, and a list is there as a whole, each of its members sparse; so an option that is added with a default
    leaves what was configured without it, and its digest, as they were.
    """
    found = {}
    for field in fields(configuration):
        value = getattr(configuration, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name == "kind" or default is MISSING or value != default:
            found[field.name] = _sparse(value)
    return found


def _sparse(value: Any) -> Any:
    if is_dataclass(value):
        return sparse(value)
    if isinstance(value, list | tuple):
        return [_sparse(item) for item in value]
    return 0.0 if isinstance(value, float) and value == 0 else value  # one zero, as `==` knows one


def digest(values: Any, length: int = 8) -> str:
    """Hexadecimal digest of JSON-compatible `values`, independent of key order."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:length]
