"""``erasure compare``: results side by side."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..errors import ErasureError


def compare(
    *results: Path,
    html: Path | None = None,
    format: Literal["table", "markdown", "csv", "json"] = "table",
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Compare results of one protocol: base first, then the plain negative prompt; others are shown with ≠ and never ranked.

    Example: erasure compare out/demo/results/* --html report.html

    Parameters
    ----------
    results: results.json files, or folders that hold one.
    html: Write a report without images here.
    format: What to print.
    json: The same as --format json.
    """
    from rich.console import Console

    from erasure.eval import tables
    from erasure.eval.compare import Entry
    from erasure.eval.compare import compare as build
    from erasure.eval.report import write_report

    if not results:
        raise ErasureError("nothing to compare: give results.json files or their folders")
    table = build([Entry.of(path) for path in results])
    if html is not None:
        write_report(html, table)
    format = "json" if json else format
    if format == "table":
        Console().print(tables.to_rich(table))
        return
    print({"markdown": tables.to_markdown, "csv": tables.to_csv, "json": tables.to_json}[format](table))
