"""How a page is made: jinja2's templates in templates/, formulas as MathML, tables whose cells know their column."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from eplib.experiments.words import compact
from pipelines.common import PipelineError

HERE = Path(__file__).parent
# Code is left alone: a fenced or indented block, a code span, or an escaped dollar sign; then display and inline
# formulas.
MATH = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]+`|\\\$)|\$\$(.+?)\$\$|\$(?!\s)((?:\\.|[^$\\])+?)(?<!\s)\$", re.DOTALL)


@cache
def environment() -> Environment:
    """jinja2 with this folder's templates; a name that a page was not given is an error."""
    made = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
                       undefined=StrictUndefined)
    made.filters |= {"number": number, "plain": plain, "breakable": breakable, "compact": compact, "numeric": numeric}
    return made


def render(template: str, place: str, **values: Any) -> str:
    """The page of a template; `place` is its path in the report, from which every link of it starts."""
    up = "../" * place.count("/")
    return environment().get_template(template).render(up=up, place=place, **values)


def number(value: Any) -> str:
    """A value as tables print it: five digits, a minus sign, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:.5g}".replace("-", "−") if isinstance(value, float) else f"{value}".replace("-", "−")
    return str(value)


def numeric(rows: list[list[Any]]) -> list[bool]:
    """For each column of a table whether it is one of numbers, what is missing or said in place of one aside."""
    return [any(isinstance(value, int | float) and not isinstance(value, bool) for value in column)
            for column in zip(*rows, strict=True)]


def breakable(name: str) -> Markup:
    """A key that may break behind a point or an underscore, and nowhere else."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))


def plain(markup: str) -> str:
    """The words of a piece of HTML."""
    return " ".join(soup_of(str(markup)).get_text(" ").split())


def soup_of(markup: str) -> BeautifulSoup:
    """Parsed HTML, of which nothing is mended."""
    return BeautifulSoup(markup, "html.parser")


def labelled(soup: Tag) -> None:
    """Give every table of a page a frame that scrolls and its cells the name of their column, which a phone shows; one of many
    columns is set smaller."""
    for table in soup.find_all("table"):
        heads = [cell.get_text(" ", strip=True).replace("- ", "") for cell in table.select("thead th, thead td")]
        if len(heads) > 9 and "many" not in (table.get("class") or []):
            table["class"] = " ".join([*(table.get("class") or []), "many"])
        rows = [row.find_all(["td", "th"]) for row in table.select("tr")]
        for column in zip(*rows, strict=False):
            if any("number" in (cell.get("class") or []) for cell in column):  # what is said in place of a number stands as one
                for cell in column:
                    cell["class"] = "number"
        for row in table.select("tbody tr"):
            for head, cell in zip(heads, row.find_all(["td", "th"]), strict=False):
                cell["data-label"] = head
        frame = table.parent
        if frame is not None and "wide" not in (frame.get("class") or []):
            table.wrap(BeautifulSoup("", "html.parser").new_tag("div", attrs={"class": "wide"}))


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


def markdown(text: str) -> Markup:
    """Markdown with formulas as HTML, as notebooks' pages show it."""
    from nbconvert.filters import markdown2html

    return Markup(markdown2html(mathml(text)))
