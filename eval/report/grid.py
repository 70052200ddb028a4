"""The matched-seed grid: the same prompt and seed by the base and by every method, with the judge's call under each image."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from erasure.errors import ErasureError

from ..canvas_rows import Row
from ..score import KEPT, Sample
from ..store import Cell

KINDS = {
    "named": "named",
    "implied": "implied by a synonym",
    "neighbour": "neighbour, to be kept",
    "pair": "together with something to be kept",
    "other": "unrelated, to be kept",
}
"""Kinds of rows in the order of the grid, in plain words."""


@dataclass(frozen=True)
class Shot:
    """One image and what the judge calls in it."""

    image: Image.Image
    status: str
    """target, gone, kept, lost or unrecognised."""
    call: str
    blurred: bool

    @property
    def alt(self) -> str:
        return ("Blurred image. " if self.blurred else "") + f"The judge sees: {self.call} ({self.status})"


@dataclass(frozen=True)
class Strip:
    """One prompt and seed across the columns."""

    kind: str
    prompt: str
    seed: int
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Grid:
    """Strips under the names of their columns."""

    names: tuple[str, ...]
    strips: tuple[Strip, ...]


def matched_grid(columns: Mapping[str, tuple[Cell, Sequence[Sample]]], *, per_kind: int = 2, blur: bool = False) -> Grid:
    """The first rows of every kind, from cells of the same rows, base first. ``blur`` is for content that nobody should meet unasked."""
    if not columns:
        raise ErasureError("a grid needs at least one column")
    rows = [row for kind in KINDS for row in _of_kind(next(iter(columns.values()))[0].rows, kind)[:per_kind]]
    shots = [_shots(cell, samples, rows, blur) for cell, samples in columns.values()]
    strips = [Strip(row.kind, row.prompt, row.seed, across) for row, across in zip(rows, zip(*shots, strict=True), strict=True)]
    return Grid(tuple(columns), tuple(strips))


def data_uri(image: Image.Image) -> str:
    """A PNG as a data: URI."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def write_png(path: Path | str, grid: Grid, *, side: int = 128) -> Path:
    """The grid as one picture: prompts on the left, a column a model, the judge's status under each image."""
    label, gap, head, foot = 250, 8, 30, 20
    width = label + len(grid.names) * (side + gap) + gap
    sheet = Image.new("RGB", (width, head + len(grid.strips) * (side + foot + gap) + gap), "white")
    pen, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(15)
    for j, name in enumerate(grid.names):
        pen.text((label + gap + j * (side + gap) + side / 2, head / 2), name, "black", large, "mm")
    for i, strip in enumerate(grid.strips):
        top = head + i * (side + foot + gap)
        words = f"{KINDS[strip.kind]}\n\n{_wrap(strip.prompt, 34)}\n\nseed {strip.seed}"
        pen.multiline_text((gap, top + 4), words, "black", small, spacing=3)
        for j, shot in enumerate(strip.shots):
            left = label + gap + j * (side + gap)
            sheet.paste(shot.image.resize((side, side), Image.Resampling.BICUBIC), (left, top))
            pen.text((left + side / 2, top + side + foot / 2), f"{shot.status}: {shot.call.split(' · ')[0]}"[:22], "black", small, "mm")
    sheet.save(path)
    return Path(path)


def _of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.kind == kind]


def _shots(cell: Cell, samples: Sequence[Sample], rows: Sequence[Row], blur: bool) -> list[Shot]:
    calls, images = {sample.id: sample for sample in samples}, cell.images(rows)
    return [Shot(_picture(image, blur), _status(calls[r.id]), _call(calls[r.id]), blur) for r, image in zip(rows, images, strict=True)]


def _picture(image: Tensor, blur: bool) -> Image.Image:
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    return picture.filter(ImageFilter.GaussianBlur(picture.width / 6)) if blur else picture


def _status(sample: Sample) -> str:
    if sample.unrecognised:
        return "unrecognised"
    if sample.kind in KEPT:
        return "kept" if sample.wanted_present else "lost"
    return "target" if sample.target_present else "gone"


def _call(sample: Sample) -> str:
    return ", ".join(sample.objects) + f" · {sample.style}" if sample.objects else "nothing it knows"


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
