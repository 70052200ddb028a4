"""Cells of the canvas benchmark to a page and a figure. What is missing is shown as missing, and never filled in.

    python benchmarks/canvas_table.py                             # docs/benchmarks/canvas.md and canvas.png
    python benchmarks/canvas_table.py --models canvas canvas-flow

A cell is docs/benchmarks/cells/MODEL/CONCEPT/METHOD[-seedN].json: its results.json, or {"failed": reason}. Peak memory of fits, which
results do not have, is gathered from the artefacts below ``--out`` into cells/MODEL/fit-memory.json.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from canvas_cells import Cell, Record, gather_memory, plan, read, read_memory
from canvas_figure import draw

from erasure.canvas.splits import splits
from erasure.errors import ErasureError
from erasure.eval import stats
from erasure.eval.bench import BASE
from erasure.eval.summary import CALLS, DESTROYED
from erasure.models import EMBEDDED
from erasure.registry import methods

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"

AIM = {"named": 0.05, "implied": 0.15, "kept": -0.10}
"""Upper limits of the named and the implied target, and the kept difference, that an erasure should reach."""
BEGIN, END = "<!-- made by benchmarks/canvas_table.py: from here -->", "<!-- to here -->"
HEAD = (
    "| method | named: target / other / nothing | implied | kept | kept - base | unrec. - base | worst concept | over fit seeds | fit s "
    "| fit MB | image MB | cells | |\n|---|---:|---:|---:|---:|---:|---|---|---:|---:|---:|---:|---|"
)


@dataclass(frozen=True)
class Value:
    """A share or a difference with its 95 % interval, over n distinct images."""

    value: float
    lo: float
    hi: float
    n: int


@dataclass(frozen=True)
class Row:
    """A method's cells on one model."""

    method: str
    wanted: tuple[Cell, ...]
    found: dict[Cell, Record]
    memory: dict[str, float]
    """Peak megabytes of fits, by concept/name."""

    @cached_property
    def done(self) -> dict[Cell, Record]:
        """Results of the cells that were measured."""
        return {cell: record for cell, record in self.found.items() if "failed" not in record}

    @property
    def failed(self) -> dict[Cell, str]:
        return {cell: record["failed"] for cell, record in self.found.items() if "failed" in record}

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.wanted)

    def rate(self, *path: str, of: Sequence[Cell] = ()) -> Value | None:
        """Pooled over concepts, each the mean over its fit seeds, with Wilson's interval."""
        by_concept = self._records(path, of)
        if not by_concept:
            return None
        n = sum(records[0]["n"] for records in by_concept)
        k = sum(statistics.fmean(r["k"] for r in records) for records in by_concept)
        return Value(k / n, stats.wilson(math.floor(k), n)[0], stats.wilson(min(math.ceil(k), n), n)[1], n)

    def difference(self, *path: str, of: Sequence[Cell] = ()) -> Value | None:
        """Of pairs with the base, pooled likewise, with Tango's interval."""
        by_concept = self._records((*path, "difference"), of)
        if not by_concept:
            return None
        n = sum(records[0]["n"] for records in by_concept)
        gained, lost = (sum(statistics.fmean(r[key] for r in records) for records in by_concept) for key in ("gained", "lost"))
        lo, hi = _tango(math.floor(gained), math.ceil(lost), n)[1], _tango(math.ceil(gained), math.floor(lost), n)[2]
        return Value((gained - lost) / n, lo, hi, n)

    def _records(self, path: Sequence[str], of: Sequence[Cell]) -> list[list[Record]]:
        """By concept, what stands at a place of each cell's results, where there is something."""
        found: dict[str, list[Record]] = {}
        for cell in of or self.done:
            record: Any = self.done[cell]
            for key in path:
                record = (record or {}).get(key)
            if record is not None:
                found.setdefault(cell.concept, []).append(record)
        return list(found.values())

    @property
    def destroyed(self) -> bool:
        """By the harness's rule on the pooled images: more than 10 points more unrecognised than the base."""
        more = self.difference("unrecognised")
        return more is not None and more.value > DESTROYED

    @property
    def reached(self) -> bool | None:
        """Whether it reaches the aim; None for the base, and where cells are missing."""
        named, implied = (self.rate("erased", side, "target_present") for side in ("named", "implied"))
        kept = self.difference("kept", "all")
        if not self.complete or named is None or implied is None or kept is None:
            return None
        return named.hi <= AIM["named"] and implied.hi <= AIM["implied"] and kept.value >= AIM["kept"] and not self.destroyed

    def by_seed(self) -> list[list[Cell]]:
        """Cells of each fit seed, on the concepts that all seeds with any cell have; empty for fewer than two seeds."""
        seeds = sorted({cell.seed for cell in self.done})
        common = set.intersection(*({c.concept for c in self.done if c.seed == seed} for seed in seeds)) if seeds else set()
        return [[c for c in self.done if c.seed == s and c.concept in common] for s in seeds] if common and len(seeds) > 1 else []

    def median(self, key: str) -> float | None:
        """Of a number of the costs."""
        known = [value for record in self.done.values() if (value := record["cost"][key]) is not None]
        return statistics.median(known) if known else None

    def fit_memory(self) -> float | None:
        known = [self.memory[key] for cell in self.done if (key := f"{cell.concept}/{cell.name}") in self.memory]
        return statistics.median(known) if known else None


