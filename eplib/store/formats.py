"""Results as JSON, where a number that is not finite is null, and logs as CSV."""

import csv
import gzip
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy's numbers as Python's, keys as strings, what is not finite as None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, numpy.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> bytes:
    """JSON of `finite` values, indented, with a newline at the end."""
    return (json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def to_csv(rows: Iterable[dict[str, Any]]) -> bytes:
    """Rows, gone through twice, under the union of their keys in the order of appearance; floats with nine digits, what a row
    lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else f"{value:.9g}" if isinstance(value, float) else value
                      for key, value in row.items()} for row in rows)
    return text.getvalue().encode()


def columns(path: Path) -> dict[str, numpy.ndarray]:
    """A CSV file, compressed or not, as {column: values}; numbers where every cell is one, an empty cell is NaN."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for key in rows[0] if rows else ():
        cells = [row[key] for row in rows]
        try:
            found[key] = numpy.array([float(cell or "nan") for cell in cells])
        except ValueError:
            found[key] = numpy.array(cells)
    return found
