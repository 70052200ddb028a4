"""The figure of the canvas benchmark: what is left of the concept against what is kept, with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from erasure.eval.bench import BASE
from erasure.eval.report.plots import MARKERS, PALETTE

SIDES = {"named": "concept named", "implied": "concept meant by an unseen synonym"}


def draw(path: Path, tables: Mapping[str, Sequence[Any]]) -> None:
    """A row of two panels for each base model; a PNG on white. Markers of destroyed models are hollow; the legend says what is missing."""
    figure = Figure(figsize=(10.4, 4.3 * len(tables)), layout="constrained", facecolor="white", dpi=110)
    names = {row.method: "" for table in tables.values() for row in table}
    for model, table in tables.items():
        for row in (row for row in table if not row.complete):
            names[row.method] += f"\n({model}: {len(row.done)} of {len(row.wanted)} cells)"
    looks = {name: _look(i) for i, name in enumerate(name for name in names if name != BASE)}
    grid = figure.subplots(len(tables), 2, sharey="row", squeeze=False)
    for (model, table), panels in zip(tables.items(), grid, strict=True):
        for axes, (side, words) in zip(panels, SIDES.items(), strict=True):
            for row in table:
                _point(axes, row, side, *(looks.get(row.method) or ("#555555", "*")))
            axes.set_title(f"{model}: {words}", fontsize=10)
            axes.set_xlabel("target still seen, %")
            axes.set_xlim(-3, 103)
            axes.axhline(0, color="#999999", linewidth=0.8, linestyle=":")
            axes.grid(color="#eeeeee")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("kept less the base's, points")
    figure.legend(handles=_legend(names, looks), loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _look(i: int) -> tuple[str, str]:
    return PALETTE[i % len(PALETTE)], MARKERS[(i + i // len(PALETTE)) % len(MARKERS)]


def _point(axes: Axes, row: Any, side: str, colour: str, marker: str) -> None:
    x, y = row.rate("erased", side, "target_present"), row.difference("kept", "all")
    if x is None:
        return
    height = (0.0, 0.0, 0.0) if y is None else (y.value, y.lo, y.hi)  # the base is what others are held against
    error_x, error_y = ([[100 * (value - lo)], [100 * (hi - value)]] for value, lo, hi in ((x.value, x.lo, x.hi), height))
    axes.errorbar(
        [100 * x.value], [100 * height[0]], error_y, error_x, fmt=marker, color=colour, markersize=7, elinewidth=1,
        markerfacecolor="white" if row.destroyed else colour,
    )  # fmt: skip


def _legend(names: Mapping[str, str], looks: Mapping[str, tuple[str, str]]) -> list[Line2D]:
    shown = [(name + note, *looks.get(name, ("#555555", "*"))) for name, note in names.items()]
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="", label=name) for name, colour, marker in shown]
    return [*handles, Line2D([], [], color="#555555", marker="o", markerfacecolor="white", linestyle="", label="hollow: destroyed")]
