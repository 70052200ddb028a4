"""``detections-<detector>.jsonl``: a header with the detector's identity, then one record a row. Written whole or not at all."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError

from .base import Detection, Identity, Record

SCHEMA = 1


@dataclass(frozen=True)
class Detections:
    """What one detector said of some rows."""

    identity: Identity
    records: tuple[Record, ...]
    images: str = ""
    """Hash of the images that were looked at, where one pass saw them all."""


def detections_path(cell: Path, identity: Identity) -> Path:
    """Where the detections of a cell's images lie."""
    return cell / f"detections-{identity.detector}.jsonl"


def write_detections(path: Path, identity: Identity, records: Iterable[Record], images: str = "") -> Detections:
    """Write records under a detector's identity, atomically, and return them.

    images: hash of a whole cell's images; such a file takes the place of any that was there. Raises ErasureError for no records, for
    a row given twice, and, without ``images``, for a file that holds another identity's detections.
    """
    if path.exists() and not images:
        _same(path, 1, read_detections(path).identity, identity)
    whole = Detections(identity, tuple(records), images)
    _check(path, whole.records)
    lines: list[dict[str, Any]] = [{"schema": SCHEMA, "identity": identity.to_dict()} | ({"images": images} if images else {})]
    lines += [{"row": r.row, "refused": r.refused, **r.detection.to_dict()} for r in whole.records]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text("".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    os.replace(part, path)
    return whole


def read_detections(path: Path) -> Detections:
    """What ``write_detections`` wrote, or several such files of one identity joined by ``cat``.

    Raises ErasureError, with the line, for a damaged file, a newer schema, mixed identities, a row that comes twice, or no records.
    """
    if not path.is_file():
        raise ErasureError(f"no detections at {path}: score the images with the detector first")
    identity, records, images = None, [], set[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            data = json.loads(line)
            if "identity" in data:
                found = _header(path, data)
                images.add(data.get("images", ""))
                identity = found if identity is None else _same(path, number, identity, found)
            else:
                records.append(Record(str(data["row"]), bool(data["refused"]), Detection.from_dict(data)))
        except (ValueError, KeyError, TypeError) as error:
            raise ErasureError(f"{path}, line {number} is damaged ({type(error).__name__}: {error}): score these images again") from error
        if identity is None:
            raise ErasureError(f"{path} does not begin with a detector's identity: it is no file of detections")
    if identity is None:
        raise ErasureError(f"{path} is empty: score these images again")
    _check(path, records)
    return Detections(identity, tuple(records), images.pop() if len(images) == 1 else "")


def _header(path: Path, data: dict[str, Any]) -> Identity:
    if data["schema"] != SCHEMA:
        raise ErasureError(f"{path} has schema {data['schema']}, this version reads {SCHEMA}: update erasure-suite")
    return Identity.from_dict(data["identity"])


def _same(path: Path, line: int, first: Identity, other: Identity) -> Identity:
    ours, theirs = first.to_dict(), other.to_dict()
    for key, value in ours.items():
        if value != theirs[key]:
            raise ErasureError(
                f"{path}, line {line}: detections of {key} = {theirs[key]!r} do not mix with those of {value!r}: "
                "keep one file a detector, or remove the old one"
            )
    return first


def _check(path: Path, records: Sequence[Record]) -> None:
    if not records:
        raise ErasureError(f"{path}: no records, and a rate of none would be meaningless")
    rows = [r.row for r in records]
    if len(set(rows)) != len(rows):
        twice = Counter(rows).most_common(1)[0][0]
        raise ErasureError(f"{path}: row {twice} comes twice")
