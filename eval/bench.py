"""One folder with everything about one concept on one suite: artefacts, images, results, table, report. Each step resumes."""

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from erasure import artifact, fingerprint
from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.method import Eraser, ErasureMethod, Run

from . import tables
from .choice import Choice
from .compare import Comparison, Entry, compare
from .generate import generate
from .judges import judge
from .memory import peak_memory
from .metrics.base import Panel
from .metrics.features import extract
from .outcomes import Calls, calls, metric_records, over_refusal, recipe_records
from .protocol import digest
from .provenance import of_cell
from .report import write_report
from .report.grid import write_png
from .report.scored import gallery
from .results import check
from .rows import Row
from .score import Sample, read_samples, write_samples
from .scoring import Scan, Scorers, scan
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
    choice: Choice | None = None
    """Recipes and metrics; None takes the suite's own."""
    workers: int | None = None
    """Processes that read images for scoring, see ``loading.batches``."""

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
        if (saved := self.saved(method)) is not None:
            return saved, folder
        started = time.perf_counter()
        training = folder.with_name(f".{method.name}.training")
        with peak_memory(str(self.pipe.device)) as peak:
            run = Run(seed=self.seed, progress=self.progress, checkpoint=training if method.trained else None)
            eraser = method.fit(self.pipe, [self.concept], run=run)
        cost = {"fit_seconds": round(time.perf_counter() - started, 3), "fit_peak_memory_mb": round(peak.megabytes or 0)}
        artifact.save(eraser, folder, pipe=self.pipe, base_id=self.model, seed=self.seed, cost=cost)
        shutil.rmtree(training, ignore_errors=True)
        return eraser, folder

    def saved(self, method: ErasureMethod) -> Eraser | None:
        """The eraser that an earlier run fitted with the same settings, None before that; one with other settings raises."""
        folder = self.folder / "artefacts" / method.name
        if not (folder / artifact.CONFIG).exists():
            return None
        eraser, config = artifact.load_eraser(folder)
        if (eraser.method, eraser.concepts, config["seed"]) != (method, (self.concept,), self.seed):
            raise ErasureError(
                f"{folder} holds another fit of {method.name} (other settings, concept or seed): use another --out, or remove it"
            )
        fingerprint.check(self.pipe, config["base"], str(folder))
        return eraser

    def cell(self, name: str, eraser: Eraser | None) -> Cell:
        """The images of a row of the table, as far as they are made."""
        settings = Settings.of(
            self.rows,
            self.suite.protocol,
            eraser=eraser_id(eraser),
            model=self.model_id,
            batch_size=self.batch_size,
            device=str(self.pipe.device).split(":")[0],  # the GPUs of one machine share a cell
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
            record_peak(cell.folder / "memory.json", peak.megabytes)
        return cell

    def evaluate(self, name: str, cell: Cell, fitted: Mapping[str, Any] | None = None) -> Path:
        """Score a complete cell and write results.json and samples.jsonl; the base comes first. Gives the results' folder.

        fitted: the configuration of the artefact whose images these are.
        """
        choice, base, reference = self.scoring, None if name == BASE else self.samples(BASE), self.cell(BASE, None)
        panel = choice.panel(len(self.rows), base=base is None)
        found = scan(cell, self._scorers(panel), None if base is None else reference, workers=self.workers, progress=self.progress)
        called = calls(choice.recipes, found.detections)
        samples = _samples(self.rows, found, called, panel.samples() if panel else {})
        if base is None:
            self._base["features"] = found.features
        results = summarise(
            samples,
            base,
            name=name,
            concept=self.concept,
            suite=self.suite,
            rows=rows_hash(self.rows),
            cost=self._cost(cell, None if base is None else reference, fitted),
            drift=self._drift(found) if base is not None else None,
            recipes=recipe_records(choice.recipes, found.detections, self.rows, base),
            unavailable=choice.left_out,
            metrics=metric_records(panel, self.rows, base) if panel else {},
            detectors={name: detections.identity.to_dict() for name, detections in found.detections.items()},
            over_refusal=over_refusal(samples, base, self.rows),
            **of_cell(cell, fitted),
        )
        folder = self.folder / "results" / name
        folder.mkdir(parents=True, exist_ok=True)
        check(results, f"the results of {name}")  # before anything is written
        write_samples(folder / "samples.jsonl", samples)
        write_results(folder / "results.json", results)
        return folder

    def _scorers(self, panel: Panel | None) -> Scorers:
        of = self.suite.protocol
        features = (lambda images: extract(images, of.features)) if of.judge else None
        return Scorers(self.concept, judge(of.judge) if of.judge else None, features, self.scoring.detectors, panel, of.frames or 1)

    def _cost(self, cell: Cell, reference: Cell | None, fitted: Mapping[str, Any] | None) -> Cost:
        fit = (fitted or {}).get("cost", {}).get("fit_seconds")
        own = cell.seconds_per_image()
        return Cost(fit, _peak(cell.folder / "memory.json"), own, None if reference is None else reference.seconds_per_image())

    def _drift(self, found: Scan) -> dict[str, Any] | None:
        """Of the kept rows' features from the base's, which were taken when the base was scored."""
        if found.features is None:
            return None
        if "features" not in self._base:
            alone = replace(self._scorers(None), judge=None, detectors=())
            self._base["features"] = scan(self.cell(BASE, None), alone, workers=self.workers, progress=False).features
        return drift(found.features, self._base["features"], self.suite.protocol.features)

    @cached_property
    def _base(self) -> dict[str, Any]:
        """What is remembered of the base's pass."""
        return {}

    @cached_property
    def scoring(self) -> Choice:
        return self.choice or Choice.of(self.suite)

    def samples(self, name: str) -> list[Sample]:
        path = self.folder / "results" / name / "samples.jsonl"
        if not path.is_file():
            raise ErasureError(f"{path} is missing: evaluate {name!r} first")
        return read_samples(path)

    def run(self, methods: Sequence[ErasureMethod], commands: Sequence[str] = ()) -> Comparison:
        """Base and methods from nothing, or from where a killed run stopped, to table and report."""
        for method in methods:  # what cannot work is said before anything is made
            method.family(self.pipe)
            self.saved(method)
        self.scoring.require(len(self.rows))
        self.evaluate(BASE, self.generate(BASE))
        cells = {BASE: self.cell(BASE, None)}
        for method in methods:
            eraser, folder = self.fit(method)
            cells[method.name] = self.generate(method.name, eraser)
            self.evaluate(method.name, cells[method.name], artifact.read_config(folder))
        return self.report(cells, commands)

    def report(self, cells: dict[str, Cell], commands: Sequence[str] = ()) -> Comparison:
        """Write table.md, table.csv, compare.json, grid.png and report.html of some rows of the table."""
        table = compare([Entry.of(self.folder / "results" / name) for name in cells])
        shown = {name: (cell, self.samples(name)) for name, cell in cells.items()}
        pictures = gallery(self.suite, self.concept, shown, self.scoring.recipes)
        (self.folder / "table.md").write_text(tables.to_markdown(table), encoding="utf-8")
        (self.folder / "table.csv").write_text(tables.to_csv(table), encoding="utf-8")
        (self.folder / "compare.json").write_text(tables.to_json(table) + "\n", encoding="utf-8")
        write_png(self.folder / "grid.png", pictures)
        write_report(self.folder / "report.html", table, pictures, commands=commands)
        return table


def _samples(rows: Sequence[Row], found: Scan, called: Calls, scores: Mapping[str, Mapping[str, float | None]]) -> list[Sample]:
    """One a row, in the order of the suite."""
    return [
        replace(
            found.samples.get(row.id) or Sample(row.id, row.kind, row.prompt, row.seed),
            categories=row.categories,
            refused=found.refused[row.id],
            unsafe={recipe: said[row.id] for recipe, said in called.items()},
            scores=dict(scores.get(row.id, {})),
        )
        for row in rows
    ]


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


def record_peak(path: Path, megabytes: float) -> None:
    """Keep the highest of what processes report for a cell."""
    draft = path.with_suffix(f".{platform.node()}-{os.getpid()}")
    draft.write_text(json.dumps({"peak_mb": max(megabytes, _peak(path) or 0)}))
    os.replace(draft, path)


def _peak(path: Path) -> float | None:
    return json.loads(path.read_text())["peak_mb"] if path.exists() else None
