"""A profile's file: where it is, what it says, how it names and draws its arms. Imports neither torch nor pydantic."""

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .files import ROOT, read_yaml

KEYS = ("profile", "stale", "sample", "plugins", "notebooks", "runs")  # of a profile's file
STALE = ("keep", "retrain")  # what becomes of a run that older source recorded
LOOK = ("label", "colour", "line")  # what an arm says of its looks; the rest of it is configuration
# seaborn's palette "colorblind" (after Okabe and Ito), written out: importing seaborn takes longer than most
# notebooks' figures.
PALETTE = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9")
LINES = ("-", "--", "-.", ":")
Line = str | tuple[int, tuple[int, ...]]  # as matplotlib names a dash pattern


@dataclass(frozen=True)
class Look:
    """How figures and tables name and draw an arm."""

    label: str
    colour: str  # #rrggbb
    line: Line


def default_look(arm: str) -> Look:
    """The look of an arm that nobody described: its name, and a colour and a line that are the same each time."""
    number = int(hashlib.sha256(arm.encode()).hexdigest(), 16)
    return Look(arm, PALETTE[number % len(PALETTE)], LINES[number // len(PALETTE) % len(LINES)])


def known(root: Path = ROOT) -> list[str]:
    """The names of the profiles in pipelines/profiles/, sorted."""
    return sorted(file.stem for file in (root / "pipelines" / "profiles").glob("*.yaml"))


def name_of(profile: str) -> str:
    """The name that a profile's results have: its own, or for the path of a profile's file the file's without .yaml."""
    return Path(profile).stem if profile.endswith(".yaml") else profile


def in_repository(profile: str, root: Path = ROOT) -> bool:
    """Whether a profile is one of those in pipelines/profiles/, by its name or by its path."""
    folder = (root / "pipelines" / "profiles").resolve()
    return not profile.endswith(".yaml") or Path(profile).expanduser().resolve().parent == folder


def path_of(profile: str, root: Path, refused: type[Exception]) -> Path:
    """The file of a profile: pipelines/profiles/<profile>.yaml, or the path of a .yaml file anywhere.

    Raises `refused` if there is none, and for a file elsewhere with the name of a profile of this repository: their results
    would share a folder.
    """
    if not profile.endswith(".yaml"):
        path = root / "pipelines" / "profiles" / f"{profile}.yaml"
        if not path.is_file():
            raise refused(f"there is no profile {profile!r}; there are: {', '.join(known(root)) or 'none'}, "
                          "in pipelines/profiles/; or give the path of a .yaml file")
        return path
    path = Path(profile).expanduser().resolve()
    if not path.is_file():
        raise refused(f"there is no profile file {profile}; give the path of a .yaml file, or one of {', '.join(known(root))}")
    if path.stem in known(root) and not in_repository(profile, root):
        raise refused(f"{profile}: this repository has a profile {path.stem!r}, whose results lie in results/{path.stem}; "
                      "rename the file")
    return path


def load(profile: str, root: Path, refused: type[Exception]) -> dict[str, Any]:
    """What a profile's file says. Raises `refused` with file, line and what is wrong if it cannot be read or is no profile."""
    path = path_of(profile, root, refused)
    found = mapping(read_yaml(path, refused), path.name, refused)
    if unknown := [str(key) for key in found if key not in KEYS]:
        raise refused(f"{path.name}: unknown key {', '.join(unknown)}; a profile has {', '.join(KEYS)}")
    if (stale := found.get("stale", "keep")) not in STALE:
        raise refused(f"{path.name}, stale: got {stale!r}; what older source recorded is {' or '.join(STALE)}")
    sample = found.get("sample", 0)
    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 0:
        raise refused(f"{path.name}, sample: got {sample!r}; give a number of tokens, 0 for no sample")
    for experiment, families in mapping(found.get("runs"), f"{path.name}, runs", refused).items():
        if not isinstance(families, list | None):
            raise refused(f"{path.name}, runs.{experiment}: got {families!r}; an experiment is a list of families")
    plugins = found.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise refused(f"{path.name}, plugins: got {plugins!r}; give a list of modules, as [my_block]")
    return found


def mapping(value: Any, where: str, refused: type[Exception]) -> dict:
    """`value`, or an empty mapping for nothing; raises `refused` for what is no mapping."""
    if value is not None and not isinstance(value, dict):
        raise refused(f"{where}: got {value!r}; give a mapping, key: value")
    return value or {}


def plugin_places(profile: Path) -> list[Path]:
    """Where the plugins of a profile's file are looked for before PYTHONPATH and what is installed."""
    return [Path.cwd(), profile.parent]


def import_plugins(profile: str, root: Path, refused: type[Exception]) -> None:
    """Imports the modules that a profile names as `plugins`, from the current folder, beside the profile's file or PYTHONPATH.
    Raises `refused` for one that is not there."""
    places = [str(place) for place in plugin_places(path_of(profile, root, refused))]
    for module in load(profile, root, refused).get("plugins") or []:
        sys.path += [place for place in places if place not in sys.path]  # a worker process gets them as well
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.split(".")[0]:
                raise  # found, and imports what is not installed
            raise refused(f"{name_of(profile)}.yaml, plugins: there is no module {module!r} in {', '.join(places)} or on "
                          f"PYTHONPATH ({os.environ.get('PYTHONPATH') or 'empty'})") from None


def by_hand(profile: str, notebook: str, values: Mapping[str, Any], root: Path = ROOT) -> None:
    """Says where a notebook's parameters, `values`, differ from those that the profile's stage runs it with, so nothing in that
    stage."""
    given = (load(profile, root, ValueError).get("notebooks") or {}).get(notebook) or {}
    differ = [f"{name} = {value!r} (here {values[name]!r})" for name, value in given.items() if values[name] != value]
    if differ:
        print(f"run by hand: {name_of(profile)}.yaml gives this notebook {', '.join(differ)}")


def looks(profile: str, root: Path = ROOT, refused: type[Exception] = ValueError) -> dict[str, Look]:
    """Arm -> its look: what pipelines/arms.yaml says of it, and over that what the profile does. Raises `refused` for a look of
    another kind, and for an arm with two labels or colours in one profile."""
    shared = root / "pipelines" / "arms.yaml"
    found = mapping(read_yaml(shared, refused) if shared.is_file() else {}, shared.name, refused)
    own: dict[str, dict] = {}
    for experiment, families in (load(profile, root, refused).get("runs") or {}).items():
        where = f"{name_of(profile)}.yaml, runs.{experiment}"
        for family in families or []:
            for arm, changes in mapping(mapping(family, where, refused).get("arms"), f"{where}, arms", refused).items():
                for key, value in _look_in(changes).items():
                    if own.setdefault(arm, {}).setdefault(key, value) != value:
                        raise refused(f"{where}, arm {arm}: {key} is {value!r} here and "
                                      f"{own[arm][key]!r} elsewhere in this profile; an arm has one")
    return {arm: _look(arm, {**_look_in(found.get(arm)), **own.get(arm, {})}, refused) for arm in {**found, **own}}


def _look_in(changes: Any) -> dict:
    return {key: changes[key] for key in LOOK if key in changes} if isinstance(changes, dict) else {}


def _look(arm: str, given: dict, refused: type[Exception]) -> Look:
    default = default_look(arm)
    line = given.get("line", default.line)
    if line not in LINES and not _is_dashes(line):
        raise refused(f"arm {arm}: line {line!r}; a line is one of {', '.join(map(repr, LINES))}, or [0, [6, 1]]: an offset "
                      "and an even number of lengths in points, drawn and left out in turn")
    look = Look(given.get("label", arm), given.get("colour", default.colour),
                (line[0], tuple(line[1])) if isinstance(line, list) else line)
    if not isinstance(look.label, str) or not re.fullmatch("#[0-9a-fA-F]{6}", str(look.colour)):
        raise refused(f"arm {arm}: label {look.label!r}, colour {look.colour!r}; a label is text, a colour is '#rrggbb'")
    return look


def _is_dashes(line: Any) -> bool:
    """Whether a line is [offset, [drawn, left out, ...]], in points."""
    if not isinstance(line, list) or len(line) != 2 or not isinstance(line[1], list):
        return False
    offset, lengths = line
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) and one >= 0 for one in (offset, *lengths))
    return numbers and sum(lengths) > 0 and len(lengths) % 2 == 0
