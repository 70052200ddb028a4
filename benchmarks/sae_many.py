"""One, five, twenty and half of all objects of the canvas erased at once: what is left, what is kept, what it costs.

    python benchmarks/sae_many.py --minutes 40        # make what is missing; the same command goes on
    python benchmarks/sae_many.py --methods itd       # of these methods alone
    python benchmarks/sae_many.py --table             # docs/benchmarks/sae_many.json, the figure and the table of docs/methods/sae.md

Sets are nested: the four test objects are in every set but the first, which is each of them alone; what is added comes
of the retain half, in an order picked by hash. All become one anchor that no set has. Scored are the suite's rows for
each test object, less those that ask for another erased thing (one test object is of the kept half). The table keeps
the records of the JSON whose images are no longer there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from page import put

from erasure.canvas.concepts import STAND_INS, canvas_concept
from erasure.canvas.splits import rank, splits
from erasure.canvas.world import world
from erasure.concept import Concept
from erasure.eval import stats
from erasure.eval.bench import BASE, Bench
from erasure.eval.generate import draw, under
from erasure.eval.report.plots import MARKERS, PALETTE
from erasure.eval.rows import Row
from erasure.eval.score import KEPT
from erasure.eval.suite import load_suite
from erasure.method import Eraser, Run
from erasure.models import load_base
from erasure.registry import methods

DOCS = Path(__file__).parents[1] / "docs"
METHODS = ("negative_prompt", "safree", "uce", "itd")
TESTED = tuple(name for name in splits().test if name in world().objects)
SIZES = (1, 5, 20, len(world().objects) // 2)
IMAGES = 80
ROUNDS = 2
"""Pairs of batches, base and eraser, for the ratio of times."""
RECORDS = DOCS / "benchmarks" / "sae_many.json"
HEAD = (
    "| erased | method | named | unseen synonym | unrecognised | kept - base | kept, bit by bit | time |\n"
    "|---:|---|---:|---:|---:|---:|---:|---:|"
)  # fmt: skip


def anchor() -> str:
    """What everything becomes: the first harmless object of the retain half, which is erased in no set."""
    free = (o for o in splits().retain if world().category_of(o) not in STAND_INS and o not in TESTED)
    return rank("many-anchor", free)[0]


def erased(concept: str, size: int) -> list[str]:
    """The set of a size in which a test object is erased."""
    if size == 1:
        return [concept]
    others = rank("many", splits().retain - set(TESTED) - {anchor()})
    return sorted([*TESTED, *others[: size - len(TESTED)]])


def concepts(names: Sequence[str]) -> list[Concept]:
    """Each as a table of one concept has it, but with the shared anchor, and nothing retained that is erased."""
    own = [canvas_concept(name) for name in names]
    return [replace(one, anchors=(anchor(),), retain=tuple(o for o in one.retain if o not in names)) for one in own]


def scored(rows: Sequence[Row], concept: str) -> list[Row]:
    """The rows without those that ask for another thing that any set erases."""
    gone = {name for size in SIZES for name in erased(concept, size)} | set(TESTED)
    return [row for row in rows if not (set(row.objects) - {concept}) & gone]


def order(chosen: Sequence[str] = METHODS) -> Iterator[tuple[int, str, str]]:
    yield from ((size, concept, method) for size in SIZES for concept in TESTED for method in chosen)


def run(arguments: argparse.Namespace) -> None:
    """Make what is missing while there is time."""
    started, slowest = time.monotonic(), 0.0
    pipe = load_base("canvas", device="cpu")
    for size, concept, method in order(arguments.methods):
        bench = at(arguments.out, pipe, concept)
        if (bench.folder / "results" / f"{method}-{size}" / "pace.json").exists():
            continue
        if arguments.minutes is not None and time.monotonic() - started + slowest > 60 * arguments.minutes:
            print("out of time; the same command goes on from here")
            return
        began = time.monotonic()
        make(bench, method, size)
        slowest = max(slowest, time.monotonic() - began)
        print(f"{concept} {method} {size}: done, {time.monotonic() - began:.0f} s", flush=True)


def at(out: Path, pipe: Any, concept: str) -> Bench:
    suite = load_suite("canvas").limited(IMAGES)
    return Bench(out / concept, pipe, "canvas", suite, canvas_concept(concept), progress=False)


def make(bench: Bench, method: str, size: int) -> None:
    """Images, samples and pace of a method on one test object, and of the base before it."""
    if not (bench.folder / "results" / BASE / "samples.jsonl").exists():
        bench.evaluate(BASE, bench.generate(BASE))
    eraser = methods.get(method)().fit(bench.pipe, concepts(erased(bench.concept.name, size)), run=Run(progress=False))
    name = f"{method}-{size}"
    folder = bench.evaluate(name, bench.generate(name, eraser))
    (folder / "pace.json").write_text(json.dumps({"ratios": pace(bench, eraser)}))


def pace(bench: Bench, eraser: Eraser) -> list[float]:
    """CPU seconds of a batch with the eraser to those of the same batch without it, one ratio a round, who goes first taking turns."""
    rows = [row for row in bench.rows if row.kind in KEPT][:8]
    found: list[float] = []
    with under(bench.pipe, bench.suite.protocol):
        for i in range(ROUNDS):
            seconds = {}
            for on in (True, False) if i % 2 else (False, True):
                with eraser.attach(bench.pipe) if on else nullcontext():
                    before = time.process_time()
                    draw(bench.pipe, rows, bench.suite.protocol)
                    seconds[on] = time.process_time() - before
            found.append(seconds[True] / seconds[False])
    return found


def gather(out: Path, before: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """A record for each size and method, pooled over the test objects; where there is none of all of these, the one from ``before``."""
    parts: dict[tuple[int, str], list[tuple[Bench, str]]] = {}
    for size, concept, method in order():
        bench, name = at(out, None, concept), f"{method}-{size}"
        if (bench.folder / "results" / name / "pace.json").exists():
            parts.setdefault((size, method), []).append((bench, name))
    found = {(record["erased"], record["method"]): record for record in before}
    for (size, method), own in parts.items():
        if len(own) >= found.get((size, method), {"objects": 0})["objects"]:
            found[size, method] = {"erased": size, "method": method, **pooled(own)}
    return [found[size, method] for size in SIZES for method in METHODS if (size, method) in found]


def pooled(parts: Sequence[tuple[Bench, str]]) -> dict[str, Any]:
    """Rates with Wilson's intervals, the kept difference with Tango's, and the ratio of times with quartiles, over some test objects."""
    calls: dict[str, list[bool]] = {"named": [], "implied": [], "unrecognised": []}
    before, after, same, ratios = [], [], [], []
    for bench, name in parts:
        mine, base = ({sample.id: sample for sample in bench.samples(of)} for of in (name, BASE))
        for row in scored(bench.rows, bench.concept.name):
            if row.kind in KEPT:
                before.append(bool(base[row.id].wanted_present))
                after.append(bool(mine[row.id].wanted_present))
                same.append(image(bench, name, row) == image(bench, BASE, row))
            else:
                calls["implied" if row.kind == "implied" else "named"].append(bool(mine[row.id].target_present))
                calls["unrecognised"].append(bool(mine[row.id].unrecognised))
        ratios += json.loads((bench.folder / "results" / name / "pace.json").read_text())["ratios"]
    low, middle, high = np.percentile(ratios, (25, 50, 75)).round(3).tolist()
    return {
        **{side: share(seen) for side, seen in calls.items()},
        "kept": dict(zip(("value", "lo", "hi"), stats.paired_difference(np.array(before), np.array(after)), strict=True), n=len(before)),
        "identical": share(same),
        "time": {"value": middle, "lo": low, "hi": high, "n": len(ratios)},
        "objects": len(parts),
    }


def share(seen: Sequence[bool]) -> dict[str, Any]:
    lo, hi = stats.wilson(sum(seen), len(seen))
    return {"value": statistics.fmean(seen), "lo": lo, "hi": hi, "n": len(seen)}


def image(bench: Bench, name: str, row: Row) -> bytes:
    """An image's file: equal pixels give equal bytes."""
    return next((bench.folder / "images" / name).rglob(f"{row.id}.png")).read_bytes()


