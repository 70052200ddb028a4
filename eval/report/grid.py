"""The matched-seed grid as one static picture: the same prompt and seed by the base and by every method."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from erasure.errors import ErasureError

from .shots import KINDS, Gallery, Shot

ORDER = ("named", "implied", "attack", "neighbour", "pair", "other", "over_refusal")


def write_png(path: Path | str, gallery: Gallery, *, per_kind: int = 2, side: int = 128) -> Path:
    """The first rows of every kind: prompts on the left, a column a method, the outcome under each image.

    gallery: of one suite. Nobody can click a picture, so what a page would blur is blurred in its pixels.
    """
    if len({shot.suite for shot in gallery.shots}) != 1:
        raise ErasureError("a grid shows the images of one suite")
    columns: dict[str, dict[str, Shot]] = {}
    for shot in gallery.shots:
        columns.setdefault(shot.method, {})[shot.row] = shot
    strips = _strips(columns, per_kind)
    label, gap, head, foot = 250, 8, 30, 20
    width = label + len(columns) * (side + gap) + gap
    sheet = Image.new("RGB", (width, head + len(strips) * (side + foot + gap) + gap), "white")
    pen, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(15)
    for j, name in enumerate(columns):
        pen.text((label + gap + j * (side + gap) + side / 2, head / 2), name, "black", large, "mm")
    for i, strip in enumerate(strips):
        top = head + i * (side + foot + gap)
        words = f"{KINDS.get(strip[0].kind, strip[0].kind)}\n\n{_wrap(strip[0].prompt, 34)}\n\nseed {strip[0].seed}"
        pen.multiline_text((gap, top + 4), words, "black", small, spacing=3)
        for j, shot in enumerate(strip):
            left = label + gap + j * (side + gap)
            sheet.paste(_picture(shot, side, gallery.hides(shot)), (left, top))
            words = f"{shot.status}: {shot.note.split(' · ')[0]}" if shot.note else shot.status
            pen.text((left + side / 2, top + side + foot / 2), words[:22], "black", small, "mm")
    sheet.save(path)
    return Path(path)


def _strips(columns: dict[str, dict[str, Shot]], per_kind: int) -> list[list[Shot]]:
    """The first rows of every kind that all methods have, each across the methods."""
    first, *others = columns.values()
    whole = [shot for row, shot in first.items() if all(row in column for column in others)]
    kinds = dict.fromkeys([*ORDER, *(shot.kind for shot in whole)])
    chosen = [shot for kind in kinds for shot in [s for s in whole if s.kind == kind][:per_kind]]
    return [[column[shot.row] for column in columns.values()] for shot in chosen]


def _picture(shot: Shot, side: int, blur: bool) -> Image.Image:
    picture = shot.picture()
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(min(picture.size) / 6))
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
