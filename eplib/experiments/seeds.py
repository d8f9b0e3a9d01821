"""Verdicts on means over seeds, which count only where enough seeds ran and enough samples settled."""

from collections.abc import Iterable

from ..store import tables
from ..store.comparisons import Comparison
from ..store.runs import Run
from ..verdicts import FEWEST, HOLDS, UNDECIDED, by_interval


def shown(value: float | None, digits: int = 2) -> str:
    """A number as a cell of words prints it."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(found: Comparison, digits: int = 2) -> str:
    """A mean difference with its 95 % interval, where there are seeds enough for one."""
    if found.mean is None:
        return "-"
    return f"{found.mean:+.{digits}f}" + ("" if found.low is None else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]")


def decides(found: Comparison, some: Iterable[Run]) -> bool:
    """Whether a mean can decide anything: enough seeds, and enough samples settled in each of the runs behind it."""
    return found.pairs >= FEWEST and tables.least(map(tables.settled_cold, some))[0] >= tables.ENOUGH


def judge(found: Comparison, some: Iterable[Run], **holds: float) -> str:
    """The verdict on a mean over `some` runs from its interval over seeds, as the claims of the paper are decided."""
    if not decides(found, some):
        return UNDECIDED
    assert found.low is not None and found.high is not None, "three seeds have an interval"
    return by_interval(holds, found.low, found.high)


def relation(found: Comparison, some: Iterable[Run], margin: float) -> str:
    """Whether two arms are equivalent within a margin, different, both or neither."""
    some = list(some)
    if not decides(found, some):
        return UNDECIDED
    words = ["equivalent"] if judge(found, some, max_abs=margin) == HOLDS else []
    apart = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
    return " and ".join(words + (["different"] if apart else [])) or "neither"
