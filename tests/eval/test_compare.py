import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from erasure.errors import ErasureError
from erasure.eval.columns import COLUMNS, GROUPS
from erasure.eval.compare import Comparison, Entry, Line, compare
from erasure.eval.score import write_samples
from erasure.eval.suite import Suite, load_suite
from erasure.eval.summary import write_results
from erasure.eval.tables import to_csv, to_json, to_markdown, to_rich


@pytest.fixture(scope="module")
def ranked() -> Suite:
    return load_suite("canvas")


@pytest.fixture(scope="module")
def entries(make_entry: Any, ranked: Suite) -> list[Entry]:
    base = make_entry(ranked, "base", 0.95, 0.95)
    methods = [
        make_entry(ranked, name, target, kept, base.samples)
        for name, target, kept in (("strong", 0.02, 0.93), ("twin", 0.03, 0.94), ("blunt", 0.01, 0.5), ("negative_prompt", 0.7, 0.94))
    ]
    return [*methods, base]


def lines(table: Comparison) -> dict[str, Line]:
    return {line.name: line for line in table.lines}


def test_the_base_comes_first_and_the_negative_prompt_second(entries: list[Entry]) -> None:
    assert [line.name for line in compare(entries).lines] == ["base", "negative_prompt", "strong", "twin", "blunt"]


def test_methods_that_no_test_tells_apart_share_a_rank(entries: list[Entry]) -> None:
    ranks = {name: line.ranks for name, line in lines(compare(entries)).items()}
    assert ranks["base"] == {}
    assert [ranks[name]["named"] for name in ("strong", "twin", "blunt", "negative_prompt")] == [1, 1, 1, 4]
    assert [ranks[name]["kept"] for name in ("strong", "twin", "negative_prompt", "blunt")] == [1, 1, 1, 4]


def test_the_bar_needs_both_sides(entries: list[Entry]) -> None:
    found = lines(compare(entries))
    assert {name: line.bar_met for name, line in found.items()} == {
        "base": None,
        "negative_prompt": False,
        "strong": True,
        "twin": True,
        "blunt": False,
    }


def test_a_small_suite_ranks_nobody(make_entry: Any, demo: Suite) -> None:
    base = make_entry(demo, "base", 0.95, 0.95)
    table = compare([base, *(make_entry(demo, name, share, 0.95, base.samples) for name, share in (("good", 0.0), ("bad", 0.9)))])
    assert all(line.ranks == {} for line in table.lines) and "Too few images" in to_markdown(table)


def test_another_protocol_suite_or_concept_is_marked_and_not_ranked(entries: list[Entry], make_entry: Any, ranked: Suite) -> None:
    other = ranked.under(steps=10)
    strange = make_entry(other, "strange", 0.0, 1.0, make_entry(other, "base", 0.95, 0.95).samples)
    limited = make_entry(ranked.limited(40), "limited", 0.0, 1.0)
    found = lines(compare([*entries, strange, limited]))
    assert found["strange"].verdict == "≠ other protocol" and found["limited"].verdict == "≠ other suite"
    assert found["strange"].ranks == found["limited"].ranks == {} and found["strong"].ranks["named"] == 1


def test_a_destroyed_model_is_neither_ranked_nor_passed(entries: list[Entry], make_entry: Any, ranked: Suite) -> None:
    noise = make_entry(ranked, "noise", 0.0, 0.95, entries[-1].samples, unrecognised=0.3)
    line = lines(compare([*entries, noise]))["noise"]
    assert line.destroyed and line.ranks == {} and line.verdict == "destroyed" and line.bar_met is False


def test_results_without_samples_are_shown_and_not_ranked(entries: list[Entry]) -> None:
    table = compare([entry.results for entry in entries])
    assert len(table.lines) == 5 and not any(line.ranks for line in table.lines)


def test_results_are_read_from_folders_with_their_samples(tmp_path: Path, entries: list[Entry]) -> None:
    for entry in entries:
        (tmp_path / entry.name).mkdir()
        write_results(tmp_path / entry.name / "results.json", entry.results)
        write_samples(tmp_path / entry.name / "samples.jsonl", entry.samples or [])
    table = compare([tmp_path / entry.name for entry in entries])
    assert to_json(table) == to_json(compare(entries))
    with pytest.raises(ErasureError, match="run `erasure evaluate` first"):
        Entry.of(tmp_path / "nowhere")
    with pytest.raises(ErasureError, match="nothing to compare"):
        compare([])


def test_every_format_shows_the_same_numbers(entries: list[Entry]) -> None:
    table = compare(entries)
    strong = lines(table)["strong"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(to_rich(table))
    text, markdown = console.export_text(), to_markdown(table)
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(to_csv(table)))}
    loaded = {row["name"]: row for row in json.loads(to_json(table))["rows"]}
    named = strong.entry.results["erased"]["named"]
    three = "/".join(f"{100 * named[call]['rate']:.0f}" for call in ("target_present", "other_present", "unrecognised")) + "%"
    assert three in text and three in markdown and "n=200" in text and "n=200" in markdown
    assert float(rows["strong"]["named"]) == loaded["strong"]["cells"]["named"]["value"] == named["target_present"]["rate"]
    assert float(rows["strong"]["kept_difference_lo"]) == strong.entry.results["kept"]["all"]["difference"]["lo"]
    assert rows["base"]["kept_difference"] == "" and loaded["strong"]["bar_met"] is True


def test_a_markdown_table_has_as_many_cells_in_every_line(entries: list[Entry]) -> None:
    body = [line for line in to_markdown(compare(entries)).splitlines() if line.startswith("|")]
    assert len(body) == 7 and len({line.count("|") for line in body}) == 1


def test_every_column_is_explained_and_grouped_once() -> None:
    assert [key for _, keys in GROUPS for key in keys] == [column.key for column in COLUMNS]
    assert all(column.help.endswith(".") and len(column.help) > 15 for column in COLUMNS)
