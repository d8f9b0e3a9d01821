"""Verdicts: what holds, fails, or is not decided, by a value or by the 95 % interval of a mean over seeds. Imports no torch."""

import math
import operator
from typing import Any

HOLDS, FAILS, UNDECIDED = "holds", "fails", "not decided"
FEWEST = 3  # seeds below which no mean is decided
TESTS = {
    "min": (operator.ge, "≥"),
    "max": (operator.le, "≤"),
    "above": (operator.gt, ">"),
    "below": (operator.lt, "<"),
    "equals": (operator.eq, "="),
    "max_abs": (lambda value, bound: abs(value) <= bound, "|·| ≤"),
}


def number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def by_value(holds: dict[str, float], value: Any) -> str:
    """The verdict on a value that no seed moves; what is no finite number fails."""
    met = number(value) and all(TESTS[test][0](value, bound) for test, bound in holds.items())
    return HOLDS if met else FAILS


def by_interval(holds: dict[str, float], low: float, high: float) -> str:
    """The verdict on a mean whose 95 % interval is [low, high]."""
    sides = []  # each test as tests of one side: an interval that breaks one at both ends breaks it throughout
    for test, bound in holds.items():
        sides += {"equals": [("min", bound), ("max", bound)], "max_abs": [("min", -bound), ("max", bound)]}.get(
            test, [(test, bound)]
        )
    met = [[TESTS[test][0](end, bound) for end in (low, high)] for test, bound in sides]
    return HOLDS if all(map(all, met)) else FAILS if any(not any(ends) for ends in met) else UNDECIDED


def of(known: bool | None) -> str:
    """The verdict on what is known to be so or not, and on what is not known."""
    return UNDECIDED if known is None else HOLDS if known else FAILS
