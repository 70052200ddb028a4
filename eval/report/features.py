"""The page on a concept's features: heat maps, concepts, sharing and image strips in one file that asks no network for anything."""

import base64
import io
from pathlib import Path
from typing import Any

from markupsafe import Markup

from . import _environment, _source, _write


def write_page(path: Path | str, page: dict[str, Any]) -> Path:
    """Write the page and give its path.

    page: ``title``, ``concept``, ``model``, ``coders`` (a line each), ``k``, ``features`` and ``spared`` as plain data, ``together`` (a
    strip or None), ``sensitive`` (images are blurred until clicked), ``command`` and ``facts``. A feature has ``index``, ``hookpoint``,
    ``score``, ``concepts`` and ``shared`` (pairs of name and mean), ``prompts`` (``prompt``, ``peak``, ``tokens`` of ``text`` and
    ``code``), ``shown`` and ``strip``; a strip is what ``strip`` gives. Words in it are untrusted.
    """
    environment = _environment()
    environment.filters |= {"code": code, "factor": lambda value: f"{value:g}".replace("-", "−")}
    for one in page["features"]:
        one["top"] = max((abs(match["peak"]) for match in one["prompts"]), default=1.0)
    text = environment.get_template("features.html.j2").render(page=page, style=Markup(_source("report.css") + _source("features.css")))
    _write(Path(path), text)
    return Path(path)


def code(value: float) -> str:
    """A code with two figures behind the point, a true minus, and no sign or figures for zero."""
    return "0" if value == 0 else f"{value:.2f}".replace("-", "−")


def strip(prompt: str, factors: list[float], images: list[Any]) -> dict[str, Any]:
    """PIL images of one prompt at rising factors, as the page holds them."""
    shots = []
    for factor, image in zip(factors, images, strict=True):
        held = io.BytesIO()
        image.save(held, "PNG", optimize=True)
        shots.append({"factor": factor, "src": "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()})
    return {"prompt": prompt, "shots": shots}
