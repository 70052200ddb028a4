"""Rules that merge LoRA experts, compared on the canvas: 2, 4 and 8 dev concepts, one expert of `safety_dpo` (preset canvas) each.

    python benchmarks/merging.py --minutes 40        # make what is missing; the same command goes on
    python benchmarks/merging.py --table             # docs/benchmarks/merging.json and the table of merging.md

Prompts, templates and seeds are the dev split's, and the judge is judge_dev: no test concept is touched. No prompt asks for
what another expert erases, and no expert retains it or turns its concept into it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from merging_prompts import CONCEPTS, IMAGES, SIZES, Asked, concept_of, kept, most, named, share
from page import put
from search_dev import draw, seen
from torch import Tensor

from erasure import artifact, lora, merging
from erasure.adapter import AdapterEraser
from erasure.canvas.judge_dev import judge_dev
from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.eval.stats import wilson
from erasure.manifest import CONFIG
from erasure.method import Eraser, Run
from erasure.methods.safety_dpo import SafetyDPO
from erasure.models import load_base

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
METHOD = SafetyDPO(preset="canvas")
STEPS = 20
"""Sampling steps of co-merge's calibration, as in `erasure merge`."""
HEAD = (
    "| experts | merged by | named: still seen | named: unrecognised | kept | lost by the cut | MB | s |\n"
    "|---:|---|---:|---:|---:|---:|---:|---:|"
)  # fmt: skip

Merged = tuple[dict[str, Tensor], float]
Factors = Sequence[Mapping[str, Tensor]]


def cut(experts: Factors, pipe: Any, concepts: Sequence[Concept]) -> Merged:
    return merging.merge(experts, rank=METHOD.rank)


def co_merge(experts: Factors, pipe: Any, concepts: Sequence[Concept]) -> Merged:
    """Calibrated as `erasure merge` does it."""
    prompts = [phrase for concept in concepts for phrase in (*concept.targets[:2], *concept.anchors[:1])]
    return merging.merge(experts, "co-merge", wins=merging.count_wins(pipe, experts, prompts, steps=STEPS))


def ties(density: float, trim: merging.Trim = "layer") -> Callable[..., Merged]:
    return lambda experts, pipe, concepts: merging.merge(experts, "ties", density=density, trim=trim)


RULES: dict[str, Callable[..., Merged]] = {
    "average": lambda experts, pipe, concepts: merging.merge(experts),
    "co-merge": co_merge,
    "sum": lambda experts, pipe, concepts: (merging.added(experts), 0.0),
    "ties, density 0.3": ties(0.3),
    "average, cut": cut,
    "ties, density 0.1": ties(0.1),
    "ties, density 0.5": ties(0.5),
    "ties, vector, density 0.2": ties(0.2, "vector"),
}
"""By their order in time; the last is TIES as the paper has it."""


def calls(pipe: Any, asked: Asked) -> list[list[bool]]:
    """Of each image, whether the judge sees what was asked for, and whether it knows nothing there; never both."""
    verdict = judge_dev()(draw(pipe, asked.texts, asked.seed))
    unknown = verdict.unrecognised | ~verdict.present.any(1)
    there = torch.stack([seen(verdict, name)[i] for i, name in enumerate(asked.wanted)])
    return [(there & ~unknown).tolist(), unknown.tolist()]


