"""Profiles: which runs an experiment consists of, from pipelines/profiles/<profile>.yaml."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from .config import ConfigurationError, parse
from .files import read_yaml
from .training import RunConfig

ROOT = Path(__file__).resolve().parent.parent


def load_profile(profile: str, root: Path = ROOT) -> dict:
    """pipelines/profiles/<profile>.yaml. Raises `ConfigurationError` naming the known profiles if there is none, and file, line
    and what is wrong if it cannot be read."""
    path = root / "pipelines" / "profiles" / f"{profile}.yaml"
    if not path.exists():
        raise ConfigurationError(f"there is no profile {profile!r}; there are: {', '.join(_known(root))}")
    found = _mapping(read_yaml(path, ConfigurationError), path.name)
    for experiment, families in _mapping(found.get("runs"), f"{path.name}, runs").items():
        if not isinstance(families, list | None):
            raise ConfigurationError(f"{path.name}, runs.{experiment}: got {families!r}; an experiment is a list of families")
    return found


def configurations(profile: str, experiment: str, root: Path = ROOT) -> list[RunConfig]:
    """The runs that a profile names for an experiment; none where only other profiles have that experiment.

    An experiment is a list of families {common, arms: {arm: changes}, over: {dotted.key: [values]}}: every arm is the common
    configuration with its changes, once for each combination of the values in `over`. Raises `ConfigurationError` for an
    experiment that no profile has, with those there are.
    """
    groups = load_profile(profile, root).get("runs") or {}
    if experiment not in groups:
        known = {name for other in _known(root) for name in load_profile(other, root).get("runs") or {}}
        if experiment not in known:
            raise ConfigurationError(f"there is no experiment {experiment!r}; profile {profile} has "
                                     f"{', '.join(groups) or 'none'}; other profiles have "
                                     f"{', '.join(sorted(known - groups.keys())) or 'no more'}")
    found: list[RunConfig] = []
    for family in groups.get(experiment) or []:
        for config in _members(family, experiment, f"{profile}.yaml, runs.{experiment}"):
            if config in found:
                raise ConfigurationError(f"{profile}.yaml, runs.{experiment}, arm {config.arm}: {config.name} is named twice "
                                         "with the same configuration; remove one")
            found.append(config)
    return found


def _members(family: Any, experiment: str, where: str) -> Iterator[RunConfig]:
    unknown = set(_mapping(family, where)) - {"common", "arms", "over"}
    if unknown:
        raise ConfigurationError(f"{where}: unknown key {', '.join(sorted(unknown))}; a family has common, arms and over")
    arms, over = _mapping(family.get("arms"), f"{where}, arms"), _mapping(family.get("over"), f"{where}, over")
    if not arms:
        raise ConfigurationError(f"{where}: a family has no arms; give it arms: {{NAME: {{...}}}}")
    for key, values in over.items():
        if not isinstance(values, list):
            raise ConfigurationError(f"{where}, over.{key}: got {values!r}; give a list of values")
    for arm, changes in arms.items():
        common = _mapping(family.get("common"), f"{where}, common")
        arm_only = _merge(_merge({"experiment": experiment, "arm": arm}, common), _mapping(changes, f"{where}, arm {arm}"))
        for values in product(*over.values()):
            merged = arm_only
            for key, value in zip(over, values, strict=True):
                merged = _merge(merged, _nest(key, value))
            yield parse(RunConfig, merged, f"{where}, arm {arm}")


def _known(root: Path) -> list[str]:
    return sorted(file.stem for file in (root / "pipelines" / "profiles").glob("*.yaml"))


def _mapping(value: Any, where: str) -> dict:
    if value is not None and not isinstance(value, dict):
        raise ConfigurationError(f"{where}: got {value!r}; give a mapping, key: value")
    return value or {}


def _nest(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it; mappings merge unless they name two different kinds."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and len({old.get("kind"), value.get("kind")} - {None}) < 2:
            value = _merge(old, value)
        merged[key] = value
    return merged
