"""A comparison as a terminal table, markdown, CSV or JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .columns import BY_KEY, TERMINAL
from .compare import Comparison, Line
from .published import HEADING, WARNING, Published


def keys_of(table: Comparison, columns: Sequence[str] = TERMINAL) -> list[str]:
    """Some of the columns that every table may have, and all recipes' and metrics', as far as some row fills them."""
    return table.used([*columns, *(column.key for column in table.columns if column.key not in BY_KEY)])


WIDE = 120
"""Characters of a terminal that holds the columns of ``TERMINAL``."""


def to_rich(table: Comparison, columns: Sequence[str] = TERMINAL, width: int = WIDE) -> Table:
    """For a terminal: first ranks bold, rows that may not be compared dim; on its side where its columns would not fit."""
    keys = keys_of(table, columns)
    shown = Table(title=title(table), caption=caption(table), title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    shown.collapse_padding, shown.pad_edge = True, False
    shown.add_column("", no_wrap=True)
    return _upright(shown, table, keys) if len(keys) <= len(TERMINAL) and width >= WIDE else _on_its_side(shown, table, keys)


def _upright(shown: Table, table: Comparison, keys: Sequence[str]) -> Table:
    """A line a row; intervals on a second line."""
    for key in keys:
        shown.add_column(heading(table, key).replace(" ", "\n", 1), justify="right", no_wrap=key in ("named", "implied", "kept"))
    shown.add_column("")
    for line in table.lines:
        cells = [Text(f"{_text(line, k)}\n{line.cells[k].interval}", style=_style(line, k)) for k in keys]
        shown.add_row(Text(line.name, style="bold"), *cells, Text(line.verdict), style="dim" if line.differs else None)
    return shown


def _on_its_side(shown: Table, table: Comparison, keys: Sequence[str]) -> Table:
    """A column a row, so that any number of recipes and metrics fits."""
    for line in table.lines:
        shown.add_column(Text(line.name, style="bold"), justify="right", style="dim" if line.differs else None)
    for key in keys:
        shown.add_row(heading(table, key).replace("\n", " "), *(Text(plain(line, key), style=_style(line, key)) for line in table.lines))
    if any(line.verdict for line in table.lines):
        shown.add_row("", *(Text(line.verdict) for line in table.lines))
    return shown


def to_markdown(table: Comparison, columns: Sequence[str] = TERMINAL, others: Sequence[Published] = ()) -> str:
    """A pipe table with its title and caption, intervals in brackets; published rows below, under their own heading."""
    keys = keys_of(table, columns)
    head = ["", *(heading(table, key).replace("\n", " ") for key in keys), ""]
    rows = [[line.name, *(plain(line, key) for key in keys), line.verdict] for line in table.lines]
    body = pipes([head, ["---", *("---:" for _ in keys), "---"], *rows])
    return f"{title(table)}\n\n{body}\n\n{caption(table)}\n" + apart(others)


def apart(others: Sequence[Published]) -> str:
    """Published rows in Markdown, one table a source, under a heading that says what they are; empty for none."""
    blocks = [f"\n## {HEADING}\n\n{WARNING}\n"] if others else []
    for other in others:
        names = list(other.columns)
        lines = [["", *map(other.heading, names)], ["---", *("---:" for _ in names)]]
        lines += [[method, *(other.text(method, name) for name in names)] for method in other.rows]
        blocks.append(f"\n### {other.title}\n\n{other.about}\n\n{pipes(lines)}\n")
    return "".join(blocks)


def pipes(lines: Sequence[Sequence[str]]) -> str:
    """A pipe table; the second line is the rule."""
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def to_csv(table: Comparison) -> str:
    """Every column as value, lower limit, upper limit and n, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    every = [column.key for column in table.columns]
    writer.writerow(["name", "verdict", *(f"{key}_{part}".removesuffix("_value") for key in every for part in ("value", "lo", "hi", "n"))])
    for line in table.lines:
        numbers = [number for key in every for number in (line.cells[key].value, line.cells[key].lo, line.cells[key].hi, line.cells[key].n)]
        writer.writerow([line.name, line.verdict, *("" if number is None else number for number in numbers)])
    return out.getvalue()


def to_json(table: Comparison, others: Sequence[Published] = ()) -> str:
    """The table with unrounded numbers, ranks and verdicts; published rows under a key of their own."""
    content = {
        "suite": table.suite,
        "concept": table.concept,
        "protocol": table.protocol,
        "rows": [_plain_line(line) for line in table.lines],
    }
    return json.dumps(
        content | ({"published": [other.model_dump() for other in others]} if others else {}),
        indent=1,
        sort_keys=True,
        ensure_ascii=False,
    )


def title(table: Comparison) -> str:
    suite = table.suite
    return f"Erasing {table.concept['name']!r} · suite {suite['name']} v{suite['version']} · protocol {table.protocol['hash']}"


def caption(table: Comparison) -> str:
    """What the numbers are, and how far the judge can be trusted."""
    first = table.lines[0].entry.results
    parts = ["Ranges: 95 % intervals; differences to the base are paired on seeds, of shares in points."]
    if first["erased"]:
        parts = ["Named and implied: target seen / another thing / unrecognised.", "Ranges: 95 % intervals, of the target where three"]
        parts.append("numbers stand; differences to the base are paired on seeds, in points.")
    if first["recipes"]:
        parts.append("A recipe counts what its detector finds: a model that draws noise, or nothing, reads 0. See fidelity beside it.")
    if any(cell.differs for line in table.lines for cell in line.cells.values()):
        parts.append("≠: measured another way than the column's first value; never ranked.")
    records = [record for line in table.lines for record in line.entry.results["metrics"].values()]
    if warnings := sorted({warning for record in records for warning in record.get("warnings", [])}):
        parts.append("; ".join(warnings) + ".")
    if first["floor"]:
        parts.append(f"The judge sees the target in {100 * first['floor']['rate']:.0f} % of the base's kept images (floor);")
        parts.append(f"chance is {100 * first['chance']['target_present']:.0f} %.")
    if not table.suite["ranked"]:
        parts.append("Too few images to rank methods.")
    elif any(line.ranks for line in table.lines):
        parts.append("#: rank by paired tests (Holm); equal ranks are ties.")
    return " ".join(parts)


def heading(table: Comparison, key: str) -> str:
    column, n = table.column(key), table.n(key)
    shown = column.title.removesuffix(": target") + column.heading.removeprefix(column.title)
    return shown + (f"\nn={n}" if n else "")


def _text(line: Line, key: str) -> str:
    """A cell's text; for named and implied all three calls, as in "6/84/10%"."""
    calls = [line.cells.get(f"{key}{call}") for call in ("", "_other", "_unrecognised")]
    values = [cell.value for cell in calls if cell is not None and cell.value is not None]
    return "/".join(f"{100 * value:.0f}" for value in values) + "%" if len(values) == 3 else line.cells[key].text


def plain(line: Line, key: str) -> str:
    """A cell with interval and rank, on one line."""
    cell, rank = line.cells[key], line.ranks.get(key)
    return _text(line, key) + (f" ({cell.interval})" if cell.interval else "") + (f" #{rank}" if rank else "")


def _style(line: Line, key: str) -> str:
    return "bold green" if line.ranks.get(key) == 1 else ""


def _plain_line(line: Line) -> dict[str, Any]:
    cells = {key: asdict(cell) for key, cell in line.cells.items()}
    return {"name": line.name, "verdict": line.verdict, "bar_met": line.bar_met, "ranks": line.ranks, "cells": cells}
