"""Shots from what a bench has: a cell's images, the samples of its rows, and the detections that lie beside the images."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite

from erasure.concept import Concept

from ..detectors import Detections, Record, read_detections
from ..recipes import Recipe
from ..rows import ASKED, Row
from ..score import KEPT, Sample
from ..store import Cell
from ..subjects import Subject, subject
from ..suite import Suite
from .shots import Gallery, Shot, Tone


def gallery(suite: Suite, concept: Concept, cells: Mapping[str, tuple[Cell, Iterable[Sample]]], recipes: Sequence[Recipe] = ()) -> Gallery:
    """All images of some methods (name -> cell and samples) on one suite, with a slider for each recipe of one threshold.

    What a recipe calls unsafe is flagged; of a suite whose prompts are known to be harmful, all images are blurred at first.
    """
    of = subject(concept.name) if suite.protocol.judge else None
    shown = [_Shown(suite.name, name, cell, {s.id: s for s in samples}, of, tuple(recipes)) for name, (cell, samples) in cells.items()]
    harmful = suite.prompts is not None and suite.prompts.content != "benign"
    return Gallery(
        tuple(shot for one in shown for shot in one.shots()),
        {_name(recipe): recipe.calls[0].threshold for recipe in recipes if _single(recipe)},
        frozenset({suite.name} if harmful else ()),
        {name: value for one in shown for name, value in one.lowest().items()},
    )


@dataclass(frozen=True)
class _Shown:
    """One method's images and all that was said of them."""

    suite: str
    method: str
    cell: Cell
    samples: Mapping[str, Sample]
    subject: Subject | None
    """Of the canvas judge; None where there is none."""
    recipes: tuple[Recipe, ...]

    @cached_property
    def detections(self) -> dict[str, Detections]:
        """By detector, as far as they were stored."""
        names = dict.fromkeys(name for recipe in self.recipes for name in recipe.detectors)
        stored = {name: path for name in names if (path := self.cell.folder / f"detections-{name}.jsonl").is_file()}
        return {name: read_detections(path) for name, path in stored.items()}

    @cached_property
    def records(self) -> dict[str, dict[str, Record]]:
        """Detector -> row -> its record."""
        return {name: {record.row: record for record in found.records} for name, found in self.detections.items()}

    def lowest(self) -> dict[str, float]:
        """Recipe's score -> the lowest that its detectors stored."""
        stored = {name: found.identity.stored_from for name, found in self.detections.items()}
        of = {_name(r): [stored[name] for name in r.detectors if name in stored] for r in self.recipes if _single(r)}
        return {name: max(values) for name, values in of.items() if values}

    def shots(self) -> Iterator[Shot]:
        for row, path, _ in self.cell.files():
            sample = self.samples[row.id]
            status, tone = _outcome(sample, row)
            yield Shot(
                self.suite,
                self.method,
                row.id,
                row.kind,
                row.prompt,
                row.seed,
                path,
                categories=row.categories,
                scores={**_presences(sample, self.subject), **self._highest(row.id), **_measured(sample)},
                flags=_flags(sample),
                flagged=any(sample.unsafe.values()),
                status=status,
                tone=tone,
                note=_seen(sample) if self.subject else self._found(row.id),
            )

    def _highest(self, row: str) -> dict[str, float]:
        """What the threshold of a recipe is held against: the highest score of its labels. Refused images have none."""
        scores = {}
        for recipe in self.recipes:
            pairs = [(call, self.records.get(call.detector, {}).get(row)) for call in recipe.calls]
            known = [(call, record) for call, record in pairs if record is not None and not record.refused]
            if _single(recipe) and len(known) == len(pairs):
                hits = [score for call, record in known for label, score in record.detection.findings() if label in call.labels]
                scores[_name(recipe)] = max(hits, default=0.0)
        return scores

    def _found(self, row: str) -> str:
        findings = [finding for records in self.records.values() if row in records for finding in records[row].detection.findings()]
        return ", ".join(f"{label} {score:.2f}" for label, score in sorted(findings, key=lambda finding: -finding[1])[:3])


def _single(recipe: Recipe) -> bool:
    """Whether it has one threshold, which one slider can move."""
    return len({call.threshold for call in recipe.calls}) == 1


def _name(recipe: Recipe) -> str:
    return f"highest score of recipe {recipe.name}"


def _outcome(sample: Sample, row: Row) -> tuple[str, Tone]:
    """By the canvas judge, or else by the recipes; a refusal is no erasure, and what nobody wants of a benign prompt."""
    if sample.target_present is not None:
        return _judged(sample)
    if sample.refused:
        return "refused", "bad" if ASKED[row.kind] == "answered" else ""
    if not (calls := [call for call in sample.unsafe.values() if call is not None]):
        return "", ""
    if not any(calls):
        return "safe", "good" if ASKED[row.kind] == "erased" else ""
    return ("unsafe" if all(calls) else f"unsafe by {sum(calls)} of {len(calls)}"), "bad"


def _judged(sample: Sample) -> tuple[str, Tone]:
    if sample.unrecognised:
        return "unrecognised", ""
    if sample.kind in KEPT:
        return ("kept", "good") if sample.wanted_present else ("lost", "bad")
    return ("target", "bad") if sample.target_present else ("gone", "good")


def _seen(sample: Sample) -> str:
    return ", ".join(sample.objects) + f" · {sample.style}" if sample.objects else "nothing it knows"


def _presences(sample: Sample, of: Subject | None) -> dict[str, float]:
    """The judge's presence of the target, and of whatever else the prompt asks for: of several, the one it sees least."""
    if of is None:
        return {}
    target = [score for name, score in sample.wanted_scores.items() if name in of.members]
    others = [score for name, score in sample.wanted_scores.items() if name not in of.members]
    presences = {f"presence of {of.name}": max(target, default=None), "presence of what is to be kept": min(others, default=None)}
    return {name: score for name, score in presences.items() if score is not None}


def _measured(sample: Sample) -> dict[str, float]:
    return {name: value for name, value in sample.scores.items() if value is not None and isfinite(value)}


def _flags(sample: Sample) -> dict[str, bool]:
    flags = {
        "target present": sample.target_present,
        "another thing present": sample.other_present,
        "unrecognised": sample.unrecognised,
        "all that is to be kept present": sample.wanted_present,
        "style as asked": sample.style_ok,
        "background as asked": sample.background_ok,
        **{f"unsafe by {recipe}": call for recipe, call in sample.unsafe.items()},
        "refused": sample.refused or None,
    }
    return {name: call for name, call in flags.items() if call is not None}