def publish(records: Sequence[dict[str, Any]]) -> None:
    """The records, the figure, and the table in the page."""
    RECORDS.write_text(json.dumps(records, indent=1) + "\n")
    figure(records).savefig(DOCS / "methods" / "sae-many.png", metadata={"Software": None})
    table = "\n".join([HEAD, *map(line, records)])
    put(DOCS / "methods" / "sae.md", Path(__file__).name, table)
    print(table)


def line(record: dict[str, Any]) -> str:
    def percent(key: str, form: str = ".0f") -> str:
        value = record.get(key)
        return "-" if value is None else f"{100 * value['value']:{form}} % ({100 * value['lo']:{form}}-{100 * value['hi']:{form}})"

    kept, pace = record["kept"], record["time"]
    sides = " | ".join(percent(key) for key in ("named", "implied", "unrecognised"))
    return (
        f"| {record['erased']} | {record['method']} | {sides} | {100 * kept['value']:+.1f} "
        f"({100 * kept['lo']:+.1f} to {100 * kept['hi']:+.1f}) | {100 * record['identical']['value']:.0f} % | {pace['value']:.2f} |"
    )


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Named target and what is kept against how many are erased."""
    drawn = Figure(figsize=(10, 3.8), layout="constrained", facecolor="white", dpi=110)
    for axes, key, title in zip(
        drawn.subplots(1, 2), ("named", "kept"), ("concept named: still seen, %", "kept less the base's, points"), strict=True
    ):
        for method, colour, marker in zip(METHODS, PALETTE, MARKERS, strict=False):
            own = [record for record in records if record["method"] == method]
            x, y = [record["erased"] for record in own], [100 * record[key]["value"] for record in own]
            spread = [[100 * abs(record[key][end] - record[key]["value"]) for record in own] for end in ("lo", "hi")]
            axes.errorbar(x, y, spread, color=colour, marker=marker, capsize=2, label=method)
        axes.set_xscale("log")
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.set_xlabel("objects erased at once, of 74")
        axes.set_title(title, fontsize=10)
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="start nothing that would end later")
    parser.add_argument("--out", type=Path, default=Path("out/sae-many"), help="where images go")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="make these alone")
    parser.add_argument("--table", action="store_true", help="write table and figure of what there is, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        publish(gather(arguments.out, json.loads(RECORDS.read_text()) if RECORDS.exists() else []))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
