"""The HTML report: an index of every claim, figure and table, and the executed notebooks. It reads without a network
and runs no script.

    python -m pipelines.report --profile P      write paper/build/P/report/index.html, stamp results/P/report.json

Formulas become MathML, which browsers set themselves; figures and pictures lie inside the report's folder or inside
its pages.
"""

from __future__ import annotations

import hashlib
import html
import re
import shutil
from pathlib import Path
from typing import Any

from eplib import markup, verdicts
from eplib.settings import name_of
from pipelines import claims, paper
from pipelines.common import (
    ROOT,
    PipelineError,
    command,
    dumps,
    for_profile,
    load_profile,
    notebook_format,
    planned,
    write_text,
)

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1d2327; max-width: 62rem; margin: 2rem auto; }
body { padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { border-bottom: 1px solid #d5d9dd; margin-top: 2.5rem; padding-bottom: .2rem; }
a { color: #0b5cad; }
code, pre { font-family: "DejaVu Sans Mono", monospace; font-size: .85em; }
pre { background: #f6f7f8; padding: .6rem .8rem; overflow-x: auto; border-radius: 4px; }
table { border-collapse: collapse; font-size: .9em; margin: .6rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e3e6e8; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #9aa2a9; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 1.5rem 1rem 0; display: inline-block; }
figure img { border: 1px solid #e3e6e8; background: white; }
img, svg { max-width: 100%; height: auto; }
math[display="block"] { margin: .8rem 0; }
p:has(> math[display="block"]) { overflow-x: auto; overflow-y: hidden; }
blockquote { white-space: pre-wrap; }
.wide { overflow-x: auto; }
.holds { color: #00695c; font-weight: 600; }
.fails, .missing { color: #b00020; font-weight: 600; }
.open { color: #5a6268; font-style: italic; }
.note { color: #5a6268; font-size: .85em; }
.smoke { background: #fdecea; color: #b00020; padding: .6rem 1rem; font-weight: 600; }
.prompt { color: #8a9299; font-size: .75em; }
"""
# Code is left alone: a fenced or indented block, a code span, or an escaped dollar sign; then display and inline
# formulas.
MATH = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]+`|\\\$)|\$\$(.+?)\$\$|\$(?!\s)((?:\\.|[^$\\])+?)(?<!\s)\$", re.DOTALL)


def mathml(markdown: str) -> str:
    """Markdown in which every $formula$ and $$formula$$ has become MathML; raises PipelineError for one that cannot."""
    from latex2mathml.converter import convert

    def replace(match: re.Match[str]) -> str:
        code, block, inline = match.groups()
        if code is not None:
            return code
        formula = block if block is not None else inline
        try:
            made = convert(formula.strip(), display="block" if block is not None else "inline")
        except (
            Exception
        ) as error:  # the library raises many types; a formula that is not set must be seen, whatever its fault
            raise PipelineError(
                f"the report cannot set the formula {formula.strip()!r}: {type(error).__name__} {error}"
            ) from error
        if unknown := re.findall(r"\\[A-Za-z]+", made):  # a command it does not know is left standing as text
            raise PipelineError(
                f"the report cannot set {', '.join(unknown)} in the formula {formula.strip()!r}; write it another way"
            )
        return made

    return MATH.sub(replace, markdown)


def page(title: str, body: str, profile: str) -> str:
    """A whole HTML page."""
    from pygments.formatters import HtmlFormatter

    banner = '<p class="smoke">smoke profile: proves nothing</p>' if name_of(profile) == "smoke" else ""
    code = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}\n<style>{STYLE}\n{code}</style></head>\n'
        f"<body>{banner}\n{body}\n</body></html>\n"
    )


def notebook_page(path: Path, profile: str, note: str = "") -> str:
    """A notebook with the outputs that it holds as an HTML page."""
    nbformat = notebook_format()
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            try:
                cell.source = mathml(cell.source)
            except PipelineError as error:
                raise PipelineError(f"notebooks/{path.stem}.ipynb: {error}") from error
    body, _ = HTMLExporter(template_name="basic", exclude_anchor_links=True).from_notebook_node(notebook)
    back = '<p><a href="../index.html">All figures and tables</a></p>'
    back += f'\n<p class="note">{note}</p>' if note else ""
    return page(path.stem, f'{back}\n<main class="notebook">{body}</main>\n{back}', profile)


def figure(name: str, where: dict[str, str]) -> str:
    """A figure of the report's folder as HTML, with links to its PDF and SVG."""
    links = " · ".join(f'<a href="figures/{name}.{kind}">{kind.upper()}</a>' for kind in ("pdf", "svg"))
    return (
        f'<figure><img src="figures/{name}.svg" alt="Figure {name}"><figcaption>{name} · {links}</figcaption></figure>'
    )


def claims_table(decided: dict[str, dict[str, Any]]) -> str:
    """The claims with their verdicts as HTML."""
    if not decided:
        return '<p class="missing">missing: the claims have not been decided</p>'
    kinds = {verdicts.HOLDS: "holds", verdicts.FAILS: "fails", verdicts.UNDECIDED: "open"}
    rows = []
    for claim in decided.values():
        absent = ' class="missing"' if claim["value"] is None else ""
        why = f'<br><span class="note">{html.escape(claim["why"])}</span>' if claim["why"] else ""
        verdict = f'<td class="{kinds[claim["verdict"]]}">{claim["verdict"]}{why}</td>'
        before = f'<br><span class="note">replaces {html.escape(claim["replaces"])}</span>' if claim["replaces"] else ""
        text, asked, place, value = (html.escape(part) for part in (
            claim["text"], claim["asked"], claim["from"], claims.measured(claim)))
        rows.append(f"<tr><td>{text}{before}</td><td{absent}>{value}</td><td>{asked}</td>{verdict}"
                    f"<td>{claim['written']}</td><td><code>{place}</code></td></tr>")
    head = "".join(f"<th>{name}</th>" for name in ("claim", "measured", "asked", "verdict", "written", "read from"))
    note = (
        '<p class="note">Over seeds: the mean, its 95 % interval and the number of seeds. The interval decides: a claim '
        "holds if all of it meets what is asked, fails if all of it breaks it, and is otherwise not decided; fewer than three "
        "seeds decide nothing. Written: when the claim with this bound was written.</p>"
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def texts(name: str, value: dict[str, Any]) -> str:
    """Generated texts as HTML."""
    items = (
        f"<h4>{html.escape(item['arm'])}</h4><blockquote>{html.escape(item['text'])}</blockquote>"
        for item in value["texts"]
    )
    return f"<h3>{html.escape(name)}. {html.escape(value.get('title', ''))}</h3>{''.join(items)}"


def index_page(profile: str, names: list[str], content: dict[str, Any], machine: dict[str, Any]) -> str:
    """The first page: claims, then figures and tables under the notebook that made them, then what depends on the
    machine."""
    parts = [
        "<h1>Equilibrium propagation for transformers</h1>",
        f'<p>Profile <b>{profile}</b>. <a href="../paper.pdf">The paper as PDF</a>. Notebooks: '
        + " · ".join(f'<a href="notebooks/{name}.html">{name}</a>' for name in names)
        + "</p>",
        "<h2>Claims</h2>",
        claims_table(content["claims"]),
    ]
    for name in names:
        parts.append(
            f'<h2 id="{name}">{name}</h2><p>Made by <a href="notebooks/{name}.html">notebooks/{name}.ipynb</a>.</p>'
        )
        drawn = [figure(key, value) for key, value in content["figures"].items() if value["notebook"] == name]
        tables = [markup.table(key, value) for key, value in content["tables"].items() if value["notebook"] == name]
        parts += drawn + tables or ['<p class="missing">missing: this notebook has made no figure and no table</p>']
        parts += [texts(key, value) for key, value in content["texts"].items() if value["notebook"] == name]
    here = machine["here"]
    versions = ", ".join(f"{key} {value}" for key, value in here["versions"].items())
    parts.append(
        f"<h2>This machine</h2><p>{html.escape(here['processor'])}, {here['cores']} cores. {html.escape(versions)}.</p>"
    )
    parts += [figure(key, value) for key, value in machine["figures"].items()]
    parts += [markup.table(key, value) for key, value in machine["tables"].items()]
    if machine["training"]:
        value = {
            "title": "where and how long",
            "columns": ["runs of", "machine", "library", "runs", "minutes"],
            "rows": machine["training"],
        }
        parts.append(markup.table("Training", value))
    return page(f"Equilibrium propagation for transformers ({profile})", "\n".join(parts), profile)


def folder_of(profile: str, root: Path = ROOT) -> Path:
    """Where the report lies."""
    return root / "paper" / "build" / name_of(profile) / "report"


def page_of(name: str, profile: str, root: Path) -> str:
    """A notebook's page: executed here; else, where its results are recorded, without outputs; else that it is missing."""
    results = root / "results" / name_of(profile)
    if (executed := results / "notebooks" / f"{name}.ipynb").is_file():
        return notebook_page(executed, profile)
    if not (results / name / "index.json").is_file():
        return page(name, f'<p class="missing">missing: notebook {name} has not been run at profile {profile}</p>', profile)
    note = "Its results are recorded; the notebook has not been executed here, so its outputs are not shown."
    return notebook_page(root / "notebooks" / f"{name}.ipynb", profile, note)


def build(profile: str, root: Path = ROOT) -> Path:
    """Write the report beside its place, move it there as a whole, and return its first page."""
    names = planned(load_profile(profile, root), root)
    final = folder_of(profile, root)
    draft = final.with_name("report.part")
    shutil.rmtree(draft, ignore_errors=True)
    content, machine = paper.collect(profile, root), paper.machine_facts(profile, root)
    for name in names:
        write_text(draft / "notebooks" / f"{name}.html", page_of(name, profile, root))
    (draft / "figures").mkdir(parents=True)
    for value in (machine["figures"] | content["figures"]).values():
        source = root / value["path"].lstrip("/")
        for kind in (".pdf", ".svg"):
            shutil.copy(source.with_suffix(kind), draft / "figures")
    write_text(draft / "index.html", index_page(profile, names, content, machine))
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    return final / "index.html"


def write(profile: str, root: Path = ROOT) -> Path:
    """Write the report, then the stamp results/<profile>/report.json: what it was made of; returns the first page."""
    index = build(profile, root)
    content = paper.collect(profile, root)
    folder = root / "results" / name_of(profile) / "notebooks"
    executed = sorted(folder.glob("*.ipynb")) if name_of(profile) != "paper" else []  # whose are not in git
    stamp = {
        "claims": {key: value["verdict"] for key, value in content["claims"].items()},
        "figures": {key: value["sha256"] for key, value in content["figures"].items()},
        "tables": sorted(content["tables"]),
        "notebooks": {
            p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in executed if not p.stem.endswith(".failed")
        },
    }
    write_text(root / "results" / name_of(profile) / "report.json", dumps(stamp))
    return index


def show(profile: str) -> None:
    """Write, and say what was written."""
    print(f"report: {write(profile).relative_to(ROOT)}")


if __name__ == "__main__":
    command(lambda: for_profile("report", __doc__, show))
