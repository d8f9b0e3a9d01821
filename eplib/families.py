"""Families: configurations that are chosen by their `kind`, ours and your own alike."""

import json
from collections.abc import Iterator
from importlib import import_module
from typing import Any, ClassVar, TypeVar, cast

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

T = TypeVar("T", bound="Family")
Scalar = str | int | float | bool | None  # what JSON has, but for lists and mappings


class Family:
    """Base of the families. A direct subclass is a family; every `@configuration` below that is a member, in whatever file.

    `kind` names a member where a configuration is read or written: by its class name if it is eplib's, else as
    "package.module:Class", which is imported when it is read. The bare name will do for a class that has been imported, and is
    eplib's where both have it. A field is annotated with the family, not with one member: that would read no `kind`.
    default: name of the member that is meant where `kind` is left out, which it then always is. by_sample: of a class of your
    own, whether it treats every sample of a batch for itself, as what a run on several ranks shares out has to (`parallel`).
    """

    kind: ClassVar[str]
    default: ClassVar[str | None]
    members: ClassVar[dict[str, type[Any]]]
    by_sample: ClassVar[bool] = False

    def __init_subclass__(cls, default: str | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if Family in cls.__bases__:
            cls.default, cls.members = default, {}
        else:
            ours = cls.__module__.split(".")[0] == __package__
            cls.kind = cls.__name__ if ours else f"{cls.__module__}:{cls.__qualname__}"
            cls.members[cls.kind] = cls  # a class that a notebook's cell defines again replaces the one before

    @classmethod
    def find(cls: type[T], kind: str) -> type[T]:
        """The member of that name. Raises ValueError with the names there are."""
        module, _, name = kind.rpartition(":")
        if module.startswith("."):
            raise ValueError(f"{kind!r} starts with a dot, and there is no package to start from; give the whole name, "
                             "package.module:Class")
        if module:
            try:
                import_module(module)
            except ImportError as error:
                raise ValueError(f"{kind!r} cannot be imported ({error}); the folder of {module.split('.')[0]}.py is to be the "
                                 "current one, or on PYTHONPATH") from error
        usable = {key: found for key, found in cls.members.items()
                  if "__pydantic_validator__" in vars(found) and not found.__name__.startswith("_")}
        found = [usable[kind]] if kind in usable else [
            member for key, member in usable.items() if not module and key.endswith(f":{name}")]
        if len(found) > 1:
            raise ValueError(f"there are several {name}, say which: {', '.join(sorted(one.kind for one in found))}")
        if not found:
            raise ValueError(f"{kind!r} is not one of {', '.join(sorted(usable))}; your own is package.module:Class, a "
                             f"@configuration that is a {cls.__name__}")
        return found[0]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        if "__dataclass_fields__" in vars(cls):
            return handler(source)
        return core_schema.no_info_plain_validator_function(cls.read)

    @classmethod
    def read(cls: type[T], value: Any) -> T:
        """A member from a mapping as YAML or JSON has it, or as it is. Raises ValueError (pydantic's) with each key that is
        wrong."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):  # as YAML and JSON have it
            raise PydanticCustomError("family", "give a {family}, a mapping with its kind", {"family": cls.__name__})
        kind = value.get("kind", getattr(cls, "kind", cls.default))
        try:
            if not isinstance(kind, str):
                raise ValueError("say which kind it is" if kind is None else "kind is to be a name")
            member = cls.find(kind)
            if not issubclass(member, cls):
                raise ValueError(f"{kind} is not a {cls.__name__}")
        except ValueError as error:
            wrong = PydanticCustomError("kind", "{said}", {"said": str(error)})
            raise ValidationError.from_exception_data(cls.__name__, [
                InitErrorDetails(type=wrong, loc=("kind",), input=kind)]) from error
        rest = {key: one for key, one in value.items() if key != "kind"}
        return cast(Any, member).__pydantic_validator__.validate_json(as_json(rest))


def owed(one: object, method: str) -> NotImplementedError:
    """The error of a method that a class of your own has to define. method: its name with its arguments."""
    return NotImplementedError(f"{type(one).__name__} does not define {method}; override it (README, 'Your own')")


def as_json(values: Any) -> str:
    """Values as YAML has them, as JSON. Raises ValueError that names what JSON lacks, a date say, with its key."""
    try:
        return json.dumps(values)
    except TypeError:
        raise ValueError("; ".join(_strange(values, ())) + "; a configuration has text, numbers, true, false, null, lists and "
                         "mappings: a date, which YAML reads without quotes, is text in quotes") from None


def _strange(value: Any, place: tuple) -> Iterator[str]:
    where = ".".join(map(str, place)) or "(whole)"
    if isinstance(value, dict):
        yield from (f"{where}: the key {key!r}" for key in value if not isinstance(key, Scalar))
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, one in parts:
        yield from _strange(one, (*place, key))
    if not isinstance(value, dict | list | tuple | Scalar):
        yield f"{where}: got {value!r}"
