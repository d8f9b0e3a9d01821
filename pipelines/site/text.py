"""The paper as HTML: Typst exports its text, with formulas as MathML. From it the report has its captions, its abstract and
which figure a claim rests on; nothing of these is written twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bs4 import BeautifulSoup, Tag

from eplib.settings import name_of
from pipelines import paper
from pipelines.common import ROOT, write_text
from pipelines.site.pages import labelled, soup_of

TITLE = "Equilibrium propagation for transformers"
KINDS = ("fig-", "tab-", "text-")  # of the labels of what the paper places
SAMPLES = re.compile(r"S\d+")  # the ids of what the arms write
NUMBERED = re.compile(r"(?:Figure |Table )?(\w+)(, in short)?\.$")  # how a caption begins


@dataclass(frozen=True)
class Text:
    """The paper's text. captions: label -> HTML; said: claim -> labels of the figures and tables cited beside it."""

    soup: BeautifulSoup
    style: str
    captions: dict[str, str]
    abstract: str
    headline: list[str]
    said: dict[str, list[str]]


def read(profile: str, root: Path = ROOT) -> Text:
    """Export the paper of a profile; raises PipelineError with Typst's message if it cannot be set."""
    content = paper.content_path(profile, root).with_name("report.json")
    write_text(content, paper.full_content(profile, root))
    soup = soup_of(paper.compile_with(content, root, format="html").decode())
    headline = json.loads(paper.compile_with(content, root, query="<headline>"))
    content.unlink()
    style = "\n".join(tag.get_text() for tag in soup.find_all("style"))
    return Text(soup, style, {str(made["id"]): caption(made) for made in placed(soup)}, abstract(soup),
                headline[0] if headline else [], cited(soup))


def abstract(soup: BeautifulSoup) -> str:
    """The paragraph that begins with the word in bold, without it, as HTML; its references stay in the paper."""
    head = next((tag for tag in soup.find_all("strong") if tag.get_text() == "Abstract."), None)
    if head is None or head.parent is None:
        return ""
    inside = soup_of(head.parent.decode_contents())
    inside.find("strong").decompose()  # type: ignore[union-attr]
    return unlinked(inside)


def unlinked(soup: BeautifulSoup) -> str:
    """HTML without its links: what they lead to is in the paper, and this stands elsewhere as well."""
    for link in soup.find_all("a"):
        link.unwrap()
    return soup.decode().strip()


def placed(soup: BeautifulSoup) -> list[Tag]:
    """The figures, tables and texts of the paper, in its order; what no link leads to has no label in Typst's HTML, and gets it
    by the number in its caption."""
    found = []
    for tag in soup.find_all("figure"):
        name = NUMBERED.match(tag.strong.get_text()) if tag.strong else None
        if not tag.get("id") and name:
            kind = "fig" if tag.img else "text" if SAMPLES.fullmatch(name[1]) else "tab"
            tag["id"] = f"{kind}-{name[1]}{'-short' if name[2] else ''}"
        if str(tag.get("id", "")).startswith(KINDS):
            found.append(tag)
    return found


def caption(made: Tag) -> str:
    """The caption of a figure as HTML, without its number."""
    own = made.find("figcaption") or made.find("p", recursive=False)
    if not isinstance(own, Tag) or own.get_text().startswith("missing:"):  # what the paper has in the place of an absent table
        return ""
    inside = soup_of(own.decode_contents())
    first = inside.find("strong")
    number = NUMBERED.match(first.get_text()) if isinstance(first, Tag) else None
    if isinstance(first, Tag) and number and number[1] == str(made["id"]).split("-")[1]:
        first.decompose()
    return unlinked(inside)


def cited(soup: BeautifulSoup) -> dict[str, list[str]]:
    """Claim -> the figures and tables that the paragraph names in which the claim is marked; where that names none, those of
    its section."""
    found: dict[str, list[str]] = {}
    section: list[str] = []
    for tag in soup.find_all(["h2", "p"]):
        if tag.name == "h2":
            section = []  # claims of the section before keep its list, which is whole by now
        targets = [str(link.get("href", "")).removeprefix("#") for link in tag.find_all("a")]
        shown = list(dict.fromkeys(target.removesuffix("-short") for target in targets if target.startswith(KINDS)))
        section += [label for label in shown if label not in section]
        for name in (target.removeprefix("claim-") for target in targets if target.startswith("claim-")):
            known = found.setdefault(name, section)
            if shown:
                found[name] = shown if known is section else [*known, *(label for label in shown if label not in known)]
    return found


def page(text: Text, drawn: Callable[[str], str | None], claims: dict[str, str]) -> str:
    """The paper as the body of a page. drawn: what stands there for a label, None for what the paper alone has. claims: id ->
    the class of its verdict; a claim's mark leads to the page of claims, and where it first stands can be led to."""
    soup = soup_of(text.soup.body.decode_contents() if text.soup.body else "")
    for made in placed(soup):
        if (shown := drawn(str(made["id"]))) is not None:
            made.replace_with(soup_of(shown))
    if (head := soup.find("p")) is not None and head.get_text() == TITLE:
        head.name = "h1"
    seen: set[str] = set()
    for link in soup.find_all("a"):
        target = str(link.get("href", "")).removeprefix("#claim-")
        if target in claims:
            link["href"], link["class"] = f"claims.html#claim-{target}", f"claim-mark {claims[target]}"
            if target not in seen:
                seen.add(target)
                link["id"] = f"says-{target}"
    ids = {str(tag["id"]) for tag in soup.find_all(id=True)}
    for link in soup.find_all("a"):  # into what was replaced, as a row of the table of claims
        if (target := str(link.get("href", ""))).startswith("#") and target[1:] not in ids:
            link.unwrap()
    for dot in soup.find_all("mo", string="\u0307"):  # alone, a combining dot hangs on whatever is left of it
        dot.string = "\u02d9"
    labelled(soup)
    return soup.decode()


def folder(profile: str, root: Path = ROOT) -> Path:
    """Where paper and report of a profile lie."""
    return root / "paper" / "build" / name_of(profile)
