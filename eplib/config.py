"""Validated, frozen configuration dataclasses.

A configuration refuses what it does not know: an unknown key, a value of the wrong type or out of its range is a
`pydantic.ValidationError` that names the key, the value and what is allowed. Nothing is coerced except int to float, so the
string "1e-3" (what YAML makes of a number without a dot) is refused instead of being guessed at. Numbers are finite.
"""

import json
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from hashlib import sha256
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .families import Family, as_json

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
        text = as_json(values)
    except ValueError as error:
        raise ConfigurationError(f"{what}: the configuration is not valid\n  {error}") from None
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        lines = [f"{what}: the configuration is not valid"]
        for item in error.errors(include_url=False):
            where = ".".join(map(str, item["loc"])) or "(whole)"
            lines.append(f"  {where}: {item['msg']}; got {item['input']!r}")
        raise ConfigurationError("\n".join(lines)) from None


@cache  # a store asks for hundreds of runs
def _adapter(kind: Any) -> TypeAdapter:
    family = isinstance(kind, type) and issubclass(kind, Family)
    return TypeAdapter(Annotated[Any, PlainValidator(kind.read)] if family else kind)


def plain(configuration: Any) -> dict:
    """The configuration as JSON-compatible values, every default written out."""
    return _written(configuration, whole=True)


def sparse(configuration: Any) -> dict:
    """What of the configuration differs from the defaults, as JSON-compatible values that `parse` makes whole again.

    A `kind` stays, and a list is there as a whole, each of its members sparse; so an option that is added with a default
    leaves what was configured without it, and its digest, as they were.
    """
    return _written(configuration, whole=False)


def _written(value: Any, whole: bool) -> Any:
    if is_dataclass(value):
        found: dict[str, Any] = {"kind": value.kind} if isinstance(value, Family) and value.kind != value.default else {}
        for field in fields(value):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if whole or default is MISSING or getattr(value, field.name) != default:
                found[field.name] = _written(getattr(value, field.name), whole)
        return found
    if isinstance(value, list | tuple):
        return [_written(item, whole) for item in value]
    return 0.0 if isinstance(value, float) and value == 0 else value  # one zero, as `==` knows one


def digest(values: Any, length: int = 8) -> str:
    """Hexadecimal digest of JSON-compatible `values`, independent of key order."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:length]
