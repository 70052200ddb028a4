import base64
import io
import re
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.eval.columns import BY_KEY
from erasure.eval.compare import Entry, compare
from erasure.eval.report import write_report
from erasure.eval.report.grid import Grid, matched_grid, write_png
from erasure.eval.store import Cell, Settings
from erasure.eval.suite import Suite

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Checks that elements close in order, and keeps what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.text = list[str](), list[str](), list[str](), ""
        self.images: list[dict[str, Any]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found: dict[str, Any] = dict(attrs)
        if tag == "img":
            self.images.append(found)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("src", "href", "xlink:href", "action", "data") if key in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory, demo: Suite) -> dict[str, Cell]:
    """Images of the demo's rows for three columns, each of one colour."""
    rows = demo.rows(Concept("dagger"))
    settings = Settings.of(rows, demo.protocol, eraser="base", model="fake", batch_size=72)
    found: dict[str, Cell] = {}
    for i, name in enumerate(("base", "strong", "<script>alert(1)</script>")):
        found[name] = Cell.open(tmp_path_factory.mktemp(f"cell-{i}"), rows, settings)
        found[name].write(found[name].chunks[0], torch.full((72, 3, 64, 64), 0.2 + 0.3 * i), 1.0)
    return found


@pytest.fixture(scope="module")
def entries(make_entry: Any, demo: Suite, cells: dict[str, Cell]) -> list[Entry]:
    base = make_entry(demo, "base", 0.95, 0.95)
    return [base, *(make_entry(demo, name, 0.03, 0.9, base.samples) for name in list(cells)[1:])]


@pytest.fixture(scope="module")
def grid(cells: dict[str, Cell], entries: list[Entry]) -> Grid:
    return matched_grid({e.name: (cells[e.name], e.samples or []) for e in entries}, per_kind=2)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, entries: list[Entry], grid: Grid) -> Page:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, compare(entries), grid, commands=["erasure bench --concept 'dagger' && echo <done>"])
    return Page(path.read_text(encoding="utf-8"))


def test_the_report_is_well_formed_and_asks_nobody_for_anything(page: Page) -> None:
    assert page.open == []
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))


def test_references_inside_the_plots_point_to_something(tmp_path: Path, entries: list[Entry]) -> None:
    text = write_report(tmp_path / "r.html", compare(entries)).read_text()
    targets = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets and targets <= set(re.findall(r' id="([^"]+)"', text))
    assert not re.search(r"@import|url\((?!#)|<script|<iframe", text)


def test_every_image_is_inside_with_its_size_and_a_description(page: Page) -> None:
    assert len(page.images) == 10 * 3
    for image in page.images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,")))) as decoded:
            assert decoded.size == (64, 64) == (int(image["width"]), int(image["height"]))
        assert "The judge sees" in image["alt"]


def test_the_grid_shows_every_kind_at_the_same_seed_in_every_column(grid: Grid, demo: Suite) -> None:
    assert [strip.kind for strip in grid.strips] == [k for k in ("named", "implied", "neighbour", "pair", "other") for _ in range(2)]
    rows = {(row.prompt, row.seed) for row in demo.rows(Concept("dagger"))}
    assert all((strip.prompt, strip.seed) in rows and len(strip.shots) == 3 for strip in grid.strips)
    assert [shot.image.getpixel((5, 5)) for shot in grid.strips[0].shots] == [(g, g, g) for g in (51, 128, 204)]


def test_names_and_commands_are_escaped(page: Page) -> None:
    assert "<script>alert(1)</script>" in page.text and "echo <done>" in page.text


def test_the_report_explains_each_column_and_names_protocol_and_versions(page: Page, demo: Suite) -> None:
    shown = [key for key in BY_KEY if BY_KEY[key].help in page.text]
    assert {"named", "implied", "kept", "kept_difference", "unrecognised", "style", "fit", "time"} <= set(shown)
    assert demo.protocol.hash in page.text and demo.hash in page.text and f"torch {version('torch')}" in page.text
    assert "n = 32" in page.text and "n = 28" in page.text


def test_plots_carry_text_as_text_and_the_colour_of_the_page(tmp_path: Path, entries: list[Entry]) -> None:
    text = write_report(tmp_path / "r.html", compare(entries)).read_text()
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == 2
    for plot in plots:
        assert "<text" in plot and "currentColor" in plot and 'role="img"' in plot and "aria-label" in plot
    assert "named target still seen, %" in plots[0] and "seconds to fit" in plots[1]


def test_the_same_results_give_the_same_report(tmp_path: Path, entries: list[Entry], grid: Grid) -> None:
    first, second = (write_report(tmp_path / name, compare(entries), grid).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_flagged_content_is_blurred_in_its_pixels(tmp_path: Path, demo: Suite, make_entry: Any) -> None:
    rows = demo.rows(Concept("dagger"))
    cell = Cell.open(tmp_path / "cell", rows, Settings.of(rows, demo.protocol, eraser="base", model="fake", batch_size=72))
    cell.write(cell.chunks[0], (torch.rand(72, 3, 64, 64) > 0.5).float(), 1.0)
    samples = make_entry(demo, "base", 0.9, 0.9).samples
    sharp, blurred = (matched_grid({"base": (cell, samples)}, per_kind=1, blur=blur).strips[0].shots[0] for blur in (False, True))
    contrast = [torch.tensor(list(shot.image.convert("L").tobytes())).float().std().item() for shot in (sharp, blurred)]
    assert contrast[1] < contrast[0] / 5 and blurred.alt.startswith("Blurred")


def test_the_grid_is_one_picture_for_a_readme(tmp_path: Path, grid: Grid) -> None:
    with Image.open(write_png(tmp_path / "grid.png", grid)) as picture:
        assert picture.size == (250 + 3 * 136 + 8, 30 + 10 * 156 + 8)
        assert picture.getpixel((250 + 8 + 64, 30 + 64)) == (51, 51, 51)


def test_a_grid_of_nothing_is_an_error() -> None:
    with pytest.raises(ErasureError, match="at least one column"):
        matched_grid({})
