"""What a figure shows, as rows of numbers: the data that a reader downloads beside the picture. No torch here."""

import csv
import io
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLUMNS = ("panel", "series", "line", "x", "y", "value")


def to_csv(fig: Figure) -> str:
    """The figure's lines, points, bands, bars and images in data coordinates: panel, series, line (its number), x, y.

    A band is its outline; an image has a row for each pixel, with its value.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for place, ax in enumerate(fig.axes, start=1):
        panel = f"{place} {ax.get_title() or ax.get_ylabel()}".strip()
        writer.writerows([panel, *row[:2], *(f"{number:.7g}" for number in row[2:])] for row in _rows(ax))
    return text.getvalue()


def empty(ax: Axes) -> bool:
    """Whether a panel shows no value at all: reference lines, labels and points that are not numbers count as nothing."""
    others = [shape for shape in ax.collections if not isinstance(shape, PathCollection | PolyCollection)]  # intervals, colours
    return not (others or ax.images or any(np.isfinite(row[2:]).all() for row in _rows(ax)))


def _look(line: Line2D) -> tuple[str, str, str]:
    """What the lines of one series share: of the runs of an arm, one has the label."""
    return to_hex(line.get_color()), str(line.get_linestyle()), str(line.get_marker())


def _rows(ax: Axes) -> Iterator[tuple]:
    """Series, number, x, y (and value) of everything in the data's coordinates; a reference line is not."""
    names = {_look(line): str(line.get_label()) for line in ax.lines if not str(line.get_label()).startswith("_")}
    number = 0
    for line in ax.lines:
        if line.get_transform() == ax.transData:
            number += 1
            yield from ((names.get(_look(line), ""), number, x, y) for x, y in np.asarray(line.get_xydata(), dtype=float))
    for shape in ax.collections:
        number += 1
        name = str(shape.get_label()).removeprefix("_")
        points = shape.get_offsets() if isinstance(shape, PathCollection) else \
            np.concatenate([path.vertices for path in shape.get_paths()]) if isinstance(shape, PolyCollection) else ()
        yield from ((name, number, x, y) for x, y in np.asarray(points, dtype=float))
    for bars in (found for found in ax.containers if isinstance(found, BarContainer)):
        number += 1
        yield from ((str(bars.get_label()), number, bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars)
    for image in ax.images:
        number += 1
        yield from (("pixel", number, x, y, value) for (y, x), value in np.ndenumerate(np.asarray(image.get_array())))
