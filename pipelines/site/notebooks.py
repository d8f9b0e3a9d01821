"""A notebook as the body of a page: nbconvert's, with an anchor at each cell, links from a cell to what it made, and pictures
as files of their own, so that a page opens before they are read."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from markupsafe import Markup

from pipelines.common import PipelineError, write_text
from pipelines.site.catalogue import Experiment, Item
from pipelines.site.pages import HERE, environment, labelled, mathml, soup_of

NOT_EXECUTED = "Its results are recorded; the notebook has not been executed here. Below a cell stands what was recorded of it."
PICTURE = re.compile(r"data:image/(png|jpeg|svg\+xml);base64,(.*)", re.DOTALL)
MADE = """{% from "macros.html" import show with context %}
<p class="made">
{%- if not shown %}{% for item in items %}<a href="{{ up }}{{ item.href }}">{{ item.name }}</a> {% endfor %}{% endif %}
{%- if values %}<a href="{{ up }}experiments/{{ values }}.html#values">values</a>{% endif %}</p>
{% if shown %}{% for item in items %}{{ show(item, up, false) }}{% endfor %}{% endif %}"""


def body(one: Experiment, folder: Path, **context: Any) -> tuple[Markup, list[tuple[int, str, str]]]:
    """The cells as HTML, and (level, anchor, text) of each heading. folder: where the pictures go."""
    from nbconvert import HTMLExporter

    notebook = _notebook(one)
    after = {cell.id: _after(one, cell.id, context) for cell in notebook.cells}
    exporter = HTMLExporter(template_name="cells", extra_template_basedirs=[str(HERE / "templates")], exclude_anchor_links=True)
    made, _ = exporter.from_notebook_node(notebook, resources={"after": after})
    soup = soup_of(made)
    for number, image in enumerate(soup.find_all("img"), start=1):
        if found := PICTURE.fullmatch(str(image.get("src", ""))):
            name = f"{one.name}-{number}.{found[1].partition('+')[0]}"
            write_text(folder / name, base64.b64decode(found[2]))
            image["src"], image["loading"] = name, "lazy"
            image["alt"] = f"Output of a cell of the notebook {one.name}"
    labelled(soup)
    contents = headings(soup)
    return Markup(soup.decode()), contents


def _notebook(one: Experiment) -> Any:
    """The notebook with MathML in place of its formulas."""
    from pipelines.common import notebook_format

    new = notebook_format().v4.new_notebook(cells=[cell.copy() for cell in one.cells])
    for cell in new.cells:
        if cell.cell_type == "markdown":
            try:
                cell.source = mathml(cell.source)
            except PipelineError as error:
                raise PipelineError(f"notebooks/{one.name}.ipynb: {error}") from error
    return new


def _after(one: Experiment, cell: str, context: dict[str, Any]) -> str:
    """What stands below a cell: links to what it made, and that itself where the notebook has no outputs here."""
    items: list[Item] = [item for item in one.items if item.cell == cell]
    values = one.name if cell == one.summary_cell and one.summary else ""
    if not items and not values:
        return ""
    return environment().from_string(MADE).render(items=items, values=values, shown=not one.executed, up="../", **context)


def headings(soup: BeautifulSoup) -> list[tuple[int, str, str]]:
    """(level, anchor, text) of each heading that has an anchor; one that has none is given one."""
    found, taken = [], {str(tag["id"]) for tag in soup.find_all(id=True)}
    for number, tag in enumerate(soup.find_all(["h2", "h3"]), start=1):
        text = tag.get_text(" ", strip=True).removesuffix("¶").strip()
        if not tag.get("id") or not re.fullmatch(r"[\w.-]+", str(tag["id"])):
            tag["id"] = next(name for name in (re.sub(r"[^\w]+", "-", text.lower()).strip("-"), f"heading-{number}")
                             if name and name not in taken)
            taken.add(str(tag["id"]))
        words = Markup(tag.decode_contents().removesuffix("¶")) if tag.find("math") and not tag.find("a") else text
        found.append((int(tag.name[1]), str(tag["id"]), words))
    return found


