"""The recorded runs as the report shows them: read from their files alone, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eplib.settings import Look, default_look, name_of
from pipelines.common import ROOT, read_json
from pipelines.site.charts import Chart, Columns, chart, columns

# Column of a table -> the key of a run's configuration that it holds.
COLUMNS = {"learning rate": "optimiser.lr", "seed": "seed", "nudge strength": "estimator.beta", "mixing": "solver.step",
           "width": "model.width", "C": "model.width", "context": "model.context", "strength": "penalties.0.strength",
           "from update": "branch.step"}
FILES = ("config.json", "metrics.json", "curve.csv", "provenance.json", "horizon.json")  # the log is large: its path is given
DRAWN = ("step", "loss", "accuracy", "free_residual_max", "nudged_residual_max", "iterations_mean", "iterations_max",
         "rate_probe", "rate_tail", "gradient_norm")
SUMMARY = ("loss", "accuracy", "settled", "residual_max", "iterations")  # of the final evaluation, in the list of runs


@dataclass(frozen=True)
class Recorded:
    """A run's folder. look: how its arm is named."""

    folder: Path
    machine_folder: Path
    look: Look

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def group(self) -> str:
        return self.folder.parent.name

    @property
    def href(self) -> str:
        """Its page, from the report's folder."""
        return f"runs/{self.group}/{self.name}.html"

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration by dotted keys."""
        return dict(flat(self.config))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return read_json(self.folder / "metrics.json")

    @property
    def provenance(self) -> dict[str, Any]:
        return read_json(self.folder / "provenance.json")

    @property
    def machine(self) -> dict[str, Any]:
        """Where and how long it was trained; empty where that did not travel with it."""
        path = self.machine_folder / "machine.json"
        return read_json(path) if path.is_file() else {}

    @property
    def sample(self) -> str:
        """The text that it wrote, empty where none was asked for."""
        path = self.folder / "sample.txt"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @property
    def files(self) -> list[Path]:
        """What can be downloaded of it."""
        return [self.folder / name for name in FILES if (self.folder / name).is_file()]

    def charts(self) -> list[Chart]:
        """Its curves, those that it has."""
        curve, log = (columns(self.folder / name, DRAWN) for name in ("curve.csv", "log.csv.gz"))

        def of(found: Columns, *keys: str) -> dict[str, tuple[list[float], list[float]]]:
            return {key.replace("_", " "): (found["step"], found[key]) for key in keys if key in found}

        loss = {f"{name}, {where}": xy for found, where in ((log, "training"), (curve, "validation"))
                for name, xy in of(found, "loss").items()}
        drawn = (chart("loss (nats)", loss), chart("accuracy (%)", of(curve, "accuracy")),
                 chart("residual, worst sample", of(log, "free_residual_max", "nudged_residual_max"), log=True),
                 chart("iterations of the free phase", of(log, "iterations_mean", "iterations_max")),
                 chart("rate: probe, tail", of(log, "rate_probe", "rate_tail")),
                 chart("norm of the gradient", of(log, "gradient_norm"), log=True))
        return [made for made in drawn if made]


def outcome(metrics: dict[str, Any], explicit: bool) -> list[Any]:
    """Of the final evaluation what `SUMMARY` names; a network without phases has none to settle. Runs that recorded no more
    than the median residual know between which shares the settled ones lie."""
    found = dict(metrics["final"])
    if isinstance(share := found.get("settled"), list):
        low, high = share
        found["settled"] = {(0.5, 1.0): "≥ 0.5", (0.0, 0.5): "< 0.5"}.get((low, high), "?")
    return [None if explicit and key in ("settled", "residual_max", "iterations") else found.get(key) for key in SUMMARY]


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings and lists, by dotted keys; a list of leaves is one."""
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        value = ", ".join(map(str, value)) or None
    if isinstance(value, dict | list) and value:
        for part, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{key}.{part}" if key else str(part))
    else:
        yield key, None if value == {} else value


def recorded(profile: str, looks: dict[str, Look], root: Path = ROOT) -> dict[str, list[Recorded]]:
    """Group -> its finished runs, by arm, learning rate and seed."""
    results = root / "results" / name_of(profile)
    found: dict[str, list[Recorded]] = {}
    for path in sorted(results.glob("runs/*/*/metrics.json")):
        folder = path.parent
        arm = re.sub(r"-lr[0-9].*", "", folder.name)
        run = Recorded(folder, results / "machine" / "runs" / folder.parent.name / folder.name,
                       looks.get(arm) or default_look(arm))
        found.setdefault(run.group, []).append(run)
    return found


def varying(some: list[Recorded]) -> dict[str, str]:
    """The settings in which the runs of a group differ, each with its name in tables; the learning rate always."""
    names = {key: head for head, key in COLUMNS.items() if head not in ("seed", "C")}
    return {key: head for key, head in names.items()
            if key == "optimiser.lr" or len({str(run.settings.get(key)) for run in some}) > 1}


def of_rows(table: dict[str, Any], groups: dict[str, list[Recorded]]) -> list[list[Recorded]]:
    """For each row of a table the runs that it is made of, none where it does not say: those whose arm one of its words names,
    whose configuration has the values in its columns, and which are as many as its seeds. Of the group that explains most rows
    and contradicts fewest, the first of equals; none where fewer than half of the rows are explained, or where the table says
    that it is not made of runs (`runs: false`)."""
    best: list[list[Recorded]] = [[] for _ in table["rows"]]
    most = 0
    for runs in groups.values() if table.get("runs", True) else ():
        found = [matching(table["columns"], row, runs) for row in table["rows"]]
        explained, contradicted = sum(map(bool, found)), found.count(None)
        if explained - contradicted > most and 2 * explained >= len(found):
            best, most = [among or [] for among in found], explained - contradicted
    return best


def matching(heads: list[str], row: list[Any], runs: list[Recorded]) -> list[Recorded] | None:
    """The runs of one group that a row is made of; none where it speaks of no arm or setting of theirs, None where it speaks of
    them and says something else."""
    cells = dict(zip(heads, row, strict=True))
    labels = {run.look.label for run in runs}
    named = next((value for value in row if isinstance(value, str) and value in labels), None)  # a later one is beside it
    asked = {COLUMNS[head]: value for head, value in cells.items() if head in COLUMNS and isinstance(value, int | float)}
    other = named is None and (isinstance(row[0], str) or len(asked) < 2)  # about something else, or about next to nothing
    if cells.get("recorded") == "no" or other or (runs and cells.get("runs of", runs[0].group) != runs[0].group):
        return []
    found = [run for run in runs if (named is None or run.look.label == named)
             and all(close(run.settings.get(key), value) for key, value in asked.items() if key in run.settings)]
    count = cells.get("seeds", cells.get("n", len(found)))
    return found if found and count == len(found) else None


def close(setting: Any, value: float) -> bool:
    """Whether a setting is the number that a table prints."""
    return isinstance(setting, int | float) and abs(setting - value) <= 1e-6 + 1e-3 * abs(value)