@dataclass(frozen=True)
class Bench:
    """Experts and finished cells in one folder."""

    out: Path
    pipe: Any = None

    def tasks(self) -> Iterator[tuple[Path, Callable[[], None]]]:
        """What there is to make, in order: the file that says that it is there, and how."""
        yield self.cell("base"), lambda: self.keep("base", self.alone(None, CONCEPTS, IMAGES))
        for name in CONCEPTS:
            yield self.out / "experts" / name / CONFIG, lambda name=name: self.fit(name)  # type: ignore[misc]
            yield self.cell(f"expert {name}"), lambda name=name: self.expert(name)  # type: ignore[misc]
        for rule in RULES:
            for size in SIZES:
                yield self.cell(f"{size} {rule}"), lambda size=size, rule=rule: self.merge(size, rule)  # type: ignore[misc]

    def cell(self, name: str) -> Path:
        return self.out / "cells" / f"{name.replace(',', '').replace(' ', '-')}.json"

    def keep(self, name: str, record: Mapping[str, Any]) -> None:
        file = self.cell(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".partial")
        draft.write_text(json.dumps(record) + "\n")
        draft.replace(file)

    def fit(self, name: str) -> None:
        began = time.process_time()
        eraser = METHOD.fit(self.pipe, [concept_of(name)], run=Run(progress=False))
        cost = {"fit_seconds": round(time.process_time() - began, 1)}
        artifact.save(eraser, self.out / "experts" / name, pipe=self.pipe, base_id="canvas", cost=cost)

    def load(self, name: str) -> AdapterEraser:
        """An expert of the settings that this file has; one of others raises."""
        folder = self.out / "experts" / name
        eraser, config = artifact.load_eraser(folder)
        if eraser.method != METHOD or list(eraser.concepts) != [concept_of(name)]:
            raise ErasureError(f"{folder} was fitted with other settings than {config['method']} has now: give another --out")
        assert isinstance(eraser, AdapterEraser)
        return eraser

    def alone(self, eraser: Eraser | None, names: Sequence[str], n: int) -> dict[str, Any]:
        """Calls on all named images of some concepts, and on the first n kept ones."""
        with eraser.attach(self.pipe) if eraser else nullcontext():
            own = {name: calls(self.pipe, named(name, most(name))) for name in names}
            return {"named": own, "kept": calls(self.pipe, kept(n))}

    def expert(self, name: str) -> None:
        eraser = self.load(name)
        cost = artifact.read_config(self.out / "experts" / name)["cost"]
        size = (self.out / "experts" / name / lora.LORA).stat().st_size
        self.keep(f"expert {name}", {**self.alone(eraser, [name], IMAGES // 2), "bytes": size, "seconds": cost["fit_seconds"]})

    def merge(self, size: int, rule: str) -> None:
        """Merge, write the file, and score a merge."""
        erasers = [self.load(name) for name in CONCEPTS[:size]]
        concepts = tuple(concept for eraser in erasers for concept in eraser.concepts)
        began = time.process_time()
        factors, lost = RULES[rule]([eraser.factors for eraser in erasers], self.pipe, concepts)
        seconds = time.process_time() - began
        folder = self.cell(f"{size} {rule}").with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        file = lora.write(factors, folder)
        with AdapterEraser(METHOD, concepts, factors).attach(self.pipe):
            own = {name: calls(self.pipe, named(name, share(size))) for name in CONCEPTS[:size]}
            others = calls(self.pipe, kept(IMAGES))
        cost = {"lost": lost, "bytes": file.stat().st_size, "seconds": seconds}
        self.keep(f"{size} {rule}", {"named": own, "kept": others, **cost})

    def run(self, minutes: float | None) -> None:
        """Make what is missing while there is time."""
        started, slowest = time.monotonic(), 0.0
        for file, make in self.tasks():
            if file.exists():
                continue
            if minutes is not None and time.monotonic() - started + slowest > 60 * minutes:
                print("out of time; the same command goes on from here")
                return
            began = time.monotonic()
            make()
            slowest = max(slowest, time.monotonic() - began)
            print(f"{file.relative_to(self.out)}: done, {time.monotonic() - began:.0f} s", flush=True)

    def records(self) -> list[dict[str, Any]]:
        """A record for each line of the table that is whole."""
        found = []
        for size in SIZES:
            names = CONCEPTS[:size]
            lines = {"base": ["base"], "the expert alone": [f"expert {name}" for name in names]}
            lines |= {rule: [f"{size} {rule}"] for rule in sorted(RULES)}
            for line, cells in lines.items():
                if all(self.cell(cell).exists() for cell in cells):
                    read = [json.loads(self.cell(cell).read_text()) for cell in cells]
                    found.append({"experts": size, "rule": line, **pooled(read, names)})
        return found


def pooled(cells: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Rates over the cells of a line with Wilson's intervals; named by concept, too. Sizes and seconds are the mean of the cells."""
    n = share(len(names))
    own = {name: cell["named"][name] for cell in cells for name in names if name in cell["named"]}
    hits = {name: there[:n] for name, (there, _) in own.items()}
    others = [call for cell in cells for call in cell["kept"][0]]
    unknown = [call for _, unrecognised in own.values() for call in unrecognised[:n]]
    means = {key: statistics.fmean(cell[key] for cell in cells) for key in ("bytes", "seconds", "lost") if key in cells[0]}
    return {
        "named": rate([hit for each in hits.values() for hit in each]),
        "unrecognised": rate(unknown),
        "kept": rate(others),
        "by concept": {name: statistics.fmean(each) for name, each in hits.items()},
        **means,
    }


def rate(found: Sequence[bool]) -> dict[str, Any]:
    lo, hi = wilson(sum(found), len(found))
    return {"value": statistics.fmean(found), "lo": lo, "hi": hi, "n": len(found)}


def line(record: Mapping[str, Any]) -> str:
    def percent(key: str) -> str:
        value = record[key]
        return f"{100 * value['value']:.0f} % ({100 * value['lo']:.0f}-{100 * value['hi']:.0f}, n={value['n']})"

    def number(key: str, form: str, factor: float = 1.0) -> str:
        return f"{factor * record[key]:{form}}" if key in record else "-"

    lost = "-" if "lost" not in record else f"{100 * record['lost']:.0f} %" if record["lost"] > merging.ROUNDING else "0"
    cells = (record["experts"], record["rule"], *map(percent, ("named", "unrecognised", "kept")), lost)
    return f"| {' | '.join(map(str, cells))} | {number('bytes', '.2f', 1e-6)} | {number('seconds', '.1f')} |"


def by_concept(records: Sequence[Mapping[str, Any]]) -> str:
    """Named target still seen of each concept, in the merges of all."""
    rows = [f"| all {SIZES[-1]}, by concept | {' | '.join(CONCEPTS)} |", f"|---|{'---:|' * len(CONCEPTS)}"]
    for record in records:
        if record["experts"] == SIZES[-1]:
            shares = [f"{100 * record['by concept'][name]:.0f} %" for name in CONCEPTS]
            rows.append(f"| {record['rule']} | {' | '.join(shares)} |")
    return "\n".join(rows)


def publish(records: Sequence[Mapping[str, Any]], docs: Path) -> None:
    """The records, and the tables in the page."""
    (docs / "merging.json").write_text(json.dumps(records, indent=1) + "\n")
    table = "\n".join([HEAD, *map(line, records), "", by_concept(records)])
    put(docs / "merging.md", "merging.py", table)
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="start nothing that would end later")
    parser.add_argument("--out", type=Path, default=Path("out/merging"), help="where experts and finished cells are kept")
    parser.add_argument("--table", action="store_true", help="write the page from what there is, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        publish(Bench(arguments.out).records(), DOCS)
        return
    pipe = load_base("canvas", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    Bench(arguments.out, pipe).run(arguments.minutes)


if __name__ == "__main__":
    main()
