"""Cells of the canvas benchmark to pages and figures. What is missing is shown as missing, and never filled in.

A cell is docs/benchmarks/cells/MODEL/CONCEPT/METHOD[-seedN].json: its results.json, or {"failed": reason}. Peak memory of fits, which
results do not have, is gathered from artefacts into cells/MODEL/fit-memory.json.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from canvas_cells import Cell, Record, plan, read, read_memory
from canvas_figure import draw
from page import put

from erasure.errors import ErasureError
from erasure.eval import stats
from erasure.eval.bench import BASE
from erasure.eval.report.masks import shares_of
from erasure.eval.summary import CALLS, DESTROYED
from erasure.registry import methods

AIM = {"named": 0.05, "implied": 0.15, "kept": -0.10}
"""Upper limits of the named and the implied target, and the kept difference, that an erasure should reach."""
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
            f"settings of {cell.method}": _settings(record),
        }
        for what, identity in identities.items():
            known, wanted = first.setdefault(what, (cell, identity))
            if identity != wanted:
                raise ErasureError(
                    f"{cell.path(docs)} and {known.path(docs)} differ in {what}, so they are not of one table: "
                    "remove the one that is out of date, and run its cell again"
                )


def _settings(record: Record) -> dict[str, Any] | None:
    """As this version reads them: a field that came later has the value that the preset gives it."""
    artefact = record["artefact"]
    return None if artefact is None else methods.get(artefact["method"]).from_config(artefact["settings"]).config()


def publish(docs: Path, page: Path, models: Mapping[str, Sequence[str]], concepts: Sequence[str], seeds: Sequence[int]) -> None:
    """A page with the tables of models and their methods, and its figure beside it; text of the page outside of the marks stays."""
    tables = {model: rows(docs, model, names, concepts, seeds) for model, names in models.items()}
    points = {model: [row for row in table if row.done] for model, table in tables.items() if any(row.done for row in table)}
    drawing = page.with_suffix(".png")
    if points:
        draw(drawing, points)
    made = "\n\n".join(section(model, table, concepts) for model, table in tables.items())
    figure = f"![Target still seen against what is kept, with 95 % intervals]({drawing.name})\n\n" if points else ""
    put(page, "canvas_table.py", figure + made)
    print(made)


def summarise(docs: Path, file: Path, models: Mapping[str, Sequence[str]], concepts: Sequence[str], seeds: Sequence[int]) -> None:
    """What ``erasure methods`` says of each method: its line of the table in a few numbers."""
    found: dict[str, dict[str, Any]] = {}
    for model, names in models.items():
        for row in rows(docs, model, names, concepts, seeds):
            named, kept = row.rate("erased", "named", "target_present"), row.difference("kept", "all")
            if row.method != BASE and named and kept:
                values = {"named": {"rate": named.value, "lo": named.lo, "hi": named.hi, "n": named.n}, "kept": {"value": kept.value}}
                values["kept"] |= {"lo": kept.lo, "hi": kept.hi, "n": kept.n}
                concepts_done = len({cell.concept for cell in row.done})
                rounded = {side: {key: round(number, 4) for key, number in of.items()} for side, of in values.items()}
                found.setdefault(model, {})[row.method] = {**rounded, "concepts": concepts_done, "destroyed": row.destroyed}
    head = "# Made by benchmarks/canvas.py --table: test concepts, judge_test, pooled over concepts; see docs/benchmarks/canvas.md.\n"
    file.write_text(head + yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=140), encoding="utf-8")


def section(model: str, table: Sequence[Row], concepts: Sequence[str]) -> str:
    """The tables of one base model."""
    wanted, done = sum(len(row.wanted) for row in table), sum(len(row.done) for row in table)
    lines = [f"## {model}", "", f"{done} of {wanted} cells measured. {_conditions(table)}".strip(), "", HEAD]
    lines += [_line(row) for row in table]
    lines += ["", "By concept: named / implied target still seen, %; kept less the base's, points; † destroyed.", ""]
    lines += ["| method | " + " | ".join(concepts) + " |", "|---|" + "---|" * len(concepts)]
    lines += [f"| {row.method} | " + " | ".join(_concept(row, concept) for concept in concepts) + " |" for row in table]
    lines += _minimality(table)
    faults = [(cell, reason) for row in table for cell, reason in row.failed.items()]
    lines += ["", "Not measured:", ""] if faults else []
    for method, reason in dict.fromkeys((cell.method, reason) for cell, reason in faults):
        where = [cell for cell, said in faults if (cell.method, said) == (method, reason)]
        of = sorted({cell.concept for cell in where}, key=list(concepts).index)
        lines.append(f"* {method}, {len(where)} of its cells ({', '.join(of)}): {' '.join(reason.split())}")
    return "\n".join(lines)


def _minimality(table: Sequence[Row]) -> list[str]:
    """How much the methods that say so have switched off: the mean over cells, and the most."""
    lines = []
    for row in table:
        shares: dict[str, list[float]] = {}
        for record in row.done.values():
            for kind, blocks in shares_of((record["artefact"] or {}).get("details") or {}).items():
                shares.setdefault(kind, []).append(blocks[""]["off"] / blocks[""]["all"])
        said = ", ".join(f"{kind} {statistics.fmean(all_):.2%} (at most {max(all_):.2%})" for kind, all_ in shares.items())
        lines += [f"* {row.method} switches off, mean over {len(row.done)} cells: {said}."] if said else []
    return ["", *lines] if lines else []


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
    shared, of_all = (len({cell.concept for cell in cells}) for cells in (seeds[0], row.done))
    over = f"{len(seeds)} seeds" + (f" of {shared} of {of_all} concepts" if shared < of_all else "")
    return f"named {min(named):.1f}-{max(named):.1f}%, kept {_signed(min(kept))} to {_signed(max(kept))} ({over})"


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
