"""Writes the pages of a profile's report and the files beside them."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eplib import settings, verdicts
from eplib.settings import name_of
from pipelines import claims, paper
from pipelines.common import ROOT, PipelineError, dumps, write_text
from pipelines.site import notebooks, pages, runs, search, text
from pipelines.site.catalogue import Catalogue, Experiment, collect

KINDS = {verdicts.HOLDS: "holds", verdicts.FAILS: "fails", verdicts.UNDECIDED: "open"}  # verdict -> its class and address
DRAWN = """{% from "macros.html" import show with context %}{{ show(item, up, false) }}"""


class Site:
    """One report in the making. folder: where it is written."""

    def __init__(self, profile: str, folder: Path, root: Path = ROOT):
        self.profile, self.folder, self.root = profile, folder, root
        self.text = text.read(profile, root)
        self.all: Catalogue = collect(profile, self.text, root)
        self.runs = runs.recorded(profile, settings.looks(profile, root, PipelineError), root)
        self.pdf = paper.content_path(profile, root).with_name("paper.pdf")
        self.context = {"profile": name_of(profile), "pdf": self.pdf.is_file(), "smoke": name_of(profile) == "smoke",
                        "kinds": KINDS, "again": partial(claims.again, name_of(profile))}
        self.index: list[search.Entry] = []

    def page(self, template: str, place: str, *, indexed: bool = True, **values: Any) -> None:
        """Write a page, and take its sections into the index of the search."""
        made = pages.render(template, place, **self.context, **values)
        write_text(self.folder / place, made)
        if indexed:
            self.index += search.entries(place, pages.soup_of(made))

    def write(self) -> None:
        """Every page and every file."""
        self.tie()
        self.copy_files()
        self.front()
        self.claims()
        self.text_page()
        for number, one in enumerate(self.all.experiments):
            before, after = (self.all.experiments[at] if 0 <= at < len(self.all.experiments) else None
                             for at in (number - 1, number + 1))
            self.experiment(one, before, after)
            self.notebook(one)
        self.machine()
        self.run_pages()
        write_text(self.folder / "assets" / "search.js", search.script(self.index))

    # --- what hangs together ---

    def tie(self) -> None:
        """Give each figure its size and files, each table its runs, each claim its figures."""
        groups = {one.name: {group: self.runs.get(group, []) for group in (one.name, *one.groups)}
                  for one in self.all.experiments}
        for item in self.all.items.values():
            item.runs = []
            if item.kind == "figure":
                source = self.root / item.value["path"].lstrip("/")
                item.value["kinds"] = [kind for kind in ("csv", "pdf", "svg") if source.with_suffix(f".{kind}").is_file()]
                item.value["size"] = size_of(source.with_suffix(".svg"))
            elif item.kind == "table":
                item.runs = runs.of_rows(item.value, groups.get(item.notebook, {}))
        summaries = {one.name: one.summary for one in self.all.experiments}
        for number, claim in enumerate(self.all.claims, start=1):
            claim["number"] = f"C{number}"  # as the paper has it
            file, _, key = claim["from"].partition(": ")
            top, notebook = key.split(".")[0], file.split("/")[0]
            claim["key"] = top if file.endswith("/summary.json") and top in summaries.get(notebook, {}) else ""
            claim["measured"] = claims.measured(claim)
            claim["evidence"] = [self.all.items[label] for label in claim["shown"]]
            claim["said"] = claim["id"] in self.text.said

    def copy_files(self) -> None:
        """Figures, tables and values to download, style and script."""
        shutil.copytree(pages.HERE / "assets", self.folder / "assets")
        write_text(self.folder / "assets" / "style.css", (pages.HERE / "assets" / "style.css").read_text() + code_style())
        for item in self.all.items.values():
            place = self.folder / "data" / (item.notebook or "machine") / item.id
            if item.kind == "figure":
                (self.folder / "figures").mkdir(parents=True, exist_ok=True)
                for kind in item.value["kinds"]:
                    shutil.copy((self.root / item.value["path"].lstrip("/")).with_suffix(f".{kind}"), self.folder / "figures")
            else:
                write_text(place.with_name(f"{item.id}.json"), dumps(item.value))
            if item.kind == "table":
                write_text(place.with_name(f"{item.id}.csv"), table_csv(item.value))
        if self.pdf.is_file():
            shutil.copy(self.pdf, self.folder)
        for one in self.all.experiments:
            if one.summary:
                write_text(self.folder / "data" / one.name / "summary.json", dumps(one.summary))

    # --- pages ---

    def counts(self) -> dict[str, list[dict[str, Any]]]:
        """Verdict -> its claims, in the order holds, fails, not decided."""
        return {word: [claim for claim in self.all.claims if claim["verdict"] == word] for word in KINDS} \
            if self.all.claims else {}

    def front(self) -> None:
        counts = self.counts()
        reasons: dict[str, list[dict[str, Any]]] = {}
        for claim in counts.get(verdicts.UNDECIDED, []):
            reasons.setdefault(claims.reason(claim["why"]), []).append(claim)
        reasons = dict(sorted(reasons.items(), key=lambda found: -len(found[1])))
        headline = [self.all.items[f"fig-{name}"] for name in self.text.headline if f"fig-{name}" in self.all.items]
        by_id = {claim["id"]: claim for claim in self.all.claims}
        self.page("index.html", "index.html", abstract=self.text.abstract, counts=counts, reasons=reasons, headline=headline,
                  leading=[by_id[name] for name in claims.HEADLINES if name in by_id], experiments=self.all.experiments)

    def claims(self) -> None:
        groups: list[tuple[Experiment | None, list]] = [(one, one.claims) for one in self.all.experiments if one.claims]
        groups += [(None, self.all.others())] if self.all.others() else []
        self.page("claims.html", "claims.html", groups=groups, counts=self.counts(), loose=self.all.loose("claims"))

    def text_page(self) -> None:
        def drawn(label: str) -> str | None:
            item = self.all.items.get(label)
            if item is None or (item.kind == "table" and not item.value["rows"]):
                return None
            return pages.environment().from_string(DRAWN).render(item=item, up="", **self.context)

        body = pages.soup_of(text.page(self.text, drawn, {claim["id"]: KINDS[claim["verdict"]] for claim in self.all.claims}))
        found = notebooks.headings(body)
        self.page("paper.html", "paper.html", body=body.decode(), headings=found, style=Markup(self.text.style))

    def experiment(self, one: Experiment, before: Experiment | None, after: Experiment | None) -> None:
        users: dict[str, list[str]] = {}
        for claim in one.claims:
            users.setdefault(claim["key"], []).append(claim["id"])
        values = [(key, shown(value), users.get(key, [])) for key, value in sorted(one.summary.items())]
        self.page("experiment.html", f"experiments/{one.name}.html", one=one, before=before, after=after, values=values,
                  question=pages.markdown(one.section("")), reading=pages.markdown(one.section("Reading")),
                  groups=[group for group in one.groups if group in self.runs])

    def notebook(self, one: Experiment) -> None:
        place = f"notebooks/{one.name}.html"
        if not one.executed and not one.recorded:
            missing = Markup('<p class="missing">missing: notebook {} has not been run at profile {}</p>').format(
                one.name, name_of(self.profile))
            self.page("notebook.html", place, one=one, headings=[], note="", body=missing)
        else:
            body, found = notebooks.body(one, self.folder / "notebooks", **self.context)
            self.page("notebook.html", place, one=one, headings=found, body=body,
                      note="" if one.executed else notebooks.NOT_EXECUTED)
        shutil.copy(self.source_of(one), self.folder / "notebooks")

    def source_of(self, one: Experiment) -> Path:
        executed = self.root / "results" / name_of(self.profile) / "notebooks" / f"{one.name}.ipynb"
        return executed if one.executed else self.root / "notebooks" / f"{one.name}.ipynb"

    def machine(self) -> None:
        self.page("machine.html", "machine.html", here=self.all.machine["here"], training=self.all.machine["training"],
                  loose=self.all.loose("machine"))

    def run_pages(self) -> None:
        readers = {group: [one for one in self.all.experiments if group in one.groups] for group in self.runs}
        self.page("runs.html", "runs/index.html", groups=self.runs, readers=readers)
        for group, some in self.runs.items():
            apart = runs.varying(some)
            rows = [(run, [*(run.settings.get(key) for key in apart), run.config["seed"], run.config["steps"],
                           *runs.outcome(run.metrics, run.settings.get("estimator.kind") == "Backprop")]) for run in some]
            heads = ["run", *apart.values(), "seed", "steps", *(key.replace("_", " ") for key in runs.SUMMARY)]
            self.page("group.html", f"runs/{group}/index.html", group=group, rows=rows, columns=heads)
            for run in some:
                self.run_page(run, ", ".join(f"{head} {pages.number(run.settings.get(key))}" for key, head in apart.items()))

    def run_page(self, run: runs.Recorded, apart: str) -> None:
        """A run's page; `apart` says what tells it from the others of its arm."""
        beside = self.folder / "runs" / run.group / run.name
        beside.mkdir(parents=True)
        for file in run.files:
            shutil.copy(file, beside)
        log = (run.folder / "log.csv.gz").relative_to(self.root)
        self.page("run.html", run.href, indexed=False, run=run, files=run.files, log=log, charts=run.charts(),
                  metrics=dict(runs.flat(run.metrics)), provenance=dict(runs.flat(run.provenance | run.machine)))
        title = f"{run.group}: {run.look.label}, {apart}, seed {run.config['seed']}"
        self.index.append(search.Entry(title, run.href, f"run {run.name} {run.sample[:200]}"))


