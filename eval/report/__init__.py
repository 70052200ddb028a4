"""The report: one page with table, plots and every image, its prompt, scores and matched seeds; it asks no network for anything.

Up to ``INSIDE`` images the page holds everything itself. Beyond that it is a folder whose images and chunks of data the page
loads as they are looked at, from a disk as well as from a server.
"""

import base64
import hashlib
import os
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from erasure.errors import ErasureError

from ..columns import BY_KEY, GROUPS
from ..compare import Comparison
from ..published import HEADING, WARNING, Published
from . import plots
from .masks import heat_map, shares_of
from .pack import Pack, embed, file_into, to_json
from .shots import Gallery, Shot

INSIDE = 600
"""The most images that a page holds itself."""
SCRIPTS = ("rates.js", "data.js", "filters.js", "gallery.js", "panel.js", "page.js")
MARK = '<meta name="generator" content="erasure report">'


def write_report(
    path: Path | str,
    table: Comparison,
    gallery: Gallery | None = None,
    *,
    commands: Sequence[str] = (),
    published: Sequence[Published] = (),
) -> Path:
    """Write the report of a comparison and give the page to open.

    path: X.html. Where the gallery has more than ``INSIDE`` images, the report is the folder X/, and X.html leads to its index.html.
    commands: what reproduces the report, one shell line each. published: rows to show apart from the table. Raises ErasureError,
    before anything is written, for a folder X/ that is no report, and with the row for an image that cannot be read.
    """
    path = Path(path)
    folder = path.with_suffix("")
    if gallery is None or len(gallery.shots) <= INSIDE:
        _write(path, render(table, gallery, commands, published))
        if _is_report(folder):  # of an earlier, larger run
            shutil.rmtree(folder)
        return path
    if folder == path or (folder.exists() and not _is_report(folder)):
        raise ErasureError(f"{folder} is needed for the images of the report and is something else: give another name, X.html")
    _write_folder(folder, Pack(gallery), render(table, gallery, commands, published, inside=False))
    environment = _environment()
    _write(path, environment.get_template("pointer.html.j2").render(target=f"{quote(folder.name)}/index.html", title=_title(table)))
    return folder / "index.html"


def render(
    table: Comparison, gallery: Gallery | None, commands: Sequence[str], published: Sequence[Published] = (), *, inside: bool = True
) -> str:
    """The page as HTML; its images and their data are in it, or else are looked for beside it."""
    script = _script() if gallery else ""
    pack = Pack(gallery) if gallery else None
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            table=table,
            title=_title(table),
            first=table.lines[0].entry.results,
            groups=_groups(table),
            measured=table.used([column.key for column in table.columns if column.key not in BY_KEY]),
            differs=any(cell.differs for line in table.lines for cell in line.cells.values()),
            warnings=sorted({warning for line in table.lines for m in line.entry.results["metrics"].values() for warning in m["warnings"]}),
            published=published,
            published_heading=HEADING,
            published_warning=WARNING,
            commands=commands,
            plots=[(Markup(svg), caption) for svg, caption in [*plots.every(table), *_masks(table)]],
            environments=_environments(table),
            generator=Markup(MARK),
            policy=_policy(script, inside),
            style=Markup(_source("report.css")),
            script=Markup(script),
            index=Markup(to_json(pack.index())) if pack else None,
            chunks=[(key, Markup(to_json(chunk))) for key, chunk in pack.chunks(embed)] if pack and inside else [],
        )
    )


def _masks(table: Comparison) -> list[tuple[str, str]]:
    """(SVG, caption) of what each method's masks switch off."""
    maps = [(heat_map(shares_of((line.entry.results["artefact"] or {}).get("details", {}))), line.name) for line in table.lines]
    return [(svg, f"What {name} switches off, by block and kind of unit.") for svg, name in maps if svg]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("erasure.eval", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    return environment


def _title(table: Comparison) -> str:
    return f"Erasing {table.concept['name']}: {table.suite['name']}"


def _script() -> str:
    """All scripts as one, so that one hash allows it, and nothing leaks into the page's globals."""
    return "(() => {\n" + "\n".join(_source(name) for name in SCRIPTS) + "})();\n"


def _policy(script: str, inside: bool) -> str:
    """What the page may do: run its own script, by hash, and show what lies in it or beside it. Never the network."""
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    beside = "" if inside else " 'self' file:"
    scripts = f"script-src 'sha256-{sha}'{beside}; " if script else ""
    return f"default-src 'none'; {scripts}img-src data:{beside}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _source(name: str) -> str:
    return files("erasure.eval.report").joinpath(name).read_text(encoding="utf-8")


def _write_folder(folder: Path, pack: Pack, page: str) -> None:
    """The folder, whole or as it was."""
    draft = folder.with_name(f".{folder.name}-{os.getpid()}")
    (draft / "data").mkdir(parents=True)
    try:
        for key, chunk in pack.chunks(file_into(draft)):
            (draft / "data" / f"{key}.js").write_text(f'receive("{key}", {to_json(chunk)});\n', encoding="ascii")
        (draft / "index.html").write_text(page, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_report(folder: Path) -> bool:
    page = folder / "index.html"
    return page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:2000]


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _groups(table: Comparison) -> list[tuple[str, list[str]]]:
    """Groups of columns without those that no row fills."""
    own = ("Recipes and metrics", tuple(column.key for column in table.columns if column.key not in BY_KEY))
    return [(title, used) for title, keys in (*GROUPS, own) if (used := table.used(keys))]


def _environments(table: Comparison) -> list[tuple[str, dict[str, Any]]]:
    """Versions of the first row, and of every row that was measured under other ones."""
    first = table.lines[0].entry.results["versions"]
    others = [(line.name, line.entry.results["versions"]) for line in table.lines if line.entry.results["versions"] != first]
    return [("all rows" if not others else table.lines[0].name, first), *others]


__all__ = ["Gallery", "Shot", "write_report"]
