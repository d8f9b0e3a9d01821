"""A run's curves as the points of small charts, which a template draws as SVG: some hundreds of runs are some seconds, where a
plotting library takes minutes."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT = 640, 220  # of a chart's plane, in its own units
POINTS = 240  # of a curve at most
COLOURS = ("#0173b2", "#d55e00", "#029e73")
Columns = dict[str, list[float]]


class Line(NamedTuple):
    """One curve: its name, its colour and its points as SVG's `polyline` takes them, in pieces where a value is missing."""

    name: str
    colour: str
    pieces: list[str]


class Tick(NamedTuple):
    """A mark on an axis: where, in the chart's units, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart as its template draws it."""

    title: str
    lines: list[Line]
    across: list[Tick]
    up: list[Tick]


def columns(path: Path, wanted: Container[str]) -> Columns:
    """The numbers of the columns `wanted` of a CSV file, compressed or not; what is empty or no number is NaN."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        reader = csv.reader(file)
        heads = next(reader, [])
        rows = list(reader)
    return {head: [_float(row[index]) for row in rows] for index, head in enumerate(heads) if head in wanted}


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def chart(title: str, curves: dict[str, tuple[list[float], list[float]]], *, log: bool = False) -> Chart | None:
    """A chart of the curves name -> (x, y), on a logarithmic axis if asked; None where none has two values to draw."""
    kept = {}
    for name, (x, y) in curves.items():
        points = [(a, math.log10(b) if log and b > 0 else math.nan if log else b) for a, b in thinned(x, y, worst=log)]
        if sum(math.isfinite(b) for _, b in points) > 1:
            kept[name] = points
    if not kept:
        return None
    (left, right), (low, high) = ([min(found), max(found)] for found in zip(
        *(point for points in kept.values() for point in points if math.isfinite(point[1])), strict=True))
    right, high = (right if right > left else left + 1), (high if high > low else low + (1 if log else abs(low) or 1))

    def place(point: tuple[float, float]) -> str:
        return f"{(point[0] - left) / (right - left) * WIDTH:.0f},{(high - point[1]) / (high - low) * HEIGHT:.0f}"

    lines = [Line(name, COLOURS[index % len(COLOURS)], _pieces(points, place))
             for index, (name, points) in enumerate(kept.items())]
    across = [Tick((at - left) / (right - left) * WIDTH, f"{at:g}") for at in _round(left, right)]
    up = [Tick((high - at) / (high - low) * HEIGHT, f"{float(f'{10**at:.2g}'):g}" if log else f"{at:g}")
          for at in (_of_decades if log else _round)(low, high)]
    return Chart(title, lines, across, up)


def thinned(x: list[float], y: list[float], *, worst: bool) -> list[tuple[float, float]]:
    """At most POINTS points: of as many values in a row as that takes, their mean or the largest, at the last x."""
    size = math.ceil(len(x) / POINTS) or 1
    found = []
    for at in range(0, len(x), size):
        finite = [value for value in y[at:at + size] if math.isfinite(value)]
        kept = max(finite) if finite and worst else sum(finite) / len(finite) if finite else math.nan
        found.append((x[min(at + size, len(x)) - 1], kept))
    return found


def _pieces(points: list[tuple[float, float]], place: object) -> list[str]:
    """The runs of consecutive finite points."""
    pieces: list[list[str]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(place(point))  # type: ignore[operator]
        elif pieces[-1]:
            pieces.append([])
    return [" ".join(piece) for piece in pieces if piece]


def _of_decades(low: float, high: float) -> list[float]:
    """Logarithms of up to six powers of ten from 10^low to 10^high; where there are not two of them, of 1, 2 and 5 times one;
    where there are not two of these, the ends."""
    whole = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    if len(whole) > 1:
        return [float(at) for at in whole[::math.ceil(len(whole) / 6)]]
    finer = [at + math.log10(factor) for at in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5)]
    inside = [at for at in finer if low - 1e-9 <= at <= high + 1e-9]
    return inside if len(inside) > 1 else [low, high]


def _round(low: float, high: float) -> list[float]:
    """Up to six round numbers from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    found = [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]
    return [round(value, 12) for value in found] or [low, high]
