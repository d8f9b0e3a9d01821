"""What a run has done so far: its log, a row for each step, the evaluations, and the line of progress that it shows.

A log of 150,000 steps is kept by columns, 8 bytes a value: small enough for the process that trains, and a checkpoint has it as
tensors.
"""

import math
import os
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

Value = float | int | str


class Log:
    """Rows of named values, kept as columns of float64; a value that a row lacks is NaN in it.

    A column that was given ints alone gives ints back, one of words (a status) keeps their places in `words`.
    """

    def __init__(self) -> None:
        self.columns: dict[str, array] = {}
        self.whole: set[str] = set()
        self.words: dict[str, list[str]] = {}
        self.length = 0

    def append(self, row: Mapping[str, Value]) -> None:
        """Takes in a row; a name that no row had before becomes a column."""
        for name, value in row.items():
            if name not in self.columns:
                self.columns[name] = array("d", [math.nan]) * self.length
                self.whole |= {name} if isinstance(value, int) else set()
                if isinstance(value, str):
                    self.words[name] = []
        for name, column in self.columns.items():
            value = row.get(name, math.nan)
            if name in self.words and name in row:
                words = self.words[name]
                if value not in words:
                    words.append(str(value))
                value = words.index(str(value))
            elif name in row and not isinstance(value, int):
                self.whole.discard(name)
            column.append(float(value))
        self.length += 1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Value]:
        """One row, with a value in every column."""
        if not -self.length <= index < self.length:
            raise IndexError(f"row {index} of a log of {self.length}")
        return {name: self._value(name, column[index]) for name, column in self.columns.items()}

    def __iter__(self) -> Iterator[dict[str, Value]]:
        return (self[index] for index in range(self.length))

    def column(self, name: str) -> numpy.ndarray:
        """A column's numbers (rows,), float64; all NaN for one that no row had."""
        return numpy.array(self.columns.get(name, array("d", [math.nan]) * self.length))

    def _value(self, name: str, value: float) -> Value:
        if math.isnan(value) or not (name in self.whole or name in self.words):
            return value
        return self.words[name][int(value)] if name in self.words else int(value)

    def tensors(self) -> dict[str, Tensor]:
        """The columns as tensors (rows,), float64."""
        return {name: torch.from_numpy(self.column(name)) for name in self.columns}

    def header(self) -> dict[str, Any]:
        """What `restored` needs besides the columns; its size does not depend on the number of rows."""
        return {"names": list(self.columns), "whole": sorted(self.whole), "words": self.words, "length": self.length}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> "Log":
        """The log of which these are `tensors()` and `header()`."""
        log = cls()
        log.columns = {name: array("d", tensors[name].cpu().numpy().tobytes()) for name in header["names"]}
        log.whole, log.words, log.length = set(header["whole"]), header["words"], header["length"]
        return log


@dataclass
class Progress:
    """What a run has done so far: rows of the log, evaluations, and what it took. Seconds are kept apart from the log, which
    is the same on every machine that computes the same."""

    step: int = 0
    rows: Log = field(default_factory=Log)
    curve: Log = field(default_factory=Log)
    seconds: array = field(default_factory=lambda: array("d"))
    sessions: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Everything that grows with the steps, as tensors by name."""
        return {f"{part}.{name}": value for part, log in (("rows", self.rows), ("curve", self.curve))
                for name, value in log.tensors().items()} | {"seconds.": torch.from_numpy(numpy.array(self.seconds))}

    def header(self) -> dict[str, Any]:
        """The rest, as JSON has it."""
        return {"step": self.step, "sessions": self.sessions, "rows": self.rows.header(), "curve": self.curve.header()}

    @classmethod
    def restored(cls, parts: dict[str, dict[str, Tensor]], header: dict[str, Any]) -> "Progress":
        """From `tensors()` by the part before the dot, and `header()`."""
        rows, curve = (Log.restored(parts[part], header[part]) for part in ("rows", "curve"))
        seconds = array("d", parts["seconds"][""].cpu().numpy().tobytes())
        return cls(header["step"], rows, curve, seconds, header["sessions"])


class Bar:
    """One line of progress on a terminal: step, loss, residual, iterations, rate, time left.

    It writes past Jupyter's capture, so a run inside a notebook leaves no trace of its timing in the notebook's outputs.
    """

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.began = name, steps, time.monotonic()
        self.first: int | None = None  # the step that it began after

    def line(self, progress: Progress) -> str:
        if self.first is None:
            self.first = progress.step - 1
        row = progress.rows[-1]
        left = (time.monotonic() - self.began) / (progress.step - self.first) * (self.steps - progress.step)
        return (f"{self.name} {progress.step}/{self.steps}  loss {row['loss']:.3f}  residual {row['free_residual_max']:.1e}  "
                f"iterations {row['iterations_max']}  rate {row['rate_probe']:.3f}  {left:.0f} s left")


def show_on_terminal(line: str) -> None:
    """Replaces the last line of a terminal's standard error, or of what a notebook's cell shows; silent elsewhere, and in a
    notebook that the pipeline runs (where TQDM_DISABLE is set)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):  # its standard error leads into the notebook, the process's own to where Jupyter was started
        if not os.environ.get("TQDM_DISABLE"):
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
    elif sys.__stderr__ is not None and sys.__stderr__.isatty():
        sys.__stderr__.write(f"\r{line}\x1b[K")
        sys.__stderr__.flush()
