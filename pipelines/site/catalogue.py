"""What the report shows, and how it hangs together: experiment, notebook cell, figure, table, value, claim, runs."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eplib.settings import name_of
from pipelines import paper
from pipelines.common import ROOT, PipelineError, notebook_format, read_json
from pipelines.imports import code_of
from pipelines.plan import Plan, saved_by
from pipelines.site.runs import Recorded
from pipelines.site.text import Text

NUMBER = re.compile(r"E(\d+)")
MEAN = re.compile(r"[+-]?\d+\.(\d+)")  # a number at the beginning of a cell of words
SHORT = {"figure": "fig", "table": "tab", "text": "text"}


@dataclass
class Item:
    """A figure, a table or texts. cell: the id of the notebook's cell that made it; value: a table's or texts' content."""

    kind: str
    id: str
    notebook: str
    cell: str
    heading: str
    caption: str
    value: dict[str, Any]
    claims: list[str] = field(default_factory=list)
    runs: list[list[Recorded]] = field(default_factory=list)  # of each row of a table
    shared: bool = False  # a table whose id is also that of a figure

    @property
    def name(self) -> str:
        """As a link to it reads: a table may share its id with a figure."""
        return f"{self.id} (table)" if self.shared else self.id

    @property
    def heading_alone(self) -> str:
        """The heading above it without its number, which stands before it."""
        return re.sub(r"^[A-Z]\w*\d\w*( and [A-Z]\w*)?: ", "", self.heading)

    @property
    def label(self) -> str:
        """Of its anchor, in the paper as in the report."""
        return f"{SHORT[self.kind]}-{self.id}"

    @property
    def href(self) -> str:
        """Its place, from the report's folder."""
        page = f"experiments/{self.notebook}" if self.notebook else "claims" if self.folder == "claims" else "machine"
        return f"{page}.html#{self.label}"

    @property
    def folder(self) -> str:
        """Of results/<profile>, where it was written."""
        return self.value.get("notebook") or self.notebook or "machine"


@dataclass
class Experiment:
    """A notebook with what it made. cells: those that are shown; executed: whether here, so that they have outputs."""

    name: str
    title: str
    cells: list[Any]
    executed: bool
    recorded: bool
    groups: list[str]
    summary: dict[str, Any]
    summary_cell: str
    items: list[Item] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Of E1 to E10; what has none stands behind them."""
        found = NUMBER.match(self.title)
        return int(found[1]) if found else 99

    def section(self, name: str) -> str:
        """The Markdown of the section of this name without its heading; the first cell's text for the empty name."""
        for cell in self.cells:
            head, _, rest = cell.source.partition("\n")
            if cell.cell_type == "markdown" and (head.startswith("# ") if not name else head.strip() == f"## {name}"):
                return rest.strip()
        return ""


@dataclass(frozen=True)
class Catalogue:
    """Everything that a profile's report shows."""

    profile: str
    experiments: list[Experiment]
    items: dict[str, Item]
    claims: list[dict[str, Any]]
    machine: dict[str, Any]

    def others(self) -> list[dict[str, Any]]:
        """The claims on what notebooks measure that this profile does not run."""
        known = {one.name for one in self.experiments}
        return [claim for claim in self.claims if claim["from"].split("/")[0] not in known]

    def loose(self, folder: str) -> list[Item]:
        """Figures and tables of a folder that no notebook's cell is known to have made."""
        return [item for item in self.items.values() if not item.notebook and item.folder == folder]


def notebook(name: str, profile: str, root: Path) -> tuple[Any, bool]:
    """The notebook to show, and whether it was executed here."""
    executed = root / "results" / name_of(profile) / "notebooks" / f"{name}.ipynb"
    path = executed if executed.is_file() else root / "notebooks" / f"{name}.ipynb"
    return notebook_format().read(path, as_version=4), executed.is_file()


def cell_source(name: str, cell: Any) -> dict[str, Any]:
    """One cell as the readers of normalised notebooks take it."""
    return {"notebook": name, "cells": [{"cell_type": cell.cell_type, "source": cell.source}]}


