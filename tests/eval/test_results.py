"""results.json: typed, validated, versioned; published rows shown apart; every export says the same."""

import csv
import dataclasses
import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.eval import measured, results
from erasure.eval.compare import Comparison, Entry, compare, gather
from erasure.eval.counts import difference
from erasure.eval.exports import to_html, to_latex
from erasure.eval.metrics.base import mean_with_interval
from erasure.eval.outcomes import paired_mean
from erasure.eval.published import HEADING, load_published
from erasure.eval.results import SCHEMA, json_schema, read, write
from erasure.eval.rows import Row
from erasure.eval.score import Sample, write_samples
from erasure.eval.store import rows_hash
from erasure.eval.suite import Suite, list_suites, load_suite
from erasure.eval.summary import paired, summarise
from erasure.eval.tables import to_csv, to_json, to_markdown

PUBLISHED = Path(__file__).parents[2] / "docs" / "published"


@pytest.fixture(scope="module")
def i2p() -> Suite:
    return load_suite("i2p")


def recipe(k: int, n: int, hash: str = "abc", unit: str = "image") -> dict[str, Any]:
    rate = {"k": k, "n": n, "rate": k / n, "lo": max(k / n - 0.1, 0), "hi": min(k / n + 0.1, 1)}
    parts = {"total": 3 * k, "per_image": 3 * k / n, "lo": 0.0, "hi": 1.0, "by_label": {"X": 3 * k}} if unit == "part" else None
    return {"version": 1, "hash": hash, "unit": unit, "detectors": {"nudenet": "0" * 64}, "rate": rate, "parts": parts, "refused": 0}


def metric(value: float, model: str = "ViT-B-32") -> dict[str, Any]:
    identity = {"name": "clip_score", "model": model, "backend": "open_clip 3"}
    return {"name": "clip_score", "value": value, "lo": value - 1, "hi": value + 1, "n": 50, "interval": "b", "identity": identity} | {
        "warnings": [],
        "better": "up",
    }


@pytest.fixture
def entry(i2p: Suite) -> Any:
    """A made-up row on I2P: the share of images that recipe "rece" calls unsafe."""

    def make(name: str, unsafe: int, n: int = 50, seed: int = 0, of: Suite = i2p, **more: Any) -> Entry:
        rows = [Row(f"implied-{i:05d}", "implied", f"prompt {i}", seed + i) for i in range(n)]
        samples = [Sample(r.id, r.kind, r.prompt, r.seed, unsafe={"rece": i < unsafe}) for i, r in enumerate(rows)]
        base = None if name == "base" else samples
        found = summarise(samples, base, name=name, concept=Concept("nudity"), suite=of, rows=rows_hash(rows))
        return Entry(
            {**found, "recipes": {"rece": recipe(unsafe, n)}, "metrics": {"clip_score": metric(30.0 + unsafe / 10)}, **more}, samples
        )

    return make


def store(entry: Entry, folder: Path) -> Path:
    write(folder / "results.json", entry.results)
    write_samples(folder / "samples.jsonl", entry.samples or [])
    return folder


def test_the_published_schema_is_in_step() -> None:
    shipped = Path(__file__).parents[2] / "docs" / "results-schema.json"
    assert shipped.read_text() == json_schema(), "run: python -m erasure.eval.results > docs/results-schema.json"
    assert json.loads(json_schema())["properties"]["schema"]["const"] == SCHEMA


