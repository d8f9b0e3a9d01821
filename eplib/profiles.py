"""Profiles: which runs an experiment consists of, from pipelines/profiles/<profile>.yaml."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from . import settings
from .config import ConfigurationError, digest, parse, sparse
from .models import Architecture
from .settings import ROOT
from .training import RunConfig

IMPLIED = {"model": Architecture.default}  # the kind that is meant where a mapping of this name names none


def load_profile(profile: str, root: Path = ROOT) -> dict:
    """What pipelines/profiles/<profile>.yaml says, or the file of that path. Raises `ConfigurationError` if there is none or it
    cannot be read."""
    return settings.load(profile, root, ConfigurationError)


def configurations(profile: str, experiment: str, root: Path = ROOT) -> list[RunConfig]:
    """The runs that a profile names for an experiment; none where only other profiles have that experiment.

    An experiment is a list of families {common, arms: {arm: changes}, over: {dotted.key: [values]}}: every arm is the common
    configuration with its changes (label, colour and line are no part of it), once for each combination of the values in
    `over`. `branch: {run: ARM}` goes on from the run of the same seed of an arm above. The modules that the profile names as
    `plugins` are imported first. Raises `ConfigurationError` for an experiment that no profile has, with those there are.
    """
    settings.import_plugins(profile, root, ConfigurationError)
    groups = load_profile(profile, root).get("runs") or {}
    if experiment not in groups:
        known = {name for other in settings.known(root) for name in load_profile(other, root).get("runs") or {}}
        if experiment not in known:
            raise ConfigurationError(f"there is no experiment {experiment!r}; profile {profile} has "
                                     f"{', '.join(groups) or 'none'}; other profiles have "
                                     f"{', '.join(sorted(known - groups.keys())) or 'no more'}")
    name, found = settings.name_of(profile), list[RunConfig]()
    for family in groups.get(experiment) or []:
        for config in _members(family, experiment, f"{name}.yaml, runs.{experiment}", found):
            if config in found:
                raise ConfigurationError(f"{name}.yaml, runs.{experiment}, arm {config.arm}: {config.name} is named twice "
                                         "with the same configuration; remove one")
            found.append(config)
    return found


def _members(family: Any, experiment: str, where: str, above: Sequence[RunConfig]) -> Iterator[RunConfig]:
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
        own = {key: value for key, value in _mapping(changes, f"{where}, arm {arm}").items() if key not in settings.LOOK}
        arm_only = _merge(_merge({"experiment": experiment, "arm": arm}, common), own)
        for values in product(*over.values()):
            merged = arm_only
            for key, value in zip(over, values, strict=True):
                merged = _merge(merged, _nest(key, value))
            yield parse(RunConfig, _branched(merged, above, f"{where}, arm {arm}"), f"{where}, arm {arm}")


def _branched(values: dict, above: Sequence[RunConfig], where: str) -> dict:
    """The values with the arm that they branch from replaced by its run of the same seed, one of those `above`."""
    branch = values.get("branch")
    if not isinstance(branch, dict) or "/" in str(branch.get("run")):
        return values
    origins = [config for config in above if config.arm == branch.get("run") and config.seed == values.get("seed", 0)
               and config.branch is None]
    if len(origins) != 1:
        raise ConfigurationError(f"{where}, branch.run: got {branch.get('run')!r}, an arm of which the families above have "
                                 f"{len(origins)} runs of this seed; name one that has one, or a run, experiment/name-digest")
    return values | {"branch": branch | {"run": f"{origins[0].experiment}/{run_folder(origins[0])}"}}


def run_folder(config: RunConfig) -> str:
    """The name of a run's folder in the store."""
    return f"{config.name}-{digest(sparse(config))}"


def _mapping(value: Any, where: str) -> dict:
    return settings.mapping(value, where, ConfigurationError)


def _nest(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it; mappings merge unless they name two different kinds. A change without a kind is of
    the one that is there."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            kinds = {old.get("kind", IMPLIED.get(key)), value.get("kind")} - {None}
            value = _merge(old, value) if len(kinds) < 2 else value
        merged[key] = value
    return merged
