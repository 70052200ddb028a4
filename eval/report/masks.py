"""Heat map of what a mask switches off: block by kind of unit, as inline SVG."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from .plots import INK, _svg

TITLE, ALL = "Switched off: ", "all"
"""How the tables of a masking method begin, and their row of all blocks together."""


def shares_of(details: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, int]]]:
    """What `heat_map` takes, from the details of an artefact; empty where no table is of units switched off."""
    tables = {title.removeprefix(TITLE): table for title, table in details.items() if title.startswith(TITLE)}
    return {
        kind: {"" if block == ALL else block: {key: int(row[key]) for key in ("off", "all")} for block, row in table.items()}
        for kind, table in tables.items()
    }


def heat_map(shares: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Share of units that are off, of each kind (columns) in each block (rows); ``shares`` as `erasure.methods.masking.shares` has them.

    {kind: {block: {"off": n, "all": n}}}; block "" (all together) is in the column's title. "" where there is no unit.
    """
    kinds = list(shares)
    blocks = list(dict.fromkeys(block for kind in kinds for block in shares[kind] if block))
    if not blocks:
        return ""
    table = [[_share(shares[kind].get(block)) for kind in kinds] for block in blocks]
    top = max(max(row) for row in table) or 1.0
    figure = Figure(figsize=(6.4, 1.2 + 0.24 * len(blocks)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=top)
    titles = [f"{kind}\n{_share(shares[kind].get('')):.2%} off" for kind in kinds]
    axes.set_xticks(range(len(kinds)), titles, color=INK)
    axes.set_yticks(range(len(blocks)), blocks, color=INK, fontsize=7)
    for y, block in enumerate(blocks):
        for x, kind in enumerate(kinds):
            if counts := shares[kind].get(block):
                light = table[y][x] > top / 2  # cividis ends in yellow, begins in dark blue
                text = f"{counts['off']} of {counts['all']}"
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color="black" if light else "white")
    summary = "; ".join(f"{kind}: {_share(shares[kind].get('')):.2%} off" for kind in kinds)
    return _svg(figure, "masks", f"Units switched off by block. {summary}")


def _share(counts: Mapping[str, int] | None) -> float:
    return counts["off"] / counts["all"] if counts and counts["all"] else 0.0