def test_results_survive_the_disk(entry: Any, tmp_path: Path) -> None:
    made = entry("uce", 5)
    assert read(store(made, tmp_path / "uce") / "results.json") == made.results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": True}, "n: Input should be a valid integer"),
        ({"strange": 1}, "strange: Extra inputs are not permitted"),
        ({"recipes": {"rece": recipe(5, 50) | {"rate": {"k": 5, "n": 50, "rate": 1.5, "lo": 0.0, "hi": 1.0}}}}, "recipes.rece.rate.rate"),
        ({"metrics": {"fid": {**metric(3.0), "value": float("nan")}}}, "a number that is none"),
        ({"suite": {"name": "i2p"}}, "lacks suite.version, suite.hash"),
    ],
)
def test_what_is_not_of_the_schema_is_neither_written_nor_read(entry: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    wrong = {**entry("uce", 5).results, **change}
    with pytest.raises(ErasureError, match=message):
        write(tmp_path / "new" / "results.json", wrong)
    assert not (tmp_path / "new").exists()
    (tmp_path / "results.json").write_text(json.dumps(wrong))
    with pytest.raises(ErasureError, match=r"results\.json"):
        read(tmp_path / "results.json")


def test_a_newer_schema_is_refused_and_the_first_one_is_brought_up(make_entry: Any, demo: Suite, tmp_path: Path) -> None:
    base = make_entry(demo, "base", 0.9, 0.9)
    new = make_entry(demo, "uce", 0.1, 0.9, base.samples)
    later = ("model", "artefact", "refused", "over_refusal", "commit", "recipes", "unavailable", "metrics", "detectors", "environment")
    old = {key: value for key, value in new.results.items() if key not in later} | {"schema": 1}
    for rate in (*old["kept"].values(), old["unrecognised"]):
        rate["difference"] = {key: value for key, value in rate["difference"].items() if key not in ("n", "interval")}
    (tmp_path / "results.json").write_text(json.dumps(old))
    migrated = read(tmp_path / "results.json")
    assert migrated["schema"] == SCHEMA and migrated["recipes"] == {} and migrated["commit"] is None
    keys = {column.key for column in compare([migrated]).columns}
    table, fresh = compare([base.results, migrated]), compare([base.results, new.results])
    assert {k: table.lines[1].cells[k].text for k in keys} == {k: fresh.lines[1].cells[k].text for k in keys}
    (tmp_path / "results.json").write_text(json.dumps({**new.results, "schema": SCHEMA + 1}))
    with pytest.raises(ErasureError, match=f"schema {SCHEMA + 1}, this version reads 1 to {SCHEMA}: upgrade"):
        read(tmp_path / "results.json")


def test_recipes_and_metrics_are_columns_and_recipes_rank_by_paired_tests(entry: Any) -> None:
    table = compare([entry("strong", 2), entry("weak", 30), entry("base", 45), entry("twin", 3)])
    ranks = {line.name: line.ranks for line in table.lines}
    assert [line.name for line in table.lines] == ["base", "strong", "weak", "twin"]
    assert {name: r.get("recipe:rece") for name, r in ranks.items()} == {"base": None, "strong": 1, "twin": 1, "weak": 3}
    assert not any("metric:clip_score" in r for r in ranks.values())
    markdown = to_markdown(table)
    assert "rece ↓ n=50" in markdown and "| strong | 4% (0-14) #1 |" in markdown and "clip_score ↑ n=50" in markdown
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(to_csv(table)))}
    assert float(rows["weak"]["recipe:rece"]) == 0.6 and float(rows["weak"]["metric:clip_score_hi"]) == 34.0
    assert json.loads(to_json(table))["rows"][2]["cells"]["recipe:rece"]["value"] == 0.6


def test_another_recipe_or_model_under_the_same_name_is_marked_and_never_ranked(entry: Any) -> None:
    other = entry("other", 0, recipes={"rece": recipe(0, 50, hash="xyz")}, metrics={"clip_score": metric(40.0, "ViT-L-14")})
    table = compare([entry("base", 45), entry("strong", 2), entry("weak", 30), other])
    cells = {line.name: line.cells["recipe:rece"].text for line in table.lines}
    assert cells == {"base": "90%", "strong": "4%", "weak": "60%", "other": "≠ 0%"}
    assert table.lines[3].cells["metric:clip_score"].text == "≠ 40" and not any(line.ranks for line in table.lines)
    assert "≠: measured another way" in to_markdown(table) and r"$\neq$ 0\%" in to_latex(table)
    newer = entry("newer", 2)
    newer.results["metrics"]["clip_score"]["identity"]["backend"] = "open_clip 4"
    assert compare([entry("base", 45), newer]).lines[1].cells["metric:clip_score"].text == "30.2"  # the same model, by other software


def test_other_suites_protocols_and_seeds_are_marked_and_never_ranked(entry: Any, i2p: Suite) -> None:
    steps, seeds = entry("steps", 0, of=i2p.under(steps=10)), entry("seeds", 0, seed=9)
    table = compare([entry("base", 45), entry("weak", 30), entry("strong", 2), steps, seeds])
    found = {line.name: (line.verdict, line.ranks.get("recipe:rece")) for line in table.lines}
    assert found["steps"] == ("≠ other protocol", None) and found["seeds"] == ("≠ other prompts", None)
    assert found["strong"] == ("", 1) and found["weak"] == ("", 2)


def test_samples_of_other_seeds_are_never_taken_for_pairs(entry: Any) -> None:
    first, second = entry("a", 3), entry("b", 5)
    strange = [dataclasses.replace(s, seed=s.seed + 1) for s in second.samples]
    with pytest.raises(ErasureError, match=r"row implied-00000 \(seed 0, .*has seed 1.*50 rows in all"):
        paired(strange, first.samples, "unsafe.rece")
    with pytest.raises(ErasureError, match="score both on the same suite"):
        compare([first, Entry(second.results, strange)])  # results say that the rows are the same, their samples do not
    with pytest.raises(ErasureError, match="is missing on the other side"):
        paired(second.samples[1:], first.samples, "unsafe.rece")


def test_parts_are_totals_and_not_ranked(entry: Any) -> None:
    rows = [entry(name, k, recipes={"mace": recipe(k, 50, unit="part")}) for name, k in (("base", 40), ("a", 2), ("b", 30))]
    table = compare(rows)
    assert table.lines[1].cells["recipe:mace"].text == "6" and "mace parts ↓" in to_markdown(table)
    assert not any(line.ranks for line in table.lines)


def test_a_folder_of_folders_stands_for_all_of_them(entry: Any, tmp_path: Path) -> None:
    folders = [store(entry(name, k), tmp_path / name) for name, k in (("base", 40), ("uce", 3))]
    assert gather([tmp_path]) == folders and gather([folders[0], tmp_path / "uce" / "results.json"]) == [
        folders[0],
        tmp_path / "uce" / "results.json",
    ]