def experiment(plan: Plan, name: str, root: Path) -> tuple[Experiment, dict[tuple[str, str], tuple[str, str]]]:
    """A notebook without its items yet, and (kind, id) of what its cells save -> (cell, the heading above it)."""
    shown, executed = notebook(name, plan.profile, root)
    places: dict[tuple[str, str], tuple[str, str]] = {}
    heading, summary_cell, title = "", "", name
    for number, cell in enumerate(shown.cells, start=1):
        cell.setdefault("id", f"cell-{number:02d}")
        if cell.cell_type == "markdown" and (found := re.match(r"(#+) (.+)", cell.source)):
            heading, title = found[2], found[2] if found[1] == "#" and title == name else title
        elif cell.cell_type == "code":
            for made in saved_by(cell_source(name, cell)):
                if made.id == "summary":
                    summary_cell = cell.id
                places.setdefault((made.kind, made.id), (cell.id, heading))
            for text in strings(name, cell):  # an id that the cell's code names without the call beside it
                places.setdefault(("named", text), (cell.id, heading))
    results = root / "results" / plan.name / name
    summary = read_json(results / "summary.json") if (results / "summary.json").is_file() else {}
    recorded = (results / "index.json").is_file()
    if not (executed or recorded):
        summary_cell = ""  # its page shows no cells
    return Experiment(name, title, shown.cells, executed, recorded, plan.read[name], summary, summary_cell), places


def strings(name: str, cell: Any) -> set[str]:
    """The strings of a cell's code; none for code that Python cannot read alone."""
    try:
        tree = code_of(cell_source(name, cell))
    except PipelineError:
        return set()
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def collect(profile: str, text: Text, root: Path = ROOT) -> Catalogue:
    """Read everything and tie it together."""
    plan = Plan(profile, root)
    content, machine = paper.collect(profile, root), paper.machine_facts(profile, root)
    read = [experiment(plan, name, root) for name in plan.notebooks]
    items = {}
    for kind, plural in (("figure", "figures"), ("table", "tables"), ("text", "texts")):
        for key, value in (machine.get(plural, {}) | content[plural]).items():
            owner, cell, heading = owner_of(kind, key, value.get("notebook", ""), read)
            found = Item(kind, key, owner, cell, heading, caption_of(f"{SHORT[kind]}-{key}", text), value)
            found.shared = kind == "table" and f"fig-{key}" in items
            items[found.label] = found
    order = {label: place for place, label in enumerate(text.captions)}
    for made, _ in read:
        cells = {cell.id: number for number, cell in enumerate(made.cells)}
        made.items = sorted((item for item in items.values() if item.notebook == made.name),
                            key=lambda item: (cells.get(item.cell, len(cells)), item.kind, item.id))
        made.claims = [claim for claim in content["claims"].values() if claim["from"].split("/")[0] == made.name]
    for claim in content["claims"].values():
        owner = claim["from"].split("/")[0]
        said = text.said.get(claim["id"], [])
        own = {label: item for label, item in items.items() if item.notebook == owner}
        claim["shown"] = shown_for(claim["value"], [label for label in said if label in own], own)
        for label in claim["shown"]:
            items[label].claims.append(claim["id"])
    experiments = sorted((made for made, _ in read), key=lambda made: (
        made.number, min((order.get(item.label, len(order)) for item in made.items), default=len(order)), made.name))
    return Catalogue(profile, experiments, items, list(content["claims"].values()), machine)


def shown_for(value: Any, cited: list[str], items: dict[str, Item]) -> list[str]:
    """What a claim leads to: the tables of its notebook that hold its value, if any those that the paper cites beside it, and
    the figures cited there; where no table holds it, all that is cited."""
    holding = [label for label, item in items.items() if item.kind == "table" and holds(item.value["rows"], value)]
    cited_ones = [label for label in cited if label in holding]
    if not holding:
        return cited
    return [*(cited_ones or holding[:2]), *(label for label in cited if items[label].kind == "figure")]


def holds(rows: list[list[Any]], value: Any) -> bool:
    """Whether a cell is this number, or begins with it as tables print a mean, to two digits that count at the least. A count,
    a zero or a one is in too many tables to be found by its value."""
    def same(cell: Any) -> bool:
        printed = MEAN.match(cell) if isinstance(cell, str) else None
        if printed is None:
            return isinstance(cell, float) and math.isclose(cell, value)
        digits = len(printed[1])
        return float(printed[0]) == round(value, digits) and abs(value) >= 10.0 ** (1 - digits)

    return isinstance(value, float) and value not in (0.0, 1.0) and any(same(cell) for row in rows for cell in row)


def caption_of(label: str, text: Text) -> str:
    """The paper's caption of a figure or table, that of its short table where only that is in the paper."""
    return text.captions.get(label) or text.captions.get(f"{label}-short", "")


def owner_of(kind: str, key: str, folder: str, read: list[tuple[Experiment, dict]]) -> tuple[str, str, str]:
    """The notebook, cell and heading of a thing; of one from the folder of the machine the notebook whose code makes it."""
    asked = (("figure" if kind == "figure" else "result"), key)
    for made, places in read:
        if folder in (made.name, "machine", ""):
            if found := places.get(asked) or (places.get(("named", key)) if folder == made.name else None):
                return made.name, *found
            if folder == made.name:
                return made.name, "", ""
    return "", "", ""
