"""What scores a suite's images, and the one pass that feeds all of it: each image is read once, and no list of images is held."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from erasure.concept import Concept
from erasure.errors import ErasureError

from .detectors import Box, Detection, Detections, Detector, Identity, Record, detections_path, load, missing, read_detections
from .detectors import run as run_detector
from .detectors.base import BLACK
from .detectors.records import write_detections
from .judges import Judging
from .loading import Batch, batches
from .metrics.base import Panel
from .protocol import digest
from .score import KEPT, Sample, score
from .store import Cell

log = logging.getLogger("erasure")


@dataclass(frozen=True)
class Scorers:
    """Who looks at the images; whatever is None or empty does not."""

    concept: Concept
    judge: Judging | None = None
    features: Callable[[Tensor], Tensor] | None = None
    """Takes features [n, d] of the kept rows' images [n, 3, h, w] in 0..1, for drift."""
    detectors: tuple[str, ...] = ()
    panel: Panel | None = None
    frames: int = 1
    """Of a video, which lie below each other; detectors see them one by one."""


@dataclass
class Scan:
    """What a pass found."""

    samples: dict[str, Sample] = field(default_factory=dict)
    refused: dict[str, bool] = field(default_factory=dict)
    detections: dict[str, Detections] = field(default_factory=dict)
    features: Tensor | None = None


def scan(
    cell: Cell, scorers: Scorers, base: Cell | None = None, *, workers: int | None = None, progress: bool = True, known: Sequence[str] = ()
) -> Scan:
    """Feed every image of a complete cell to all scorers; the panel is fed in place.

    base: the base model's cell, read beside it where the panel compares pairs. Detections that an earlier pass stored are taken if
    they are of the same images by the same detector; where nothing is left to look at, no image is read.
    """
    needs_base = scorers.panel is not None and "base" in scorers.panel.needs
    if needs_base and base is None:
        raise ErasureError(f"{cell.folder}: {', '.join(scorers.panel.metrics if scorers.panel else ())} compare with the base's images")
    found, images = Scan(), images_hash(cell)
    watchers, own = [], {}
    for name in scorers.detectors:
        stored, detector = _stored_or_detector(cell, name, images)
        if stored is not None:
            found.detections[name] = stored
            found.refused = {r.row: r.refused for r in stored.records}
        else:
            assert detector is not None
            own[name] = _Watcher(detector, scorers.frames)
            watchers.append(own[name])
    if watchers or scorers.judge or scorers.panel or scorers.features or not found.refused:
        _pass(cell, base if needs_base else None, scorers, watchers, found, workers, progress)
    for name, watcher in own.items():
        found.detections[name] = _keep(cell, watcher, images)
    return found


def images_hash(cell: Cell) -> str:
    """Identity of a cell's images: every row's with the hash of its file."""
    return digest([(row.id, sha256) for row, _, sha256 in cell.files()])


def _pass(
    cell: Cell, base: Cell | None, scorers: Scorers, watchers: "Sequence[_Watcher]", found: Scan, workers: int | None, progress: bool
) -> None:
    features: list[Tensor] = []
    bar = tqdm(total=len(cell.rows), desc=f"score {cell.folder.name}", unit="image", disable=not progress, leave=False)
    with bar:
        for batch in batches(cell, base, workers=workers):
            found.refused |= {row.id: bool(black) for row, black in zip(batch.rows, _black(batch.images), strict=True)}
            if scorers.judge is not None:
                judged = score(batch.images.float() / 255, batch.rows, scorers.judge, scorers.concept)
                found.samples |= {sample.id: sample for sample in judged}
            kept = [i for i, row in enumerate(batch.rows) if row.kind in KEPT]
            if scorers.features is not None and kept:
                features.append(scorers.features(batch.images[kept].float() / 255))
            for watcher in watchers:
                watcher.update(batch)
            if scorers.panel is not None:
                scorers.panel.update(batch.images, batch.rows, base=batch.base)
            bar.update(len(batch.rows))
    found.features = torch.cat(features) if features else None


def _black(images: Tensor) -> list[bool]:
    return (images.flatten(1).amax(1) <= BLACK).tolist()


class _Watcher:
    """A detector and what it has said so far; boxes and scores, no image."""

    def __init__(self, detector: Detector, frames: int) -> None:
        self.detector, self.frames = detector, frames
        self.records: list[Record] = []

    def update(self, batch: Batch) -> None:
        for row, image in zip(batch.rows, batch.images, strict=True):
            if image.shape[1] % self.frames:
                raise ErasureError(f"row {row.id} is no strip of {self.frames} frames: its image is {image.shape[1]} pixels high")
        pictures = [
            (row.id if self.frames == 1 else f"{row.id}/{i}", Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()))
            for row, image in zip(batch.rows, batch.images, strict=True)
            for i, frame in enumerate(image.chunk(self.frames, dim=1))
        ]
        records = list(run_detector(self.detector, pictures, batch=len(pictures)))
        for i, row in enumerate(batch.rows):
            self.records.append(_joined(row.id, records[i * self.frames : (i + 1) * self.frames]))


def _joined(row: str, frames: Sequence[Record]) -> Record:
    """One record of a video: all boxes, the highest score of each label; refused if every frame is black."""
    if len(frames) == 1:
        return Record(row, frames[0].refused, frames[0].detection)
    boxes: tuple[Box, ...] = tuple(box for frame in frames for box in frame.detection.boxes)
    scores: dict[str, float] = {}
    for frame in frames:
        for label, value in frame.detection.scores.items():
            scores[label] = max(value, scores.get(label, value))
    return Record(row, all(frame.refused for frame in frames), Detection(boxes, scores))


def _stored_or_detector(cell: Cell, name: str, images: str) -> tuple[Detections | None, Detector | None]:
    """Stored detections of these very images, by the detector as it is here or, where it is not here, as it was; else the detector."""
    path = cell.folder / f"detections-{name}.jsonl"
    stored = read_detections(path) if path.is_file() else None
    if stored is not None and stored.images != images:
        log.warning("%s is of other images than %s holds now: they are looked at again", path, cell.folder)
        stored = None
    if stored is not None and missing(name):
        return stored, None
    detector = load(name)
    if stored is not None and stored.identity != (now := detector.identity()):
        log.warning("%s was made by another %s (%s): images are looked at again", path, name, _changes(stored.identity, now))
        stored = None
    return (stored, None) if stored is not None else (None, detector)


def _changes(old: Identity, new: Identity) -> str:
    before, after = old.to_dict(), new.to_dict()
    return "; ".join(f"{key} {before[key]!r}, now {after[key]!r}" for key in before if before[key] != after[key])


def _keep(cell: Cell, watcher: _Watcher, images: str) -> Detections:
    identity = watcher.detector.identity()
    order = {row.id: i for i, row in enumerate(cell.rows)}
    records = sorted(watcher.records, key=lambda record: order[record.row])
    return write_detections(detections_path(cell.folder, identity), identity, records, images=images)


def can_do_without(name: str, folders: Sequence[Path]) -> bool:
    """Whether a detector that is not here has left its detections in every one of some cells."""
    return bool(folders) and all((folder / f"detections-{name}.jsonl").is_file() for folder in folders)
