"""``erasure compare``: results side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..errors import ErasureError
from .options import Json


def compare(
    *results: Path,
    html: Path | None = None,
    published: Annotated[tuple[Path, ...], Parameter(negative=(), show_default=False)] = (),
    format: Literal["table", "markdown", "csv", "latex", "html", "json"] = "table",
    json: Json = False,
) -> None:
    """Compare results of one protocol, side by side.

    Base first, then the plain negative prompt; rows of another protocol are shown with ≠ and never ranked.

    Parameters
    ----------
    results: results.json files, folders that hold one, or a folder of such folders.
    html: Write a report without images here.
    published: File of published rows, or a folder of them such as docs/published; shown apart, never ranked, and not in CSV.
    format: What to print; --json is the same as --format json.
    """
    from erasure.eval.compare import Entry, gather

    paths = gather(results)
    if len(paths) < (1 if published else 2):
        given = f"only {results[0]}" if results else "nothing"
        raise ErasureError(f"{given} to compare: give two or more results.json files or their folders, such as out/results/*")
    if len({path.resolve() for path in paths}) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path.resolve() in {p.resolve() for p in paths[:i]})
        raise ErasureError(f"{twice} is given twice; once is enough")

    from rich.console import Console

    from erasure.eval import exports, tables
    from erasure.eval.compare import compare as build
    from erasure.eval.published import load_published
    from erasure.eval.report import write_report

    table = build([Entry.of(path) for path in paths])
    others = load_published(published, table.suite["name"])
    if html is not None:
        write_report(html, table, published=others)
    format = "json" if json else format
    if format == "table":
        console = Console()
        console.print(tables.to_rich(table, width=console.width))
        if others:
            console.print(tables.apart(others), markup=False, highlight=False, soft_wrap=True)
        return
    writers: dict[str, Callable[[], str]] = {
        "markdown": lambda: tables.to_markdown(table, others=others),
        "csv": lambda: tables.to_csv(table),
        "latex": lambda: exports.to_latex(table, others),
        "html": lambda: exports.to_html(table, others),
        "json": lambda: tables.to_json(table, others),
    }
    print(writers[format]())
