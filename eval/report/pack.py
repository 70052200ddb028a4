"""A gallery as the page's script reads it: names once, and one chunk of columns for each suite and each of its methods.

Names and prompts are untrusted, so they are values and never keys of objects: nothing of theirs becomes code, markup or a property.
"""

import base64
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from .shots import KINDS, Gallery, Shot

SIDE = 512
"""Pixels of an image's shorter side inside the page, at most."""
SHOWN = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif"}
"""Formats that every browser shows, with their endings."""

Chunk = tuple[str, dict[str, Any]]
Place = Callable[[Shot, str], str]
"""Puts an image somewhere under a name without ending, and gives its address for the page."""


@dataclass(frozen=True)
class Pack:
    """A gallery in the page's terms: everything that has a name is a number in a list of names."""

    gallery: Gallery

    @cached_property
    def methods(self) -> list[str]:
        return _names(shot.method for shot in self.gallery.shots)

    @cached_property
    def scores(self) -> list[str]:
        return _names(name for shot in self.gallery.shots for name in shot.scores)

    @cached_property
    def flags(self) -> list[str]:
        return _names(name for shot in self.gallery.shots for name in shot.flags)

    @cached_property
    def kinds(self) -> list[str]:
        return _names(shot.kind for shot in self.gallery.shots)

    @cached_property
    def suites(self) -> dict[str, dict[int, list[Shot]]]:
        """Suite -> method, by its number -> shots."""
        found: dict[str, dict[int, list[Shot]]] = {}
        for shot in self.gallery.shots:
            found.setdefault(shot.suite, {}).setdefault(self.methods.index(shot.method), []).append(shot)
        return found

    def index(self) -> dict[str, Any]:
        """What the page knows from the start: names, and which chunks there are."""
        return {
            "methods": self.methods,
            "scores": [
                {"name": name, "start": self.gallery.thresholds.get(name), "lowest": self.gallery.lowest.get(name)} for name in self.scores
            ],
            "flags": self.flags,
            "kinds": [KINDS.get(kind, kind) for kind in self.kinds],
            "suites": [
                {"name": name, "blur": name in self.gallery.sensitive, "methods": sorted(methods)} for name, methods in self.suites.items()
            ],
        }

    def chunks(self, place: Place) -> Iterator[Chunk]:
        """(key, columns): ``s<suite>`` has the rows of a suite, ``s<suite>-m<method>`` one method's images of them."""
        for number, methods in enumerate(self.suites.values()):
            rows = {shot.row: shot for shots in methods.values() for shot in shots}
            order = {row: i for i, row in enumerate(rows)}
            yield f"s{number}", self._rows(list(rows.values()))
            for method, shots in methods.items():
                key = f"s{number}-m{method}"
                addresses = [place(shot, f"{key}/{order[shot.row]}") for shot in shots]
                yield key, {"row": [order[shot.row] for shot in shots], "src": addresses, **self._measured(shots)}

    def _rows(self, rows: list[Shot]) -> dict[str, Any]:
        categories = _names(category for shot in rows for category in shot.categories)
        return {
            "id": [shot.row for shot in rows],
            "prompt": [shot.prompt for shot in rows],
            "seed": [str(shot.seed) for shot in rows],  # as text: seeds reach beyond what a JavaScript number holds
            "kind": [self.kinds.index(shot.kind) for shot in rows],
            "categories": categories,
            "in": [[categories.index(category) for category in shot.categories] for shot in rows],
        }

    def _measured(self, shots: list[Shot]) -> dict[str, Any]:
        scores = [(i, [shot.scores.get(name) for shot in shots]) for i, name in enumerate(self.scores)]
        flags = [(i, [shot.flags.get(name) for shot in shots]) for i, name in enumerate(self.flags)]
        return {
            "flagged": [int(shot.flagged) for shot in shots],
            "tone": [shot.tone for shot in shots],
            "status": [shot.status for shot in shots],
            "note": [shot.note for shot in shots],
            "scores": [(i, [None if x is None else float(x) for x in column]) for i, column in scores if _some(column)],
            "flags": [(i, [None if x is None else int(x) for x in column]) for i, column in flags if _some(column)],
        }


def embed(shot: Shot, stem: str = "") -> str:
    """A ``Place`` inside the page: a WebP as a data: URI."""
    return "data:image/webp;base64," + base64.b64encode(_webp(shot)).decode()


def file_into(folder: Path) -> Place:
    """A ``Place`` in a folder's images/: the same bytes, as a hard link where the file system has one; no copy is made twice."""

    def place(shot: Shot, stem: str) -> str:
        with shot.open() as image:
            ending = SHOWN.get(image.format or "")
        address = f"images/{stem}.{ending or 'webp'}"
        target = folder / address
        target.parent.mkdir(parents=True, exist_ok=True)
        if ending is None:
            target.write_bytes(_webp(shot))
        elif isinstance(shot.image, bytes):
            target.write_bytes(shot.image)
        else:
            _link(shot.image, target)
        return address

    return place


def to_json(data: Any) -> str:
    """JSON that is safe inside a <script> and as a script: ASCII, without the characters that could end it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _some(column: Sequence[Any]) -> bool:
    return any(value is not None for value in column)


def _names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _webp(shot: Shot) -> bytes:
    picture = shot.picture()
    if (scale := SIDE / min(picture.size)) < 1:
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=85, method=4)
    return out.getvalue()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
