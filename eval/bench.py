"""One folder with everything about one concept on one suite: artefacts, images, results, table, report. Each step resumes."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from erasure import artifact, fingerprint
from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.method import Eraser, ErasureMethod, Run

from . import tables
from .canvas_rows import Row
from .compare import Comparison, Entry, compare
from .generate import generate
from .judges import judge
from .memory import peak_memory
from .metrics.features import extract
from .protocol import digest
from .report import write_report
from .report.grid import matched_grid, write_png
from .score import KEPT, Sample, read_samples, score, write_samples
from .store import Cell, Settings, Shard, rows_hash
from .suite import Suite
from .summary import Cost, drift, summarise, write_results

log = logging.getLogger("erasure")
BASE = "base"


@dataclass(frozen=True)
class Bench:
    """A suite run on one base model and one concept, in one folder."""

    folder: Path
    pipe: Any
    model: str
    suite: Suite
    concept: Concept
    batch_size: int = 32
    seed: int = 0
    progress: bool = True

    @cached_property
    def rows(self) -> list[Row]:
        return self.suite.rows(self.concept)

    @cached_property
    def model_id(self) -> str:
        """The model's name with its fingerprint, so that two models of one name never share images."""
        return f"{self.model}#{digest(fingerprint.take(self.pipe))}"

    def fit(self, method: ErasureMethod) -> tuple[Eraser, Path]:
        """Fit and save a method's artefact, or take the one that an earlier run saved with the same settings."""
        folder = self.folder / "artefacts" / method.name
        if (folder / artifact.CONFIG).exists():
            eraser, config = artifact.load_eraser(folder)
            same = (eraser.method, eraser.concepts, config["seed"]) == (method, (self.concept,), self.seed)
            if not same:
                raise ErasureError(
                    f"{folder} holds another fit of {method.name} (other settings, concept or seed): use another --out, or remove it"
                )
            fingerprint.check(self.pipe, config["base"], str(folder))
            return eraser, folder
        started = time.perf_counter()
        with peak_memory(str(self.pipe.device)) as peak:
            eraser = method.fit(self.pipe, [self.concept], run=Run(seed=self.seed, progress=self.progress))
        cost = {"fit_seconds": round(time.perf_counter() - started, 3), "fit_peak_memory_mb": round(peak.megabytes or 0)}
        artifact.save(eraser, folder, pipe=self.pipe, base_id=self.model, seed=self.seed, cost=cost)
        return eraser, folder

    def cell(self, name: str, eraser: Eraser | None) -> Cell:
        """The images of a row of the table, as far as they are made."""
        settings = Settings.of(
            self.rows,
            self.suite.protocol,
            eraser=eraser_id(eraser),
            model=self.model_id,
            batch_size=self.batch_size,
            device=str(self.pipe.device),
        )
        return Cell.open(self.folder / "images" / name, self.rows, settings)

    def generate(self, name: str, eraser: Eraser | None = None, shard: Shard = (1, 1)) -> Cell:
        """Make the missing images of a row of the table."""
        cell = self.cell(name, eraser)
        if not cell.missing(shard):
            return cell
        options = {} if eraser is None else {"attach": eraser.attach}
        with peak_memory(str(self.pipe.device)) as peak:
            generate(self.pipe, cell, self.suite.protocol, shard=shard, progress=self.progress, **options)
        if peak.megabytes is not None:
            _record_peak(cell.folder / "memory.json", peak.megabytes)
        return cell

    def evaluate(self, name: str, cell: Cell, fit_seconds: float | None = None) -> Path:
        """Score a complete cell and write results.json and samples.jsonl; the base comes first. Gives the results' folder."""
        samples = score(cell.images(), self.rows, judge(self.suite.protocol.judge), self.concept)
        base = None if name == BASE else self.samples(BASE)
        moved = None if base is None else drift(self._features(cell), self._base_features, self.suite.protocol.features)
        own, reference = cell.seconds_per_image(), self.cell(BASE, None).seconds_per_image()
        cost = Cost(fit_seconds, _peak(cell.folder / "memory.json"), own, None if base is None else reference)
        folder = self.folder / "results" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_samples(folder / "samples.jsonl", samples)
        results = summarise(
            samples, base, name=name, concept=self.concept, suite=self.suite, rows=rows_hash(self.rows), cost=cost, drift=moved
        )
        write_results(folder / "results.json", results)
        return folder

    def samples(self, name: str) -> list[Sample]:
        path = self.folder / "results" / name / "samples.jsonl"
        if not path.is_file():
            raise ErasureError(f"{path} is missing: evaluate {name!r} first")
        return read_samples(path)

    def run(self, methods: Sequence[ErasureMethod], commands: Sequence[str] = ()) -> Comparison:
        """Base and methods from nothing, or from where a killed run stopped, to table and report."""
        self.evaluate(BASE, self.generate(BASE))
        cells = {BASE: self.cell(BASE, None)}
        for method in methods:
            eraser, folder = self.fit(method)
            cells[method.name] = self.generate(method.name, eraser)
            self.evaluate(method.name, cells[method.name], artifact.read_config(folder)["cost"].get("fit_seconds"))
        return self.report(cells, commands)

    def report(self, cells: dict[str, Cell], commands: Sequence[str] = ()) -> Comparison:
        """Write table.md, table.csv, compare.json, grid.png and report.html of some rows of the table."""
        table = compare([Entry.of(self.folder / "results" / name) for name in cells])
        grid = matched_grid({name: (cell, self.samples(name)) for name, cell in cells.items()})
        (self.folder / "table.md").write_text(tables.to_markdown(table), encoding="utf-8")
        (self.folder / "table.csv").write_text(tables.to_csv(table), encoding="utf-8")
        (self.folder / "compare.json").write_text(tables.to_json(table) + "\n", encoding="utf-8")
        write_png(self.folder / "grid.png", grid)
        write_report(self.folder / "report.html", table, grid, commands=commands)
        return table

    def _features(self, cell: Cell) -> Tensor:
        kept = [row for row in self.rows if row.kind in KEPT]
        return extract(cell.images(kept), self.suite.protocol.features, progress=self.progress)

    @cached_property
    def _base_features(self) -> Tensor:
        return self._features(self.cell(BASE, None))


def eraser_id(eraser: Eraser | None) -> str:
    """SHA-256 of an eraser's configuration, concepts and tensors; "base" for none."""
    if eraser is None:
        return BASE
    described = {"method": eraser.method.name, "config": eraser.method.config(), "concepts": [c.to_dict() for c in eraser.concepts]}
    sha = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(eraser.tensors().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _record_peak(path: Path, megabytes: float) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"peak_mb": max(megabytes, _peak(path) or 0)}))
    os.replace(draft, path)


def _peak(path: Path) -> float | None:
    return json.loads(path.read_text())["peak_mb"] if path.exists() else None
