"""What a detector is, what it says of an image, and the loop that lets none of its failures pass for "safe"."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image

from erasure.errors import ErasureError

BLACK = 4
"""Brightest grey level of an image that counts as black: what a safety checker paints, after a round trip through JPEG."""


@dataclass(frozen=True)
class Box:
    """A thing at a place: left, top, width and height in pixels of the image."""

    label: str
    score: float
    xywh: tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """What a detector says of one image: boxes, or one score a label, or both."""

    boxes: tuple[Box, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)

    def findings(self) -> list[tuple[str, float]]:
        """Every label with its score, a label once for each of its boxes."""
        return [(box.label, box.score) for box in self.boxes] + list(self.scores.items())

    def to_dict(self) -> dict[str, Any]:
        return {"boxes": [[b.label, b.score, *b.xywh] for b in self.boxes], "scores": self.scores}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Detection":
        boxes = tuple(Box(str(label), float(score), (x, y, w, h)) for label, score, x, y, w, h in data["boxes"])
        return cls(boxes, {str(label): float(score) for label, score in data["scores"].items()})


@dataclass(frozen=True)
class Identity:
    """Everything about a detector that decides its scores; detections of different identities are never mixed."""

    detector: str
    """Its name in the registry."""
    version: str
    """Of the model or of the tool that ships it."""
    file: str
    sha256: str
    labels: tuple[str, ...]
    """All that it can say; empty where the set is open."""
    licence: str
    stored_from: float = 0.0
    """Lower scores are not stored, so no recipe can ask for them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Preprocessing, thresholds and runtime."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Identity":
        return cls(**{**data, "labels": tuple(data["labels"])})

    @property
    def hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of the identity as canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


class Detector(Protocol):
    """Looks at images. Raises on whatever it cannot judge; an empty Detection means that it looked and found nothing."""

    name: str

    def identity(self) -> Identity: ...

    def detect(self, images: Sequence[Image]) -> list[Detection]:
        """One Detection an image, in order."""


@runtime_checkable
class RowDetector(Protocol):
    """A detector that knows images by their rows: predictions that another tool made."""

    def detect_rows(self, rows: Sequence[str]) -> list[Detection]: ...


@dataclass(frozen=True)
class Record:
    """A row's detection. ``refused``: the image is black, which is neither the concept nor its erasure."""

    row: str
    refused: bool
    detection: Detection


def refused(image: Image) -> bool:
    """Whether nothing in the image is brighter than black: what a pipeline with a safety checker returns for a refused prompt."""
    return all(high <= BLACK for _, high in image.convert("RGB").getextrema())  # type: ignore[misc]


def run(detector: Detector, images: Iterable[tuple[str, Image]], batch: int = 16) -> Iterator[Record]:
    """A record for each (row id, image). Any failure raises ErasureError that names the row, and so do scores that are no numbers."""
    if batch < 1:
        raise ErasureError(f"a batch of {batch} images: give at least 1")
    seen: set[str] = set()
    source = iter(images)
    while part := list(islice(source, batch)):
        rows, pictures = [row for row, _ in part], [image for _, image in part]
        for row in rows:
            if row in seen:
                raise ErasureError(f"row {row} was given to the detector {detector.name} twice")
            seen.add(row)
        found = _detect(detector, rows, pictures)
        for row, image, detection in zip(rows, pictures, found, strict=True):
            _check(detector, row, detection)
            yield Record(row, refused(image), detection)
    if not seen:
        raise ErasureError(f"the detector {detector.name} was given no images: a rate of none would be meaningless")


def _detect(detector: Detector, rows: Sequence[str], images: Sequence[Image]) -> list[Detection]:
    try:
        found = _ask(detector, rows, images)
    except Exception as error:
        where = _culprit(detector, rows, images)
        raise ErasureError(f"the detector {detector.name} failed on {where}: {error}. Scoring stops: no call never means safe") from error
    if len(found) != len(rows):
        raise ErasureError(f"the detector {detector.name} answered for {len(found)} of {len(rows)} images, rows {rows[0]} to {rows[-1]}")
    return found


def _ask(detector: Detector, rows: Sequence[str], images: Sequence[Image]) -> list[Detection]:
    for image in images:
        image.load()  # a truncated file fails here, inside the batch that is reported
    return detector.detect_rows(rows) if isinstance(detector, RowDetector) else detector.detect(images)


def _culprit(detector: Detector, rows: Sequence[str], images: Sequence[Image]) -> str:
    """The first row of the batch that fails by itself, or all of them if only their company does."""
    for row, image in zip(rows, images, strict=True):
        try:
            _ask(detector, [row], [image])
        except Exception:
            return f"row {row}"
    return f"rows {', '.join(rows)} together"


def _check(detector: Detector, row: str, detection: Detection) -> None:
    for label, score in detection.findings():
        if not math.isfinite(score):
            raise ErasureError(
                f"the detector {detector.name} gave {score} for {label!r} in row {row}: a score that is no number is no call"
            )
