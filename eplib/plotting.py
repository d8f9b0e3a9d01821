"""House style of the figures: readable at column width, safe for colour-blind readers, the same bytes from the same
data. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import drawn
from .settings import PALETTE, ROOT, Look, default_look, looks, name_of

WIDTHS = {"column": 3.4, "full": 7.0}  # inches
SMOKE = "smoke profile: proves nothing"
NOTHING = "no run of this is recorded"

_looks: dict[str, Look] = {}


def use(profile: str, root: Path = ROOT) -> None:
    """Name and draw the arms of this process's figures and tables as a profile says (`settings.looks`)."""
    _looks.clear()
    _looks.update(looks(profile, root))


def look(arm: str) -> Look:
    """How an arm is named and drawn, by default by its name, in a colour that is the same each time."""
    return _looks.get(arm) or default_look(arm)


def label(arm: str) -> str:
    """The name of an arm as legends and tables print it."""
    return look(arm).label


def colour(arm: str) -> str:
    """The colour of an arm, as #rrggbb."""
    return look(arm).colour


def together(values: Mapping[str, Any]) -> dict[Any, str]:
    """The methods that share a value, as tables' notes name them: value -> their labels."""
    methods: dict[Any, list[str]] = {}
    for method, value in values.items():
        methods.setdefault(value, []).append(label(method))
    return {value: " / ".join(labels) for value, labels in methods.items()}


def rates_tried(rates: Mapping[str, Iterable[float]]) -> str:
    """A table's note on the learning rates that each method was trained at, those with the same ones together."""
    tried = together({method: ", ".join(f"{value:g}" for value in sorted(set(values))) for method, values in rates.items()})
    return "learning rates tried: " + "; ".join(f"{values} ({methods if len(tried) > 1 else 'every arm'})"
                                                for values, methods in tried.items())


def style() -> None:
    """Make the house style the current one. `figure` calls it."""
    mpl.rcdefaults()
    mpl.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "axes.prop_cycle": cycler(color=PALETTE),
            "xtick.major.width": 0.7,
            "ytick.major.width": 0.7,
            "figure.dpi": 110,
            "savefig.dpi": 220,
            "figure.constrained_layout.use": True,
            "font.size": 8,
            "axes.titlesize": 8,
            "axes.labelsize": 8,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "legend.fontsize": 7,
            "legend.frameon": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
            "grid.linewidth": 0.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.3,
            "lines.markersize": 3.5,
            "axes.linewidth": 0.7,
            "pdf.fonttype": 42,
            "svg.fonttype": "path",
        }
    )


