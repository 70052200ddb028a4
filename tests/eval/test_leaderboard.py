"""The leaderboard is made from its folders alone, and refuses rows that are not whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from erasure.errors import ErasureError
from erasure.eval.leaderboard import FILES, add, boards, build, load, main
from erasure.eval.score import write_samples
from erasure.eval.suite import load_suite
from erasure.eval.summary import write_results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(make_entry: Any, tmp_path: Path) -> Path:
    """Made-up results of base, two methods, and one method under another protocol."""
    ranked = load_suite("canvas")
    base = make_entry(ranked, "base", 0.95, 0.95)
    entries = [base, make_entry(ranked, "good", 0.02, 0.93, base.samples), make_entry(ranked, "bad", 0.7, 0.93, base.samples)]
    other = ranked.under(steps=10)
    entries.append(make_entry(other, "good10", 0.0, 0.95, make_entry(other, "base", 0.95, 0.95).samples))
    for entry in entries:
        (tmp_path / "results" / entry.name).mkdir(parents=True)
        write_results(tmp_path / "results" / entry.name / "results.json", entry.results)
        write_samples(tmp_path / "results" / entry.name / "samples.jsonl", entry.samples or [])
    return tmp_path / "results"


@pytest.fixture
def rows(results: Path, tmp_path: Path) -> Path:
    for folder in sorted(results.iterdir()):
        add(folder, tmp_path / "leaderboard", f"erasure bench --out {folder.name}")
    return tmp_path / "leaderboard"


def test_a_row_has_its_four_files_and_the_page_ranks_within_a_protocol(rows: Path, tmp_path: Path) -> None:
    assert sorted(p.name for p in rows.iterdir() if p.is_dir()) == [f"canvas-dagger-{name}" for name in ("bad", "base", "good", "good10")]
    assert set(FILES) <= {p.name for p in (rows / "canvas-dagger-good").iterdir()}
    tables = boards(load(rows))
    assert [[line.name for line in table.lines] for table in sorted(tables, key=lambda t: len(t.lines))] == [
        ["good10"],
        ["base", "bad", "good"],
    ]
    whole = max(tables, key=lambda t: len(t.lines))
    assert {line.name: line.ranks.get("named") for line in whole.lines} == {"base": None, "good": 1, "bad": 2}
    markdown, page = (path.read_text() for path in build(rows, tmp_path / "docs"))
    assert markdown.count("| base |") == 1 and "| good |" in markdown and markdown.count("\n## ") == 2
    assert page.count("<table>") == 2 and page.count('<th scope="row">') == 4
    assert [p.read_text() for p in build(rows, tmp_path / "docs")] == [markdown, page]


@pytest.mark.parametrize("name", FILES)
def test_a_row_that_lacks_a_file_is_named(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (rows / "canvas-dagger-good" / name).unlink()
    assert main(["--rows", str(rows), "--out", str(tmp_path / "docs")]) == 2
    assert f"canvas-dagger-good lacks {name}" in capsys.readouterr().err and not (tmp_path / "docs").exists()


def test_settings_that_are_not_those_of_the_results_are_refused(rows: Path) -> None:
    path = rows / "canvas-dagger-good" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 7}))
    with pytest.raises(ErasureError, match=r"config\.json is not the configuration"):
        load(rows)


def test_a_row_is_renewed_and_never_silently_another(rows: Path, results: Path) -> None:
    assert add(results / "good", rows, "again").name == "canvas-dagger-good"
    assert (rows / "canvas-dagger-good" / "run.sh").read_text().endswith("again\n")
    shutil.copyfile(results / "good10" / "results.json", results / "good" / "results.json")
    renamed = json.loads((results / "good" / "results.json").read_text()) | {"name": "good"}
    (results / "good" / "results.json").write_text(json.dumps(renamed))
    with pytest.raises(ErasureError, match="row of other settings"):
        add(results / "good", rows, "other")
    assert not list(rows.glob(".*"))


def test_an_empty_leaderboard_says_so(tmp_path: Path) -> None:
    (markdown, _) = build(tmp_path / "nothing", tmp_path / "docs")
    assert "No rows yet." in markdown.read_text()


def test_the_shipped_page_is_what_its_folders_make(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "leaderboard", tmp_path / "rows")
    markdown, page = build(tmp_path / "rows", tmp_path)
    assert markdown.read_text() == (ROOT / "docs" / "leaderboard.md").read_text(), "run: make leaderboard"
    assert page.read_text() == (ROOT / "leaderboard" / "index.html").read_text(), "run: make leaderboard"
