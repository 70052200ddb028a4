"""report.html: one static file with the table, matched-seed images, plots, commands and versions; it requests nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..columns import BY_KEY, GROUPS
from ..compare import Comparison
from . import plots
from .grid import KINDS, Grid, data_uri


def write_report(path: Path | str, table: Comparison, grid: Grid | None = None, *, commands: Sequence[str] = ()) -> Path:
    """Write the report of a comparison.

    grid: ``grid.matched_grid`` of the same rows of the table; commands: what reproduces the report, one shell line each.
    """
    path = Path(path)
    path.write_text(render(table, grid, commands), encoding="utf-8")
    return path


def render(table: Comparison, grid: Grid | None, commands: Sequence[str]) -> str:
    """The report as HTML."""
    environment = Environment(
        loader=PackageLoader("erasure.eval", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(data_uri=data_uri)
    environment.filters.update(percent=lambda share: f"{100 * share:.0f} %")
    first = table.lines[0].entry.results
    return environment.get_template("report.html.j2").render(
        table=table,
        first=first,
        groups=_groups(table),
        columns=BY_KEY,
        kinds=KINDS,
        grid=grid,
        commands=commands,
        erase_kept=Markup(plots.erase_kept(table)),
        costs=Markup(plots.costs(table)),
        environments=_environments(table),
    )


def _groups(table: Comparison) -> list[tuple[str, list[str]]]:
    """Groups of columns without those that no row fills."""
    return [(title, used) for title, keys in GROUPS if (used := table.used(keys))]


def _environments(table: Comparison) -> list[tuple[str, dict[str, Any]]]:
    """Versions of the first row, and of every row that was measured under other ones."""
    first = table.lines[0].entry.results["versions"]
    others = [(line.name, line.entry.results["versions"]) for line in table.lines if line.entry.results["versions"] != first]
    return [("all rows" if not others else table.lines[0].name, first), *others]
