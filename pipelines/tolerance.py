"""How two values of a result compare: equal, or apart by no more than what another processor changes.

Each value is of one class (CONTRIBUTING, "Numbers on another processor"):

    exact         the same everywhere: names, titles, the number of seeds
    rounding      "6 digits", "±2" of a count, or "order of magnitude": as many as two sets of vector instructions agreed in
                  (`python -m pipelines.reference --measure`), one digit less
    statistical   what a training ends at: two means over seeds agree where their 95 % intervals overlap; a number without an
                  interval agrees within ten percent, and beyond that decides nothing
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from eplib.verdicts import UNDECIDED, number

EQUAL, WITHIN, DIFFERS, MISSING, NEW = "equal", "within", "differs", "missing", "new"
WORDS = (EQUAL, WITHIN, UNDECIDED, DIFFERS, MISSING, NEW)
EXACT, STATISTICAL, ORDER = "exact", "statistical", "order of magnitude"
INTERVAL = {"mean", "low", "high", "n"}
NAMES = re.compile(r"(title|columns(\.\d+)?|texts\.\d+\.arm|.*\bn)")  # keys of what no processor changes
SHARE = 0.1  # by which two statistical numbers without an interval may differ
MOST = 12  # digits: more than agree are not asked for
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Key -> what is compared as one: a scalar, or a mean over seeds with its interval."""
    if isinstance(value, dict) and not value.keys() >= INTERVAL:
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list):
        items = [(str(place), item) for place, item in enumerate(value)]
    else:
        yield key, value
        return
    for name, item in items:
        yield from leaves(item, f"{key}.{name}" if key else name)


def class_of(key: str, measured: str | None, otherwise: str = STATISTICAL) -> str:
    """The class of a value: that of names, the one measured, or `otherwise`, that of its stage."""
    return EXACT if NAMES.fullmatch(key) else measured or otherwise


def kind(tolerance: str) -> str:
    """exact, rounding or statistical."""
    return tolerance if tolerance in (EXACT, STATISTICAL) else "rounding"


def compare(theirs: Any, ours: Any, tolerance: str) -> str:
    """One of WORDS for a reference value and the one at hand."""
    if theirs == ours and isinstance(theirs, bool) == isinstance(ours, bool):
        return EQUAL
    if (theirs is None) != (ours is None):  # a run that diverged has no value
        return DIFFERS
    if tolerance == STATISTICAL and not (isinstance(theirs, str) and not NUMBER.search(theirs)):
        return overlap(theirs, ours)
    if isinstance(theirs, str) and isinstance(ours, str):  # numbers in words: the words are the same, the numbers near
        pairs = zip(map(float, NUMBER.findall(theirs)), map(float, NUMBER.findall(ours)), strict=False)
        alike = NUMBER.sub("#", theirs) == NUMBER.sub("#", ours)
        return WITHIN if alike and all(near(a, b, tolerance) for a, b in pairs) else DIFFERS
    if isinstance(theirs, dict) and isinstance(ours, dict) and theirs.keys() == ours.keys():
        found = {compare(theirs[name], ours[name], EXACT if name == "n" else tolerance) for name in theirs}
        return DIFFERS if DIFFERS in found else WITHIN
    return WITHIN if number(theirs) and number(ours) and near(theirs, ours, tolerance) else DIFFERS


def near(theirs: float, ours: float, tolerance: str) -> bool:
    """Whether two numbers agree in so many digits, by so much of a count, or in their order of magnitude."""
    if theirs == ours:
        return True
    if tolerance == EXACT:
        return False
    if tolerance == ORDER:
        return theirs * ours > 0 and 0.1 <= theirs / ours <= 10.0
    if tolerance.startswith("±"):
        return abs(theirs - ours) <= float(tolerance[1:])
    return abs(theirs - ours) <= 10.0 ** -int(tolerance.split()[0]) * abs(theirs)


def overlap(theirs: Any, ours: Any) -> str:
    """Two results of a training: by their intervals, without such within ten percent, and otherwise not decided."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        ends: list[Any] = [one.get(side) for one in (theirs, ours) for side in ("low", "high")]
        if all(map(number, ends)):
            return WITHIN if ends[0] <= ends[3] and ends[2] <= ends[1] else DIFFERS
        theirs, ours = (one.get("mean", one.get("value")) for one in (theirs, ours))
    close = number(theirs) and number(ours) and abs(theirs - ours) <= SHARE * max(abs(theirs), abs(ours))
    return WITHIN if close else UNDECIDED


def surviving(one: Any, other: Any) -> str:
    """The tolerance that two values of the same source under two sets of vector instructions call for."""
    if not (number(one) and number(other)):
        return EXACT if one == other else STATISTICAL
    if isinstance(one, int) and isinstance(other, int):
        return f"±{max(1, 2 * abs(one - other))}"
    apart = abs(one - other) / max(abs(one), abs(other), 1e-300)
    digits = MOST if apart == 0 else min(MOST, math.floor(-math.log10(apart)) - 1)
    return f"{digits} digits" if digits > 0 else ORDER if one * other > 0 and 0.2 <= one / other <= 5.0 else STATISTICAL
