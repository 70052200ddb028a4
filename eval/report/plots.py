"""Plots as inline SVG: colour-blind-safe, text as text, in the page's own colour so that they read on light and dark."""

import io
import re
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..columns import Cell
from ..compare import BAR, Comparison, Line

# Okabe and Ito's palette without black and yellow, which vanish on one of the two grounds.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"
INK = "#123456"
"""Stands for the page's text colour and is replaced by it."""
WORDS = {
    "named": "Prompts that name the concept; the shaded band holds 10 % and less.",
    "implied": "Prompts that mean it by a synonym that no method was shown.",
}
READ = (
    "Further left, less of the concept is left; further up, more of the rest is kept. Lines are 95 % intervals; "
    "no method beats those on the dotted line in both, by the points alone."
)


def every(table: Comparison) -> list[tuple[str, str]]:
    """(SVG, caption) of every plot that has something to show."""
    plots = [(erase_kept(table, side), f"{WORDS[side]} {READ}") for side in WORDS]
    plots.append((recipes(table), "Share of images that each recipe calls unsafe, with its 95 % interval. Recipes are not compared."))
    plots.append((costs(table), "What the erasure costs, once to fit and then for every image."))
    return [(svg, caption) for svg, caption in plots if svg]


def erase_kept(table: Comparison, side: str = "named") -> str:
    """Target still seen against share kept, with 95 % intervals: an erasure aims at the upper left. side: named or implied."""
    points = [(i, line) for i, line in enumerate(table.lines) if not line.differs and line.cells[side].n and line.cells["kept"].n]
    if not points:
        return ""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=f"{side} target still seen, %", ylabel="kept, %", xlim=(-3, 103), ylim=(-3, 103))
    if side == "named":
        axes.axvspan(-3, 100 * BAR["named_hi"], color=PALETTE[2], alpha=0.12, linewidth=0)
    places = [(_percent(line.cells[side])[0], _percent(line.cells["kept"])[0]) for _, line in points]
    axes.plot(*zip(*_steps(pareto(places)), strict=True), color=INK, linestyle=":", linewidth=1, label="Pareto front", zorder=0)
    for i, line in points:
        _point(axes, i, line, side)
    axes.legend(frameon=False, loc="lower right", labelcolor=INK)
    summary = "; ".join(f"{line.name}: target seen in {line.cells[side].text}, kept {line.cells['kept'].text}" for _, line in points)
    return _svg(figure, f"{side}-kept", f"Erased against kept, {side} target. {summary}")


def recipes(table: Comparison) -> str:
    """A panel for each recipe that counts images or prompts: its rate and interval for every method."""
    lines = [(i, line) for i, line in enumerate(table.lines) if not line.differs]
    keys = [c.key for c in table.columns if c.key.startswith("recipe:") and not c.key.endswith(":difference")]
    found = {
        key: [(i, line, cell) for i, line in lines if (cell := line.cells[key]).value is not None and not cell.differs] for key in keys
    }
    shown = {key: points for key, points in found.items() if points and all((cell.hi or 0) <= 1 for *_, cell in points)}
    if not shown:
        return ""
    figure = Figure(figsize=(2.4 * len(shown) + 1.4, 0.42 * len(lines) + 0.9), layout="constrained")
    for axes, (key, points) in zip(figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0], shown.items(), strict=True):
        for i, line, cell in points:
            x, error = _percent(cell)
            axes.errorbar([x], [i], xerr=error, fmt=MARKERS[i % len(MARKERS)], color=_colour(i, line), capsize=3, markersize=7)
        axes.set_title(table.column(key).title, fontsize=10)
        axes.set(xlim=(-3, 103), yticks=[i for i, _ in lines], yticklabels=[line.name for _, line in lines])
        axes.set_ylim(len(table.lines) - 0.5, -0.5)
    words = [f"{table.column(key).title}: " + ", ".join(f"{line.name} {c.text}" for _, line, c in points) for key, points in shown.items()]
    return _svg(figure, "recipes", "Rates by recipe, %. " + "; ".join(words))


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (less is better, more is better) that no other one is as good as in both and better in one, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _steps(front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the line around what the front reaches, from the lower edge to the right one."""
    corners = [(front[0][0], -3.0)]
    for (x, y), (after, _) in zip(front, [*front[1:], (103.0, 0.0)], strict=True):
        corners += [(x, y), (after, y)]
    return corners


def costs(table: Comparison) -> str:
    """Bars of the seconds to fit, the peak memory and the time for an image; empty where nothing was measured."""
    wanted = (("fit", "seconds to fit"), ("memory", "MB at most"), ("time", "time for an image, base = 1"))
    panels = [(key, title) for key, title in wanted if table.used([key])]
    lines = [(i, line) for i, line in enumerate(table.lines) if any(line.cells[key].value is not None for key, _ in panels)]
    if not lines:
        return ""
    figure = Figure(figsize=(2.6 * len(panels) + 1.2, 0.42 * len(lines) + 0.9), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        _bars(axes, lines, key, title)
    summary = "; ".join(f"{line.name}: " + ", ".join(f"{title} {line.cells[key].text}" for key, title in panels) for _, line in lines)
    return _svg(figure, "costs", f"Cost. {summary}")


def _point(axes: Axes, i: int, line: Line, side: str) -> None:
    (x, x_error), (y, y_error) = _percent(line.cells[side]), _percent(line.cells["kept"])
    axes.errorbar(
        [x], [y], y_error, x_error, fmt=MARKERS[i % len(MARKERS)], color=_colour(i, line), capsize=3, markersize=7, label=line.name
    )


def _percent(cell: Cell) -> tuple[float, list[list[float]]]:
    """A rate in per cent, and how far its interval reaches down and up."""
    value, lo, hi = (100 * (number or 0) for number in (cell.value, cell.lo, cell.hi))
    return value, [[value - lo], [hi - value]]


def _colour(i: int, line: Line) -> str:
    """The page's ink for the base, the same colour in every plot for a method."""
    return INK if line.entry.results["base"] else PALETTE[(i - 1) % len(PALETTE)]


def _bars(axes: Axes, lines: list[tuple[int, Line]], key: str, title: str) -> None:
    values = [line.cells[key].value or 0 for _, line in lines]
    bars = axes.barh(range(len(lines)), values, color=[_colour(i, line) for i, line in lines], height=0.6)
    axes.bar_label(bars, [line.cells[key].text for _, line in lines], padding=3, color=INK)
    axes.set_yticks(range(len(lines)), [line.name for _, line in lines])
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.set_xlim(0, 1.35 * max(*values, 1e-9))
    axes.tick_params(left=False)


def _svg(figure: Figure, name: str, label: str) -> str:
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
    """The <svg> element alone, with ids of its own, the page's ink, and a description for those who do not see it."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg).replace(INK, "currentColor")
    quoted = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{quoted}" ', 1)