def size_of(svg: Path) -> tuple[int, int]:
    """Width and height of a figure on the page, in its pixels: 1.6 times what it is printed at."""
    head = svg.read_text(encoding="utf-8").partition("<svg ")[2].partition(">")[0]
    width, height = (float(re.findall(rf'\b{side}="([\d.]+)', head)[0]) for side in ("width", "height"))
    return round(1.6 * width), round(1.6 * height)


def table_csv(table: dict[str, Any]) -> str:
    """A table's columns and rows as CSV; what is missing is empty."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerows([table["columns"], *table["rows"]])
    return made.getvalue()


def shown(value: Any) -> str:
    """A value of a summary in words: over seeds the mean and its interval."""
    if isinstance(value, dict) and "mean" in value:
        return claims.measured({"value": value["mean"], "unit": "", **{key: value.get(key) for key in ("low", "high", "n")}})
    if isinstance(value, dict) and "value" in value:
        told = {key: one for key, one in value.items() if key not in ("value", "undecided")}
        return pages.number(value["value"]) + "".join(f", {key} {pages.number(one)}" for key, one in told.items()) + (
            f" (decides nothing: {value['undecided']})" if value.get("undecided") else "")
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)[:300]
    return pages.number(value)


def code_style() -> str:
    """Colours of code, for a light and a dark page."""
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("vs", "github-dark"))
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n.highlight {{ background: none; }}\n"


def write(profile: str, folder: Path, root: Path = ROOT) -> None:
    """Write the report of a profile into a folder."""
    Site(profile, folder, root).write()

