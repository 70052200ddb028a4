"""Predictions that another tool made, such as GIPHY's celebrity detector in an environment of its own.

One value for each image, under its row id or the name of its file (with or without the ending):
* a folder of ``ROW.json``, or one ``.json`` file {"ROW": value}, where a value is {"label": score} or a list of
  {"label": .., "score": .., "box": [left, top, width, height]} (box optional; "class" is taken for "label", as nudenet writes it);
* a ``.csv`` file with the columns row (or image), label, score and, if there are boxes, x, y, w, h: one line a finding.
An image in which the tool found nothing needs an entry too: {} or [] in JSON, a line with an empty label in CSV. A row without entry
was not looked at, and is an error.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from erasure.errors import ErasureError

from .base import Box, Detection, Identity

SHOWN = 10
"""Missing rows that an error names before it only counts them."""


class External:
    """Predictions of another tool, from a CSV file, a JSON file or a folder of them."""

    name = "external"

    def __init__(self, path: Path | str, *, tool: str, version: str, labels: Sequence[str] = (), licence: str = "unknown") -> None:
        """labels: all that the tool can say; leave it empty where that is open, and recipes' labels go unchecked."""
        self._path, self._tool, self._version, self._labels, self._licence = Path(path), tool, version, tuple(labels), licence
        self._found, self._sha256 = _read(self._path)

    def identity(self) -> Identity:
        settings = {"tool": self._tool}
        return Identity(self.name, self._version, self._path.name, self._sha256, self._labels, self._licence, settings=settings)

    def require(self, rows: Iterable[str]) -> None:
        """Raises ErasureError that names the rows without prediction, before any work is done."""
        missing = [row for row in rows if _key(row) not in self._found]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise ErasureError(
                f"{self._path} has no prediction for {', '.join(missing[:SHOWN])}{more}: run {self._tool} on every image, and give an "
                "empty entry where it found nothing"
            )

    def detect_rows(self, rows: Sequence[str]) -> list[Detection]:
        """The predictions of rows, by their ids."""
        self.require(rows)
        return [self._found[_key(row)] for row in rows]

    def detect(self, images: Sequence[Image]) -> list[Detection]:
        """The predictions of images, by the names of their files."""
        return self.detect_rows([Path(getattr(image, "filename", "") or "an image without file name").name for image in images])


def _key(name: str) -> str:
    """A row id or file name without the ending of an image file."""
    path = Path(name)
    return path.stem if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".json") else path.name


def _read(path: Path) -> tuple[dict[str, Detection], str]:
    if path.is_dir():
        files = sorted(path.glob("*.json"))
    elif path.is_file():
        files = [path]
    else:
        raise ErasureError(f"no predictions at {path}: give a .csv file, a .json file or a folder of .json files")
    hashed, found = hashlib.sha256(), {}
    for file in files:
        data = file.read_bytes()
        hashed.update(file.name.encode() + b"\0" + data)
        for name, detection in _entries(file, data.decode("utf-8-sig"), alone=path.is_dir()):
            if _key(name) in found:
                raise ErasureError(f"{file}: {name} has two predictions")
            found[_key(name)] = detection
    if not found:
        raise ErasureError(f"{path} holds no predictions")
    return found, hashed.hexdigest()


def _entries(file: Path, text: str, alone: bool) -> Iterable[tuple[str, Detection]]:
    try:
        if file.suffix == ".csv":
            return list(_from_csv(text))
        value = json.loads(text)
        return [(file.stem, _value(value))] if alone else [(name, _value(v)) for name, v in value.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ErasureError(f"{file} is not in the form of predictions ({type(error).__name__}: {error})") from error


def _value(value: Any) -> Detection:
    if isinstance(value, dict):
        return Detection(scores={str(label): float(score) for label, score in value.items()})
    return _finding([(f.get("label") or f["class"], f["score"], f.get("box")) for f in value])


def _finding(findings: Sequence[tuple[str, Any, Any]]) -> Detection:
    boxes = [Box(label, float(score), tuple(map(float, box))) for label, score, box in findings if box]  # type: ignore[arg-type]
    scores: dict[str, float] = {}
    for label, score, box in findings:
        if not box:
            scores[label] = max(float(score), scores.get(label, float("-inf")))
    return Detection(tuple(boxes), scores)


def _from_csv(text: str) -> Iterable[tuple[str, Detection]]:
    grouped: dict[str, list[tuple[str, Any, Any]]] = {}
    for line in csv.DictReader(text.splitlines()):
        name = line.get("row") or line["image"]
        findings = grouped.setdefault(name, [])
        if line["label"]:
            box = [line[side] for side in "xywh"] if line.get("x") else None
            findings.append((line["label"], line["score"], box))
    return [(name, _finding(findings)) for name, findings in grouped.items()]