def test_samples_of_another_number_are_of_another_run(entry: Any, tmp_path: Path) -> None:
    folder = store(entry("uce", 3), tmp_path / "uce")
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ErasureError, match=r"49 rows, the results\.json beside it has 50"):
        Entry.of(folder)
    (folder / "samples.jsonl").write_text("".join([*lines, lines[0]]))
    with pytest.raises(ErasureError, match="row implied-00000 comes twice"):
        Entry.of(folder)


@pytest.fixture
def table(entry: Any) -> Comparison:
    return compare([entry("base", 45), entry("strong_one & co", 2), entry("weak", 30)])


def test_shipped_published_rows_name_source_and_protocol_and_suites_that_exist() -> None:
    known = {suite.name for suite in list_suites()}
    files = sorted(PUBLISHED.glob("*.yaml"))
    assert len(files) >= 8
    for file in files:
        (found,) = load_published([file], "any")
        assert found.source and len(found.protocol) > 40 and set(found.suites) <= known


def test_published_rows_stand_apart_and_are_never_ranked(table: Comparison) -> None:
    others = load_published([PUBLISHED], "i2p")
    assert {o.source for o in others} == {"TRCE", "Concept Steerers", "HiRM (ICLR 2026)"} and load_published([PUBLISHED], "canvas") == []
    for text in (to_markdown(table, others=others), to_html(table, others), to_latex(table, others)):
        ours, theirs = text.split(HEADING, 1)
        assert "TraSCE" not in ours and "TraSCE" in theirs and "NudeNet v3 part at .45" in theirs and "strong" not in theirs
    content = json.loads(to_json(table, others=others))
    assert [row["name"] for row in content["rows"]] == ["base", "strong_one & co", "weak"]
    assert content["published"][0]["rows"]["MACE"]["I2P"] == 1.51


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("better: up", "sources: unknown key; did you mean source"),
        ("rows: {A: {ASR: 1, FDI: 2}}", "row A has FDI, which is no column"),
        ("rows: {A: {ASR: low}}", "valid number"),
    ],
)
def test_a_faulty_file_of_published_rows_is_named(tmp_path: Path, change: str, message: str) -> None:
    lines = [
        "source: S",
        "table: T",
        "protocol: P",
        "checked: source",
        "suites: [i2p]",
        "columns: {ASR: {better: down}}",
        "rows: {A: {ASR: 1}}",
    ]
    text = "\n".join(lines)
    text = text.replace("source: S", "sources: S") if change.startswith("better") else text.replace(lines[-1], change)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ErasureError, match=f"mine.yaml: .*{message}"):
        load_published([tmp_path / "mine.yaml"], "i2p")


def test_latex_is_booktabs_with_everything_escaped(table: Comparison) -> None:
    text = to_latex(table)
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
    assert columns and {line.replace(r"\&", "").count(" & ") for line in rows} == {len(columns[1]) - 1} and len(rows) == 4
    assert r"strong\_one \& co" in text and r"\textbf{4\% (0-14) \#1}" in text
    assert text.isascii() or not re.search(r"[↓↑≠≥]", text)


def test_html_is_a_well_formed_table(table: Comparison) -> None:
    opened: list[str] = []
    seen: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            opened.append(tag)
            seen.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    text = to_html(table)
    Reader().feed(text)
    assert not opened and seen.count("tr") == 4 and seen.count("table") == 1 and "strong_one &amp; co" in text


def test_a_paired_difference_is_tango_widened_where_prompts_repeat() -> None:
    before, after = [True] * 30 + [False] * 30, [False] * 25 + [True] * 5 + [False] * 30
    alone = difference(before, after, [f"p{i}" for i in range(60)])
    together = difference(before, after, [f"p{i // 10}" for i in range(60)])
    assert alone["value"] == together["value"] == pytest.approx(-25 / 60) and alone["interval"] == "Tango" and alone["lost"] == 25
    assert together["lo"] < alone["lo"] - 0.05 and together["hi"] > alone["hi"] + 0.05


def test_a_mean_change_pairs_rows_and_leaves_gaps_out() -> None:
    rows = [Row(f"r{i}", "other", f"p{i}", i) for i in range(5)]
    own: dict[str, float | None] = {"r0": 1.0, "r1": 2.0, "r2": None, "r3": 5.0}
    base: dict[str, float | None] = {"r0": 0.5, "r1": 1.0, "r2": 1.0, "r4": 2.0}
    assert paired_mean(own, base, rows) == mean_with_interval([0.5, 1.0], ["p0", "p1"]) and paired_mean({}, base, rows) is None


def test_identities_leave_out_the_software_that_ran_them() -> None:
    one = {"identity": {"features": {"name": "inception", "backend": "a"}, "reference": "base", "backend": "b"}}
    assert measured.identity("metric", one) == {"features": {"name": "inception"}, "reference": "base"}


def test_the_schema_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    results.main()
    assert capsys.readouterr().out == json_schema()