def figure(
    width: str = "column", height: float = 2.4, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of one column (3.4 in) or the full width (7 in), `height` in inches, and its axes as a flat array.

    `options` go to `plt.subplots` (for instance sharey=True). Raises ValueError for another width.
    """
    import matplotlib.pyplot as plt

    if width not in WIDTHS:
        raise ValueError(f"width {width!r} is unknown; allowed: {', '.join(WIDTHS)}")
    style()
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTHS[width], height), squeeze=False, **options)
    return fig, axes.ravel()


def seeds(
    ax: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], method: str, name: str | None = None
) -> list[Line2D]:
    """Draw every run (one per seed, each as long as `x`) as a line; with several, their mean too, bold. Only one line
    gets the label."""
    shown = look(method)
    values = [np.asarray(run, dtype=float) for run in runs]
    if any(len(run) != len(x) for run in values):
        raise ValueError(
            f"{method}: runs of length {[len(run) for run in values]} against {len(x)} places on the x axis"
        )
    single = len(values) == 1
    lines = [
        ax.plot(x, run, ls=shown.line, color=shown.colour, lw=1.3 if single else 0.6, alpha=1.0 if single else 0.6)[0]
        for run in values
    ]
    if values and not single:
        lines += ax.plot(x, np.mean(values, axis=0), ls=shown.line, color=shown.colour, lw=1.8)
    if lines:
        lines[-1].set_label(name or shown.label)
    return lines


def windows(x: Sequence[float], y: Sequence[float], count: int = 70) -> tuple[np.ndarray, np.ndarray]:
    """The largest value of `y` in each of `count` windows along `x`, at the windows' middles: of a quantity that changes from
    step to step, what a line through every step hides under itself. Short series are left as they are."""
    parts = [np.array_split(np.asarray(each, dtype=float), count) if len(x) > 2 * count else list(np.reshape(each, (-1, 1)))
             for each in (x, y)]
    return np.array([part.mean() for part in parts[0]]), np.array([np.fmax.reduce(part) for part in parts[1]])


def dots(ax: Axes, place: float, values: Sequence[float], shade: str, *, full: bool = True,
         interval: Mapping[str, Any] | None = None) -> None:
    """A row at height `place`: every value (one per seed) a dot, hollow where not `full`, and of several their mean as a tick;
    `interval` draws the 95 % interval {low, high} of that mean as a bar."""
    ax.plot(values, [place] * len(values), "o", ms=3.5, color=shade, mfc=shade if full else "none", mew=0.9)
    if len(values) > 1:
        ax.plot([float(np.mean(values))], [place], "|", ms=9, mew=1.6, color=shade)
    if interval and interval.get("low") is not None:
        ax.plot([interval["low"], interval["high"]], [place, place], "-", lw=3.5, alpha=0.3, color=shade, solid_capstyle="butt")


def rows_of(ax: Axes, names: Sequence[str]) -> None:
    """Names the rows of `dots`, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def legend(fig: Figure, columns: int = 3) -> None:
    """One legend for all axes, below them and off the data; a label that several axes share appears once."""
    entries = {text: line for ax in fig.axes for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, handlelength=2.6)


def reference(ax: Axes, y: float, text: str, *, comparable: bool) -> None:
    """Draw a value from the literature as a thin dashed line, but only where data, size and budget match
    (`comparable`)."""
    if comparable:
        ax.axhline(y, color="0.45", lw=0.8, ls=(0, (4, 2)), zorder=0)
        ax.annotate(
            text, (1.0, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=6, color="0.35"
        )


def save(fig: Figure, name: str, profile: str, experiment: str, shown: object = True, *, root: Path = ROOT) -> Path | None:
    """Write figures/<profile>/<experiment>/<name>.pdf, .svg and, as numbers, .csv, the same bytes each time, and return
    the path of the SVG.

    `experiment` is the notebook's name, or "machine" for a figure of times or other facts of this machine, which DVC
    does not track. `shown` is what the figure shows: where that is empty, for want of runs, no file is left and None returned,
    so that the paper says what is missing and how to make it. A panel in which nothing is drawn says so in the place of ticks.
    """
    folder = root / "figures" / name_of(profile) / experiment
    if not shown:
        import matplotlib.pyplot as plt

        plt.close(fig)
        for kind in ("pdf", "svg", "csv"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
        print(f"{name}: no run recorded")
        return None
    if name_of(profile) == "smoke" and not any(text.get_text() == SMOKE for text in fig.texts):
        fig.text(
            0.5, 0.5, SMOKE, ha="center", va="center", rotation=20, fontsize=11, color="crimson", alpha=0.45, zorder=10
        )
    for ax in filter(drawn.empty, fig.axes):
        ax.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False, which="both")
        ax.text(0.5, 0.5, NOTHING, transform=ax.transAxes, ha="center", va="center", fontsize=7, color="0.4")
    folder.mkdir(parents=True, exist_ok=True)
    dates = {"pdf": {"CreationDate": None, "ModDate": None}, "svg": {"Date": None}}
    with mpl.rc_context({"svg.hashsalt": f"{name_of(profile)}/{name}"}):
        for kind, metadata in dates.items():
            fig.savefig(folder / f"{name}.{kind}", metadata=metadata, facecolor="white")
    (folder / f"{name}.csv").write_text(drawn.to_csv(fig), encoding="utf-8")
    return folder / f"{name}.svg"
