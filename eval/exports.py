"""A comparison as LaTeX (booktabs) or as a bare HTML table, for papers and pages."""

import html
from collections.abc import Sequence

from . import published, tables
from .compare import Comparison, Line
from .published import Published

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {c: f"\\{c}" for c in "&%$#_{}"}
SYMBOLS = {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "≠": r"$\neq$", "·": r"$\cdot$", "−": "--", "≥": r"$\geq$", "η": r"$\eta$"}


def to_latex(table: Comparison, others: Sequence[Published] = ()) -> str:
    """A table of booktabs; published rows as tables of their own below it. Needs \\usepackage{booktabs}."""
    keys = tables.keys_of(table)
    head = [[""] + [_tex(tables.heading(table, key).replace("\n", " ")) for key in keys] + [""]]
    rows = [[_tex(line.name)] + [_best(line, key) for key in keys] + [_tex(line.verdict)] for line in table.lines]
    blocks = [_tabular(head + rows, "l" + "r" * len(keys) + "l", f"{tables.title(table)}. {tables.caption(table)}")]
    for other in others:
        names = list(other.columns)
        lines = [["", *(_tex(other.heading(name)) for name in names)]]
        lines += [[_tex(method), *(_tex(other.text(method, name)) for name in names)] for method in other.rows]
        blocks.append(_tabular(lines, "l" + "r" * len(names), f"{published.HEADING}: {other.title}. {other.about}"))
    return "\n".join(blocks)


def to_html(table: Comparison, others: Sequence[Published] = ()) -> str:
    """A <table> with caption, and one for each published source under a heading; no style, no script."""
    keys = tables.keys_of(table)
    head = ["", *(tables.heading(table, key).replace("\n", " ") for key in keys), ""]
    rows = [[line.name, *(tables.plain(line, key) for key in keys), line.verdict] for line in table.lines]
    blocks = [_html_table(tables.title(table), head, rows), f"<p>{html.escape(tables.caption(table))}</p>"]
    if others:
        blocks.append(f"<h2>{html.escape(published.HEADING)}</h2>\n<p>{html.escape(published.WARNING)}</p>")
    for other in others:
        names = list(other.columns)
        lines = [[method, *(other.text(method, name) for name in names)] for method in other.rows]
        blocks.append(_html_table(other.title, ["", *map(other.heading, names)], lines))
        blocks.append(f"<p>{html.escape(other.about)}</p>")
    return "\n".join(blocks) + "\n"


def _tabular(lines: list[list[str]], align: str, caption: str) -> str:
    head, *rows = (" & ".join(cells) + r" \\" for cells in lines)
    body = "\n".join(["\\toprule", head, "\\midrule", *rows, "\\bottomrule"])
    begin = f"\\begin{{table}}\n\\centering\n\\caption{{{_tex(caption)}}}\n\\begin{{tabular}}{{{align}}}"
    return f"{begin}\n{body}\n\\end{{tabular}}\n\\end{{table}}\n"


def _best(line: Line, key: str) -> str:
    text = _tex(tables.plain(line, key))
    return f"\\textbf{{{text}}}" if line.ranks.get(key) == 1 else text


def _tex(text: str) -> str:
    return "".join(SPECIAL.get(c) or SYMBOLS.get(c, c) for c in text)


def _html_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        named = f'<th scope="{"row" if tag == "td" else "col"}">{html.escape(cells[0])}</th>'
        return f"<tr>{named}{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells[1:])}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f"<table>\n<caption>{html.escape(title)}</caption>\n<thead>\n{row(head, 'th')}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
