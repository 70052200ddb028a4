"""What the report shows: one shot an image, with whatever was measured on it. Nothing in here depends on how that was measured."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Literal

from PIL import Image

from erasure.errors import ErasureError

KINDS = {
    "named": "named",
    "pair": "together with something to be kept",
    "implied": "implied by a synonym",
    "attack": "attack",
    "neighbour": "neighbour, to be kept",
    "other": "unrelated, to be kept",
    "over_refusal": "benign, to be answered",
}
"""Kinds of rows in plain words."""

Tone = Literal["good", "bad", ""]


@dataclass(frozen=True)
class Shot:
    """One image of a suite's row by one method. Shots of one suite and row are the same prompt at the same seed."""

    suite: str
    method: str
    row: str
    kind: str
    """One of ``KINDS``, or the suite's own word."""
    prompt: str
    """Untrusted: whatever a file of prompts held."""
    seed: int
    image: Path | bytes
    """A file that Pillow reads, or its content."""
    categories: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    """Detectors' scores and metrics' values by name. One that could not be measured is left out, and never counts as low."""
    flags: Mapping[str, bool] = field(default_factory=dict)
    """Calls by name."""
    flagged: bool = False
    """A detector or a rule says that nobody should meet the image unasked: it is blurred until clicked."""
    status: str = ""
    """The outcome in a word, shown under the image."""
    tone: Tone = ""
    """Whether the outcome is what an erasure aims at."""
    note: str = ""
    """What was seen in the image."""

    @property
    def place(self) -> str:
        """For messages."""
        return f"row {self.row!r} of suite {self.suite!r} by {self.method!r}"

    def open(self) -> Image.Image:
        """The image, its format known and its pixels not read yet; raises ErasureError, with the row, where it is no image."""
        try:
            return Image.open(io.BytesIO(self.image) if isinstance(self.image, bytes) else self.image)
        except OSError as error:
            raise ErasureError(f"no image at {self.place} ({error}): generate it again") from error

    def picture(self) -> Image.Image:
        """The image's pixels in RGB; raises ErasureError, with the row, where they cannot be read."""
        with self.open() as image:
            try:
                return image.convert("RGB")
            except (OSError, SyntaxError) as error:
                raise ErasureError(f"the image of {self.place} is damaged ({error}): generate it again") from error


@dataclass(frozen=True)
class Gallery:
    """Shots, checked; methods and suites keep the order in which they come."""

    shots: tuple[Shot, ...]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Score -> where its slider starts; without one, in the middle."""
    sensitive: frozenset[str] = frozenset()
    """Suites whose images are all blurred at first."""
    lowest: Mapping[str, float] = field(default_factory=dict)
    """Score -> the lowest value that was kept, where lower ones were not; thresholds below it would miss those."""

    def __post_init__(self) -> None:
        if not self.shots:
            raise ErasureError("a gallery of no images: generate some first, or write the report without one")
        seen: dict[tuple[str, str], Shot] = {}
        taken: set[tuple[str, str, str]] = set()
        for shot in self.shots:
            if (key := (shot.suite, shot.row, shot.method)) in taken:
                raise ErasureError(f"two images for {shot.place}: give each once")
            taken.add(key)
            first = seen.setdefault((shot.suite, shot.row), shot)
            if (first.prompt, first.seed) != (shot.prompt, shot.seed):
                raise ErasureError(f"{shot.place} has another prompt or seed than by {first.method!r}: these are not the same row")
            if strange := [name for name, value in shot.scores.items() if not isfinite(value)]:
                raise ErasureError(f"{shot.place} has {strange[0]} = {shot.scores[strange[0]]}: leave out what was not measured")

    def hides(self, shot: Shot) -> bool:
        """Whether an image is blurred at first."""
        return shot.flagged or shot.suite in self.sensitive
