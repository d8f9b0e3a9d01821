"""The index that the search box reads: what stands under each anchor of the pages, in a script file, since a page that was
opened from a file may fetch nothing."""

from __future__ import annotations

import json
from textwrap import shorten
from typing import NamedTuple

from bs4 import BeautifulSoup, NavigableString, Tag

LONGEST = 1500  # characters of a section that are searched


class Entry(NamedTuple):
    """A place that a search finds: page and heading, address, words."""

    title: str
    href: str
    words: str


def entries(place: str, soup: BeautifulSoup) -> list[Entry]:
    """The sections of a page: each element with an anchor that is a heading, a figure, a cell's text or a claim opens one."""
    title = soup.title.get_text() if soup.title else place
    found: list[tuple[str, str, list[str]]] = [(title, place, [])]
    main = soup.find("main")
    for node in main.descendants if isinstance(main, Tag) else ():
        if isinstance(node, Tag) and node.get("id") and (node.name in ("h2", "h3", "figure") or node.has_attr("data-entry")):
            heading = " ".join((node.find("figcaption") or node).get_text(" ").split())
            heading = shorten(heading, 90, placeholder=" …")
            found.append((f"{title}: {heading}" if heading else title, f"{place}#{node['id']}", []))
        elif isinstance(node, NavigableString) and node.parent is not None and node.parent.name not in ("script", "style"):
            found[-1][2].append(str(node))
    return [Entry(head, href, " ".join(" ".join(words).split())[:LONGEST]) for head, href, words in found]


def script(found: list[Entry]) -> str:
    """The index as a script."""
    return f"window.searchIndex = {json.dumps(found, ensure_ascii=False, separators=(',', ':'))};\n"
