"""What the stages of a profile are made from: its notebooks, its groups of runs, the code and the settings that decide each."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from eplib import settings
from eplib.sources import without_comments
from pipelines import cells
from pipelines.common import PipelineError, load_profile, planned
from pipelines.imports import closure, code_of, imports, module_file

CLASS = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):\w+")  # module:Class, a kind that a user's own file defines
SAVING = {"save": ("figure", 1, 3), "save_result": ("result", 2, 1), "save_machine": ("result", 1, None)}
# call -> what it makes, and which argument is its id, which the folder


class Made(NamedTuple):
    """A figure or a result (a table, texts, data) that a call in a notebook writes."""

    kind: str  # figure | result
    id: str
    folder: str  # of results/<profile> or figures/<profile>: the notebook's name, or machine


class Plan:
    """One profile as read from its file and the notebooks; raises PipelineError for what cannot become stages."""

    def __init__(self, profile: str, root: Path):
        self.profile, self.root = profile, root
        self.name, self.settings = settings.name_of(profile), load_profile(profile, root)
        self.path = settings.path_of(profile, root, PipelineError)
        self.in_git = self.name == "paper"
        self.groups = sorted(self.settings.get("runs") or {})
        self.notebooks = {name: cells.normalise(name, cells.load_notebook(name, root))
                          for name in planned(self.settings, root)}
        check_ids(self.notebooks.values())

    @cached_property
    def read(self) -> dict[str, list[str]]:
        """Notebook -> the groups of runs that it reads: its own, and those whose names stand in its code as strings."""
        return {name: sorted({*self.groups} & {name, *strings(source)}) for name, source in self.notebooks.items()}

    @cached_property
    def plugins(self) -> dict[str, Path]:
        """Module -> file of what the profile brings from outside eplib: its `plugins`, and the modules of module:Class."""
        classes = filter(None, map(CLASS.fullmatch, texts(self.settings.get("runs"))))
        named = {*(self.settings.get("plugins") or []), *(found[1] for found in classes)}
        places = settings.plugin_places(self.path)
        found = ((name, module_file(name, place)) for name in sorted(named) for place in (self.root, *places))
        return {name: path for name, path in reversed([(name, path) for name, path in found if path])}

    def decides(self) -> dict[str, dict[str, Any]]:
        """Stage -> what decides its outcome beside its data: digests of its code, without comments, and its settings."""
        own, read, digests = self.settings.get("notebooks") or {}, dict[Path, set[str]](), dict[str, str]()

        def code(*start: str) -> dict[str, str]:
            files = closure(start, self.root, read)
            digests.update({path: digest(self.root / path) for path in files if path not in digests})
            return {path: digests[path] for path in files}

        made: dict[str, dict[str, Any]] = {stage: {"code": code(f"pipelines.{stage}")}
                                           for stage in ("claims", "paper", "report")}
        made["report"]["templates"] = {str(path.relative_to(self.root)): digest(path) for path in templates(self.root)}
        plugins = {str(path): digest(path) for path in self.plugins.values()}
        if not self.in_git:  # the paper profile's runs take hours, on any machine: no stage trains them
            made["data"] = {"code": code("pipelines.data")}
            made["train"] = {"code": code("pipelines.train") | plugins, "stale": self.settings.get("stale"),
                             "runs": {group: bare(self.settings["runs"][group]) for group in self.groups}}
        looks = self.root / "pipelines" / "arms.yaml"
        for name, source in self.notebooks.items():
            made[f"notebook-{name}"] = {
                "code": code("pipelines.notebook", *imports(code_of(source), None, self.root)) | plugins,
                "parameters": own.get(name),
                "runs": {group: self.settings["runs"][group] for group in self.read[name]},
                "looks": digest(looks) if looks.is_file() else None}
        return made


def templates(root: Path) -> list[Path]:
    """What the report's pages are made from beside its code, sorted."""
    site = root / "pipelines" / "site"
    return sorted(path for part in ("templates", "assets") for path in (site / part).rglob("*") if path.is_file())


def digest(path: Path) -> str:
    """Digest of a file; in Python comments and docstrings do not count."""
    data = without_comments(path.read_text(encoding="utf-8")).encode() if path.suffix == ".py" else path.read_bytes()
    return hashlib.sha256(data).hexdigest()[:16]


def strings(source: dict[str, Any]) -> set[str]:
    """The strings in a notebook's code."""
    return {node.value for node in ast.walk(code_of(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def texts(value: Any) -> Iterable[str]:
    """Every string among the values of nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


def bare(families: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """A group of runs without its arms' labels and colours: those decide no number."""
    def without(changes: Any) -> Any:
        if not isinstance(changes, dict):
            return changes
        return {key: value for key, value in changes.items() if key not in settings.LOOK}

    return [{**family, "arms": {arm: without(changes) for arm, changes in (family.get("arms") or {}).items()}}
            for family in families or []]


def saved_by(source: dict[str, Any]) -> set[Made]:
    """The figures and results that a notebook's calls save under a name, its summary among them.

    Raises PipelineError for one that it writes into another notebook's folder.
    """
    found = set()
    for call in (node for node in ast.walk(code_of(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if name not in SAVING:
            continue
        kind, place, folder = SAVING[name]
        values = [str(value.value) if isinstance(value, ast.Constant) else "" for value in call.args] + [""] * 4
        made = Made(kind, values[place], values[folder] if folder is not None else "machine")
        if made.folder not in ("", source["notebook"], "machine"):
            raise PipelineError(f"notebooks/{source['notebook']}.ipynb: {name} writes into the folder of {made.folder!r}; give "
                                f"{source['notebook']!r}, or 'machine' for what depends on the machine")
        if made.id:
            found.add(made)
    return found


def made_by(source: dict[str, Any]) -> set[Made]:
    """The figures and results of `saved_by` but for the summary."""
    return {made for made in saved_by(source) if made.id != "summary"}


def check_ids(sources: Iterable[dict[str, Any]]) -> None:
    """Raise PipelineError if two notebooks make a figure or a result of one id: one would replace the other in the paper."""
    owners: dict[tuple[str, str], str] = {}
    for source in sources:
        for made in sorted(made_by(source)):
            if owners.setdefault(made[:2], source["notebook"]) != source["notebook"]:
                raise PipelineError(f"the notebooks {owners[made[:2]]} and {source['notebook']} both make the {made.kind} "
                                    f"{made.id!r}; give one of them another id")
