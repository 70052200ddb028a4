import base64
import hashlib
import io
import json
import re
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.eval import report as module
from erasure.eval.columns import BY_KEY
from erasure.eval.compare import Comparison, Entry, compare
from erasure.eval.published import Published
from erasure.eval.report import Gallery, Shot, write_report
from erasure.eval.report.grid import write_png
from erasure.eval.report.plots import pareto
from erasure.eval.report.scored import gallery
from erasure.eval.store import Cell, Settings
from erasure.eval.suite import Suite

VOID = {"meta", "link", "img", "br", "input", "wbr"}
HOSTILE = "</script><script>alert(1)</script> \"q\" 'q' <!-- & \u2028 \ud800 __proto__"


class Page(HTMLParser):
    """Checks that elements close in order, and keeps what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.text = list[str](), list[str](), list[str](), ""
        self.scripts: list[tuple[str | None, str]] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found: dict[str, Any] = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("src", "href", "xlink:href", "action", "data") if key in found]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]
        if tag == "script":
            self.scripts.append((found.get("id"), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            name, text = self.scripts[-1]
            self.scripts[-1] = (name, text + data)
        else:
            self.text += data

    def json(self, name: str) -> Any:
        return json.loads(dict(self.scripts)[name])


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
def table(entries: list[Entry]) -> Comparison:
    return compare(entries)


@pytest.fixture(scope="module")
def shown(demo: Suite, cells: dict[str, Cell], entries: list[Entry]) -> Gallery:
    return gallery(demo, Concept("dagger"), {e.name: (cells[e.name], e.samples or []) for e in entries})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, table: Comparison, shown: Gallery) -> Page:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert write_report(path, table, shown, commands=["erasure bench --concept 'dagger' && echo <done>"]) == path
    return Page(path.read_text(encoding="utf-8"))


def png(grey: int = 100, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (grey,) * 3).save(out, "PNG")
    return out.getvalue()


def shots(n: int, image: bytes | Path | None = None) -> list[Shot]:
    return [Shot("s", m, f"r{i}", "named", f"prompt {i}", i, image or png(i), scores={"x": i / 10}) for m in ("a", "b") for i in range(n)]


def test_the_report_is_well_formed_and_asks_nobody_for_anything(page: Page) -> None:
    assert page.open == []
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))


def test_the_policy_allows_the_reports_own_script_and_nothing_from_elsewhere(page: Page) -> None:
    (script,) = [text for name, text in page.scripts if name is None]
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in page.policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["script-src"] == f"'sha256-{sha}'" and rules["img-src"] == "data:"


def test_references_inside_the_plots_point_to_something(tmp_path: Path, table: Comparison) -> None:
    text = write_report(tmp_path / "r.html", table).read_text()
    targets = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets and targets <= set(re.findall(r' id="([^"]+)"', text))
    assert not re.search(r"@import|url\((?!#)|<script|<iframe", text)


def test_every_image_is_inside_beside_its_row_and_what_was_seen(page: Page, demo: Suite) -> None:
    rows = demo.rows(Concept("dagger"))
    named = page.json("chunk-s0")
    assert named["prompt"] == [row.prompt for row in rows] and named["seed"] == [str(row.seed) for row in rows]
    for i, grey in enumerate((51, 128, 204)):
        chunk = page.json(f"chunk-s0-m{i}")
        assert chunk["row"] == list(range(72)) and set(chunk["status"]) <= {"target", "gone", "kept", "lost", "unrecognised"}
        for address in chunk["src"]:
            with Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/webp;base64,")))) as decoded:
                value = decoded.convert("RGB").getpixel((5, 5))
                assert decoded.size == (64, 64) and isinstance(value, tuple) and abs(value[0] - grey) <= 2


def test_scores_and_flags_come_from_the_samples(shown: Gallery, entries: list[Entry]) -> None:
    first = {sample.id: sample for sample in entries[0].samples or []}
    of_base = [shot for shot in shown.shots if shot.method == "base"]
    for shot in of_base:
        assert shot.flags["target present"] == first[shot.row].target_present
        assert shot.scores.get("presence of dagger") == first[shot.row].wanted_scores.get("dagger")
    assert sum("presence of dagger" in shot.scores for shot in of_base) == 44, "rows that do not ask for the target have no such score"


def test_names_and_commands_are_escaped(page: Page) -> None:
    assert "<script>alert(1)</script>" in page.text and "echo <done>" in page.text
    assert page.json("meta")["methods"][2] == "<script>alert(1)</script>"


def test_hostile_prompts_stay_text(tmp_path: Path, table: Comparison) -> None:
    bad = [Shot(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, 2**60 + 1, png(), (HOSTILE,), {HOSTILE: 1.0}, {HOSTILE: True}, True, "s")]
    text = write_report(tmp_path / "r.html", table, Gallery(tuple(bad))).read_text(encoding="utf-8")
    page = Page(text)
    meta, rows = page.json("meta"), page.json("chunk-s0")
    assert [meta["methods"], meta["flags"], rows["prompt"], rows["id"], rows["categories"]] == [[HOSTILE]] * 5
    assert rows["seed"] == ["1152921504606846977"], "as text: a JavaScript number would round it"
    assert "alert(1)</script>" not in text.replace("&lt;script&gt;alert(1)&lt;/script&gt;", "")
    assert len(page.scripts) == 4 and page.open == []


def test_the_report_explains_each_column_and_names_protocol_and_versions(page: Page, demo: Suite) -> None:
    shown = [key for key in BY_KEY if BY_KEY[key].help in page.text]
    assert {"named", "implied", "kept", "kept_difference", "unrecognised", "style", "fit", "time"} <= set(shown)
    assert demo.protocol.hash in page.text and demo.hash in page.text and f"torch {version('torch')}" in page.text
    assert "n = 32" in page.text and "n = 28" in page.text


def test_plots_carry_text_as_text_and_the_colour_of_the_page(tmp_path: Path, table: Comparison) -> None:
    text = write_report(tmp_path / "r.html", table).read_text()
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == 3
    for plot in plots:
        assert "<text" in plot and "currentColor" in plot and 'role="img"' in plot and "aria-label" in plot
    assert "named target still seen, %" in plots[0] and "implied target still seen, %" in plots[1] and "seconds to fit" in plots[2]


def test_the_pareto_front_has_whom_nobody_beats() -> None:
    points = [(50.0, 90.0), (10.0, 70.0), (10.0, 60.0), (60.0, 85.0), (0.0, 20.0), (100.0, 90.0)]
    assert pareto(points) == [(0.0, 20.0), (10.0, 70.0), (50.0, 90.0)]
    assert pareto([(5.0, 5.0), (5.0, 5.0)]) == [(5.0, 5.0)]


def test_the_same_results_give_the_same_report(tmp_path: Path, table: Comparison, shown: Gallery) -> None:
    first, second = (write_report(tmp_path / name, table, shown).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_recipes_and_metrics_of_a_prompt_suite_have_columns_words_and_a_plot(tmp_path: Path, entries: list[Entry]) -> None:
    recipe = {"version": 1, "hash": "h", "unit": "image", "detectors": {"d": "0"}, "parts": None, "refused": 0, "by_category": {}}
    rate = {"k": 3, "n": 40, "rate": 0.075, "lo": 0.026, "hi": 0.199}
    plain: dict[str, Any] = {
        "erased": {},
        "kept": {},
        **dict.fromkeys(("partner", "unrecognised", "style", "background", "floor", "chance")),
    }
    results = {**entries[0].results, **plain, "recipes": {"mace<b>": {**recipe, "rate": rate, "sweep": [], "notes": []}}}
    page = Page(write_report(tmp_path / "r.html", compare([results])).read_text())
    assert "mace<b> 8% (3-20)" in page.text and "Rates by recipe" not in page.text and "The judge sees" not in page.text
    svg = re.findall(r'aria-label="([^"]*)"', (tmp_path / "r.html").read_text())
    assert "Rates by recipe, %. mace&lt;b>: base 8%" in svg


def test_published_rows_stand_apart(tmp_path: Path, table: Comparison) -> None:
    other = Published.model_validate(
        {
            "source": "Somebody 2024",
            "table": "table 1",
            "protocol": "their own",
            "checked": "source",
            "suites": ["canvas-demo"],
            "columns": {"ASR": {"better": "down"}},
            "rows": {"THEIRS": {"ASR": 12.5}},
        }
    )
    page = Page(write_report(tmp_path / "r.html", table, published=[other]).read_text())
    assert "Somebody 2024, table 1" in page.text and "12.5" in page.text and "nothing here was measured by this suite" in page.text


def test_many_images_make_a_folder_of_links_that_the_page_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Comparison, cells: dict[str, Cell], shown: Gallery
) -> None:
    monkeypatch.setattr(module, "INSIDE", 10)
    index = write_report(tmp_path / "report.html", table, shown)
    assert index == tmp_path / "report" / "index.html"
    assert 'url=report/index.html"' in (tmp_path / "report.html").read_text()
    page = Page(index.read_text())
    assert "'self' file:" in page.policy and "http" not in page.policy and not any(name and "chunk" in name for name, _ in page.scripts)
    key, chunk = re.fullmatch(r'receive\("(.*?)", (.*)\);\n', (index.parent / "data" / "s0-m1.js").read_text(), re.DOTALL).groups()  # type: ignore[union-attr]
    assert key == "s0-m1" and len(json.loads(chunk)["src"]) == 72
    for address, (_, path, _) in zip(json.loads(chunk)["src"], cells["strong"].files(), strict=True):
        assert (index.parent / address).samefile(path), "linked, where the file system can"


def test_a_smaller_report_takes_the_folder_of_the_larger_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Comparison) -> None:
    monkeypatch.setattr(module, "INSIDE", 4)
    write_report(tmp_path / "r.html", table, Gallery(tuple(shots(5))))
    write_report(tmp_path / "r.html", table, Gallery(tuple(shots(4))))
    assert len(list((tmp_path / "r" / "images").rglob("*.png"))) == 8, "a second folder takes the place of the first"
    write_report(tmp_path / "r.html", table, Gallery(tuple(shots(2))))
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Comparison) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("years")
    write_report(tmp_path / "r.html", table, Gallery(tuple(shots(2))))
    monkeypatch.setattr(module, "INSIDE", 1)
    with pytest.raises(ErasureError, match="is something else"):
        write_report(tmp_path / "r.html", table, Gallery(tuple(shots(2))))
    assert (tmp_path / "r" / "thesis.txt").read_text() == "years" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("inside", [600, 1], ids=["page", "folder"])
def test_a_damaged_image_names_its_row_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Comparison, inside: int
) -> None:
    monkeypatch.setattr(module, "INSIDE", inside)
    broken = [*shots(3), Shot("s", "a", "r9", "named", "p", 1, b"<svg onload=alert(1)>")]
    with pytest.raises(ErasureError, match=r"no image at row 'r9' of suite 's' by 'a'"):
        write_report(tmp_path / "r.html", table, Gallery(tuple(broken)))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ErasureError, match=r"row 'r9'.* is damaged"):
        replace(broken[-1], image=png(size=(64, 64))[:-30]).picture()


def test_large_images_are_made_smaller_inside_the_page(tmp_path: Path, table: Comparison) -> None:
    wide = Shot("s", "a", "r", "named", "p", 1, png(size=(1536, 1024)))
    page = Page(write_report(tmp_path / "r.html", table, Gallery((wide,))).read_text())
    data = page.json("chunk-s0-m0")["src"][0].removeprefix("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as decoded:
        assert decoded.size == (768, 512)


def test_formats_that_browsers_lack_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Comparison) -> None:
    monkeypatch.setattr(module, "INSIDE", 0)
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "a.tiff")
    index = write_report(tmp_path / "r.html", table, Gallery((Shot("s", "a", "r", "named", "p", 1, tmp_path / "a.tiff"),)))
    with Image.open(index.parent / "images" / "s0-m0" / "0.webp") as written:
        assert written.format == "WEBP" and written.size == (8, 8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([Shot("s", "a", "r0", "named", "prompt 0", 0, b"")], "two images for row 'r0'"),
        ([Shot("s", "c", "r0", "named", "prompt 0", 1, b"")], "another prompt or seed than by 'a'"),
        ([Shot("s", "c", "r0", "named", "another", 0, b"")], "another prompt or seed than by 'a'"),
        ([Shot("s", "c", "r0", "named", "prompt 0", 0, b"", scores={"x": float("nan")})], "has x = nan"),
    ],
)
def test_shots_that_do_not_match_are_refused(more: list[Shot], message: str) -> None:
    with pytest.raises(ErasureError, match=message):
        Gallery((*shots(1), *more))


def test_a_gallery_of_nothing_is_an_error() -> None:
    with pytest.raises(ErasureError, match="no images"):
        Gallery(())


def test_the_grid_shows_every_kind_at_the_same_seed_in_every_column(tmp_path: Path, shown: Gallery) -> None:
    with Image.open(write_png(tmp_path / "grid.png", shown)) as picture:
        assert picture.size == (250 + 3 * 136 + 8, 30 + 10 * 156 + 8), "two rows of each of five kinds, in three columns"
        for i, grey in enumerate((51, 128, 204)):
            assert picture.getpixel((250 + 8 + 64 + 136 * i, 30 + 64)) == (grey,) * 3


@pytest.mark.parametrize("why", ["flagged", "sensitive"])
def test_what_a_page_would_blur_is_blurred_in_the_grids_pixels(tmp_path: Path, why: str) -> None:
    noise = Image.effect_noise((64, 64), 100).convert("RGB")
    out = io.BytesIO()
    noise.save(out, "PNG")
    shot = Shot("s", "a", "r", "named", "p", 1, out.getvalue(), flagged=why == "flagged")
    images = Gallery((shot,), sensitive=frozenset({"s"} if why == "sensitive" else ()))
    contrast = []
    for name, shown in (("sharp", Gallery((replace(shot, flagged=False),))), ("blurred", images)):
        with Image.open(write_png(tmp_path / f"{name}.png", shown)) as picture:
            tile = picture.crop((258, 30, 258 + 128, 30 + 128)).convert("L")
        contrast.append(torch.tensor(list(tile.tobytes())).float().std().item())
    assert contrast[1] < contrast[0] / 5


def test_what_masks_switch_off_is_drawn_for_the_method_that_has_them(tmp_path: Path, entries: list[Entry]) -> None:
    rows = {"all": {"off": 1, "all": 8, "share": "12.50%"}, "unet.a.0": {"off": 1, "all": 8, "share": "12.50%"}}
    masked = deepcopy(entries)
    artefact = {"eraser": "e", "method": "minimalist", "settings": {}, "seed": 0, "details": {"Switched off: heads": rows}}
    masked[1].results["artefact"] = artefact
    text = write_report(tmp_path / "report.html", compare(masked)).read_text()
    name = masked[1].results["name"]
    assert f"What {name} switches off, by block and kind of unit." in text and ">1 of 8<" in text
    assert "switches off" not in write_report(tmp_path / "plain.html", compare(entries)).read_text()
