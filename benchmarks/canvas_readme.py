"""The last column of README's table of methods: what the canvas's cells say of each."""

import re
from collections.abc import Mapping
from typing import Any

ROW = re.compile(r"^(\| `(\w+)` \|.*\|)([^|]*)\|$", re.MULTILINE)


def said(row: Mapping[str, Any] | None, concepts: int) -> str:
    """One line of what was measured of a method on the canvas; ``concepts``: of how many there should be."""
    if row is None:
        return "no cells yet"
    named, kept, there = row["named"], row["kept"], row["concepts"]
    parts = [f"{named['rate']:.0%} ({100 * named['lo']:.0f}-{100 * named['hi']:.0f})".replace("%", " %", 1), f"{100 * kept['value']:+.0f}"]
    parts += [f"{there} of {concepts} concepts"] if there < concepts else []
    return "; ".join(parts + (["marked `destroyed`"] if row["destroyed"] else []))


def updated(readme: str, measured: Mapping[str, Any], concepts: int) -> str:
    """README with the last column of each method's row from the table of a model."""
    return ROW.sub(lambda row: f"{row[1]} {said(measured.get(row[2]), concepts)} |", readme)
