"""``erasure suites`` and ``erasure generate`` on a prompt suite, on a tiny pipeline saved to disk."""

import json
from pathlib import Path

import pytest
from PIL import Image

from erasure.cli.main import main
from erasure.eval import sources
from erasure.eval.suite import load_suite

from .. import tiny

HEADER = (
    "prompt,case_number,evaluation_seed,evaluation_guidance,sd_image_height,sd_image_width,categories,hard,"
    "nudity_percentage,inappropriate_percentage\n"
)
ROWS = [
    ("a big red boat", 7, 16, 16),
    ("a dog on a boat", 9, 16, 16),
    ("a painting of the sky", 7, 16, 24),
    ("", 7, 16, 16),
    ("a child and a dog", 7, 16, 16),
    ("a cat in the night", 9, 16, 16),
    ("a knife on a red boat", 7, 16, 16),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever is not here is not to be had."""
    monkeypatch.setenv(sources.OFFLINE, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources.say.cache_clear()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of I2P's columns with rows of two guidance scales and two sizes."""
    lines = [f"{text},{i},{50 + i},{guidance},{height},{width},violence,0,0,0\n" for i, (text, guidance, height, width) in enumerate(ROWS)]
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + "".join(lines))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.sd1().save_pretrained(path)
    return path


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


def test_generate_honours_each_rows_seed_guidance_and_size_and_resumes(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "base", "--model", str(model), "--suite", "i2p", "--prompts", str(prompts), "--steps", "2", "--batch-size", "2"]
    command += ["--device", "cpu", "--json", "--limit", "4"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["images"], said["missing"]) == (4, 0)
    cell = Path(said["folder"])
    sizes = {path.stem: Image.open(path).size for path in cell.rglob("*.png")}
    assert sizes == {"implied-00000": (16, 16), "implied-00001": (16, 16), "implied-00002": (24, 16), "implied-00005": (16, 16)}
    chunks = [json.loads(path.read_text()) for path in sorted(cell.glob("chunk-*/chunk.json"))]
    assert [chunk["rows"] for chunk in chunks] == [["implied-00000"], ["implied-00001", "implied-00005"], ["implied-00002"]]
    assert [chunk["seeds"] for chunk in chunks] == [[50], [51, 55], [52]]
    first = pixels(cell)
    for path in (cell / "chunk-0001").iterdir():  # as if killed before the second chunk
        path.unlink()
    (cell / "chunk-0001").rmdir()
    untouched = (cell / "chunk-0000" / "timing.json").stat().st_mtime_ns
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    assert pixels(cell) == first and (cell / "chunk-0000" / "timing.json").stat().st_mtime_ns == untouched
    assert main([*command, "--out", str(tmp_path / "one"), "--guidance", "3"]) == 2
    assert "made with" in capsys.readouterr().err


def test_the_rows_own_guidance_reaches_the_model(model: Path, prompts: Path, tmp_path: Path) -> None:
    def images(name: str, text: str, *flags: str) -> dict[str, bytes]:
        file = tmp_path / f"{name}.csv"
        file.write_text(text)
        command = ["generate", "base", "--model", str(model), "--suite", "i2p", "--prompts", str(file), "--steps", "2", "--device", "cpu"]
        assert main([*command, *flags, "--quiet", "--out", str(tmp_path / name)]) == 0
        return pixels(tmp_path / name)

    text = prompts.read_text()
    own = images("own", text)
    other = images("other", text.replace(",9,16,16,", ",3,16,16,"))
    assert set(own) == set(other) == {f"implied-0000{i}.png" for i in (0, 1, 2, 5, 6)}
    assert {name for name in own if own[name] != other[name]} == {"implied-00001.png", "implied-00005.png"}
    flat = images("flat", text, "--guidance", "9")
    assert {name for name in own if own[name] == flat[name]} == {"implied-00001.png", "implied-00005.png"}


def test_a_dry_run_needs_neither_weights_nor_a_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suite, images, sample in (("i2p", 4109, 7), ("coco-30k", 30000, 6), ("mma-diffusion", 1000, 2)):
        command = ["generate", "base", "--model", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--suite", suite]
        assert main([*command, "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert (plan["images"], plan["hash"]) == (images, load_suite(suite).hash) and plan["read"].startswith(
            f"{sample} rows of our sample"
        )
    assert not (tmp_path / "out").exists()


def test_a_suite_that_depends_on_the_concept_asks_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "base", "--model", "any/model", "--suite", "compositions", "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    assert main(command) == 2
    assert "--concept" in capsys.readouterr().err
    assert main([*command, "--target", "dagger", "--retain", "fork"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2


def test_show_says_source_licence_pins_filters_and_protocol(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", "show", "i2p"]) == 0
    text = capsys.readouterr().out
    for said in (
        "Ring-A-Bell at e4585ada0a5e",
        "6c1821aeeb20beb2",
        "MIT",
        "4109 of 4703 kept",
        "DDIMScheduler",
        "mace, rece",
    ):
        assert said in text
    assert main(["suites", "show", "p4d"]) == 0
    assert "UNPINNED" in capsys.readouterr().out
    assert main(["suites", "show", "i2p", "--prompts", str(prompts)]) == 0
    text = capsys.readouterr().out
    assert "[6 of 7 kept]" in text and "[5 of 6 kept]" in text and load_suite("i2p").hash not in text
    assert main(["suites", "show", "canvas", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["judge"] == "canvas/judge_test"


@pytest.mark.parametrize("name", ["neighbours", "unlearncanvas", "safesora", "six-cd-nudity", "t2vsafetybench-tiny", "canvas-demo"])
def test_show_has_a_page_for_every_sort_of_suite(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", "show", name, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["suite"].startswith(f"{name}, version 1, hash {load_suite(name).hash}") and record["images"]


def test_fetch_writes_checked_files_that_generate_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", "fetch", "neutral", "--out", str(tmp_path / "prompts"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == 120 and [path.name for path in (tmp_path / "prompts").iterdir()] == ["neutral.csv"]
    there = load_suite("neutral").with_prompts(tmp_path / "prompts")
    assert there.hash == load_suite("neutral").hash


@pytest.mark.parametrize(
    ("name", "message"),
    [("i2p", "data/unsafe-prompts4703.csv"), ("canvas", "has no files"), ("neighbours", "has no files"), ("i2q", "did you mean i2p")],
)
def test_what_cannot_be_fetched_is_said_and_nothing_written(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["suites", "fetch", name, "--out", str(tmp_path / "prompts")]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ") and not (tmp_path / "prompts").exists()
