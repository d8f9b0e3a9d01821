"""What a summary says, in sentences: the reading of a notebook. A mean over seeds is read by its 95 % interval."""

import re
from collections.abc import Mapping
from typing import Any

from ..verdicts import FEWEST


def level(name: str, found: Mapping[str, Any] | None, unit: str, digits: int = 2) -> str:
    """A mean over seeds, with its interval."""
    return f"{name}: {_mean(found, unit, digits)}."


def difference(name: str, found: Mapping[str, Any], unit: str, digits: int = 2) -> str:
    """A mean difference over paired seeds, and whether the interval tells it from zero."""
    said = f"{name}: {_mean(found, unit, digits, '+')}"
    if found["mean"] is None:
        return f"{said}."
    if reason := found.get("undecided"):
        return f"{said}. It decides nothing: {reason}."
    if found["n"] < FEWEST:
        return f"{said}. Fewer than {FEWEST} seeds decide nothing."
    if found["low"] <= 0 <= found["high"]:
        return f"{said}. The interval does not tell it from zero."
    return f"{said}. The interval is {'above' if found['low'] > 0 else 'below'} zero."


def count(some: int | None, of: int, what: str) -> str:
    """So many of all."""
    return f"{what}: {some if some is not None else 'unknown'} of {of}."


def compact(text: str, most: int = 3) -> str:
    """A text in which more empty lines than that one after the other are a line that says how many."""
    return re.sub(rf"\n{{{most + 1},}}", lambda found: f"\n[{len(found[0])} line breaks]\n", text)


def shown(value: float | None, digits: int = 2) -> str:
    return "none recorded" if value is None else f"{value:.{digits}f}"


def _mean(found: Mapping[str, Any] | None, unit: str, digits: int, sign: str = "") -> str:
    if not found or found["mean"] is None:
        return "no run recorded"
    form = f"{sign}.{digits}f"
    ends = f" [{found['low']:{form}}, {found['high']:{form}}]" if found["low"] is not None else ""
    return f"{found['mean']:{form}}{f' {unit}' if unit else ''}{ends}, n = {found['n']}"