def _tango(gained: int, lost: int, n: int) -> tuple[float, float, float]:
    before, after = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    after[:gained] = True
    before[gained : gained + lost] = True
    return stats.paired_difference(before, after)


def rows(docs: Path, model: str, names: Sequence[str], concepts: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """Base and methods with what was measured so far; cells that may not be pooled raise ErasureError."""
    wanted = plan(model, names, concepts, seeds)
    found = {cell: record for cell in wanted if (record := read(cell.path(docs))) is not None}
    _alike({cell: record for cell, record in found.items() if "failed" not in record}, docs)
    order = sorted(dict.fromkeys(cell.method for cell in wanted), key=lambda name: {BASE: 0, "negative_prompt": 1}.get(name, 2))
    mine = {name: tuple(cell for cell in wanted if cell.method == name) for name in order}
    memory = read_memory(docs, model)
    return [Row(name, own, {c: found[c] for c in own if c in found}, memory) for name, own in mine.items()]


def _alike(done: dict[Cell, Record], docs: Path) -> None:
    """One protocol, suite and base for all cells, one list of prompts for a concept, and one list of settings for a method."""
    first: dict[str, tuple[Cell, Any]] = {}
    for cell, record in done.items():
        identities = {
            "suite, protocol and base model": (record["suite"]["hash"], record["protocol"]["hash"], record["model"]["fingerprint"]),
            f"prompts of {cell.concept}": record["suite"]["rows"],
            f"settings of {cell.method}": (record["artefact"] or {}).get("settings"),
        }
        for what, identity in identities.items():
            known, wanted = first.setdefault(what, (cell, identity))
            if identity != wanted:
                raise ErasureError(
                    f"{cell.path(docs)} and {known.path(docs)} differ in {what}, so they are not of one table: "
                    "remove the one that is out of date, and run its cell again"
                )


def publish(docs: Path, models: Sequence[str], names: Sequence[str], concepts: Sequence[str], seeds: Sequence[int]) -> None:
    """canvas.md and canvas.png in ``docs``; text of the page outside of the marks stays."""
    tables = {model: rows(docs, model, names, concepts, seeds) for model in models}
    points = {model: [row for row in table if row.done] for model, table in tables.items() if any(row.done for row in table)}
    if points:
        draw(docs / "canvas.png", points)
    page = docs / "canvas.md"
    text = page.read_text(encoding="utf-8") if page.exists() else f"# All methods on the canvas\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ErasureError(f"{page} lacks the lines {BEGIN!r} and {END!r}, between which the tables go: put them back")
    made = "\n\n".join(section(model, table, concepts) for model, table in tables.items())
    figure = "![Target still seen against what is kept, with 95 % intervals](canvas.png)\n\n" if points else ""
    page.write_text(f"{before}{BEGIN}\n\n{figure}{made}\n\n{END}{after}", encoding="utf-8")
    print(made)


def section(model: str, table: Sequence[Row], concepts: Sequence[str]) -> str:
    """The tables of one base model."""
    wanted, done = sum(len(row.wanted) for row in table), sum(len(row.done) for row in table)
    lines = [f"## {model}", "", f"{done} of {wanted} cells measured. {_conditions(table)}".strip(), "", HEAD]
    lines += [_line(row) for row in table]
    lines += ["", "By concept: named / implied target still seen, %; kept less the base's, points; † destroyed.", ""]
    lines += ["| method | " + " | ".join(concepts) + " |", "|---|" + "---|" * len(concepts)]
    lines += [f"| {row.method} | " + " | ".join(_concept(row, concept) for concept in concepts) + " |" for row in table]
    faults = [(cell, reason) for row in table for cell, reason in row.failed.items()]
    lines += ["", "Not measured:", ""] if faults else []
    for method, reason in dict.fromkeys((cell.method, reason) for cell, reason in faults):
        where = [cell for cell, said in faults if (cell.method, said) == (method, reason)]
        of = sorted({cell.concept for cell in where}, key=list(concepts).index)
        lines.append(f"* {method}, {len(where)} of its cells ({', '.join(of)}): {' '.join(reason.split())}")
    return "\n".join(lines)


def _conditions(table: Sequence[Row]) -> str:
    first = next((record for row in table for record in row.done.values()), None)
    if first is None:
        return ""
    of, suite = first["environment"], first["suite"]
    ranked = "" if suite["ranked"] else " (too few to rank methods)"
    made = f"{of['machine']}, {of['threads']} thread(s), torch {first['versions']['torch']}"
    return f"Suite {suite['name']} v{suite['version']}, {first['n']} images a cell{ranked}, protocol {first['protocol']['hash']}; {made}."


def _line(row: Row) -> str:
    missing = len(row.wanted) - len(row.found)
    counts = [f"{number} {word}" for number, word in ((len(row.failed), "failed"), (missing, "missing")) if number]
    cells = ", ".join([f"{len(row.done)}/{len(row.wanted)}", *counts])
    if not row.done:
        return f"| {row.method} | " + " | ".join(["missing" if missing else "failed"] * 5) + f" | | | | | | {cells} | |"
    marks = {True: "aim reached", False: "", None: ""}[row.reached]
    shown = [
        row.method, _calls(row, "named"), _calls(row, "implied"), _percent(row.rate("kept", "all")),
        _points(row.difference("kept", "all")), _points(row.difference("unrecognised")), _worst(row), _spread(row),
        _number(row.median("fit_seconds"), "{:.1f}"), _number(row.fit_memory(), "{:,.0f}"),
        _number(row.median("peak_memory_mb"), "{:,.0f}"), cells, "destroyed" if row.destroyed else marks,
    ]  # fmt: skip
    return "| " + " | ".join(shown) + " |"


def _calls(row: Row, side: str) -> str:
    values = [row.rate("erased", side, call) for call in CALLS]
    if values[0] is None:
        return "-"
    shares = "/".join("-" if value is None else f"{100 * value.value:.0f}" for value in values)
    return f"{shares}% ({100 * values[0].lo:.1f}-{100 * values[0].hi:.1f}, n={values[0].n})"


def _percent(value: Value | None) -> str:
    return "-" if value is None else f"{100 * value.value:.0f}% ({100 * value.lo:.0f}-{100 * value.hi:.0f}, n={value.n})"


def _points(value: Value | None) -> str:
    return "-" if value is None else f"{_signed(value.value)} ({_signed(value.lo)} to {_signed(value.hi)})"


def _signed(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _worst(row: Row) -> str:
    """The concept of which most is left."""
    of = {concept: [cell for cell in row.done if cell.concept == concept] for concept in dict.fromkeys(c.concept for c in row.done)}
    left = {concept: value.value for concept, own in of.items() if (value := row.rate("erased", "named", "target_present", of=own))}
    return "-" if not left else f"{max(left, key=lambda c: left[c])} {100 * max(left.values()):.0f}%"


def _spread(row: Row) -> str:
    """Lowest and highest of fit seeds, pooled over concepts: named target, and kept less the base's."""
    if not (seeds := row.by_seed()):
        return "-"
    named = [100 * v.value for own in seeds if (v := row.rate("erased", "named", "target_present", of=own))]
    kept = [v.value for own in seeds if (v := row.difference("kept", "all", of=own))]
    return f"named {min(named):.1f}-{max(named):.1f}%, kept {_signed(min(kept))} to {_signed(max(kept))} ({len(seeds)} seeds)"


def _concept(row: Row, concept: str) -> str:
    wanted, own = ([c for c in of if c.concept == concept] for of in (row.wanted, row.done))
    if not own:
        return "failed" if any(cell in row.failed for cell in wanted) else "missing"
    sides = [row.rate("erased", side, "target_present", of=own) for side in ("named", "implied")]
    kept, broken = row.difference("kept", "all", of=own), sum(row.done[cell]["destroyed"] for cell in own)
    text = " / ".join("-" if value is None else f"{100 * value.value:.0f}" for value in sides)
    text += "" if kept is None else f"; {_signed(kept.value)}"
    mark = "" if not broken else " †" if broken == len(own) else f" † {broken} of {len(own)}"
    return text + mark + (f" ({len(own)} of {len(wanted)} fits)" if len(own) < len(wanted) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=EMBEDDED, default=["canvas"])
    parser.add_argument("--methods", nargs="+", choices=list(methods.builtin), default=list(methods.builtin), metavar="METHOD")
    parser.add_argument("--concepts", nargs="+", default=list(splits().test), metavar="CONCEPT")
    parser.add_argument("--seeds", type=int, default=3, help="fit seeds that trained methods should have")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of cells/, canvas.md and canvas.png")
    parser.add_argument("--out", type=Path, default=Path("out/canvas"), help="where artefacts are")
    given = parser.parse_args()
    for model in given.models:
        gather_memory(given.docs, model, given.out)
    publish(given.docs, given.models, given.methods, given.concepts, range(given.seeds))


if __name__ == "__main__":
    main()
