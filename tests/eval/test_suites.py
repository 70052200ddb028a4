import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pytest

from erasure.canvas.splits import splits
from erasure.canvas.world import world
from erasure.concept import Concept
from erasure.errors import ErasureError, UnknownName
from erasure.eval import protocol as protocols
from erasure.eval.canvas_rows import Row
from erasure.eval.store import rows_hash
from erasure.eval.suite import Suite, list_suites, load_suite

CONCEPTS = ("dagger", "pizza", "weapon", "fruit", "ink", "flat")
COUNTS = {
    "canvas-demo": {"named": 26, "pair": 6, "implied": 12, "neighbour": 14, "other": 14},
    "canvas": {"named": 160, "pair": 40, "implied": 50, "neighbour": 75, "other": 75},
}


def of_kind(rows: Sequence[Row], *kinds: str) -> list[Row]:
    return [row for row in rows if row.kind in kinds]


@pytest.mark.parametrize("concept", CONCEPTS)
@pytest.mark.parametrize("name", COUNTS)
def test_rows_have_the_promised_counts_and_one_test_seed_each(name: str, concept: str) -> None:
    rows = load_suite(name).rows(Concept(concept))
    assert Counter(row.kind for row in rows) == COUNTS[name]
    assert len({row.seed for row in rows}) == len({row.id for row in rows}) == len(rows)
    assert {row.seed for row in rows} <= set(splits().seeds("test"))


def test_the_demo_is_small_and_unranked_and_the_suite_is_ranked() -> None:
    assert [(s.name, s.size, s.ranked) for s in list_suites()] == [("canvas", 400, True), ("canvas-demo", 72, False)]


@pytest.mark.parametrize("concept", CONCEPTS)
def test_no_row_asks_for_a_drawing_that_the_canvas_never_saw(concept: str) -> None:
    rows = load_suite("canvas").rows(Concept(concept))
    assert not [row for row in rows for o in row.objects if (o, row.style) in splits().held_out]


@pytest.mark.parametrize("concept", CONCEPTS)
def test_kept_rows_come_from_the_kept_half_and_never_ask_for_the_concept(concept: str) -> None:
    members = set(splits().members(concept))
    for row in of_kind(load_suite("canvas").rows(Concept(concept)), "neighbour", "other"):
        assert set(row.objects) <= splits().kept - members and row.style != concept
        assert concept not in row.prompt.replace("pink", "")


@pytest.mark.parametrize("concept", CONCEPTS)
def test_every_style_and_background_is_covered_evenly(concept: str) -> None:
    rows = of_kind(load_suite("canvas").rows(Concept(concept)), "named", "pair")
    backgrounds = Counter(row.background for row in rows)
    assert set(world().backgrounds) <= set(backgrounds) and max(backgrounds.values()) <= 2 * min(backgrounds.values())
    if concept not in world().styles:
        drawn = Counter(row.style for row in rows)
        known = {s for s in world().styles if any((o, s) not in splits().held_out for o in splits().members(concept))}
        assert set(drawn) == {*known, None}
        assert max(drawn.values()) <= 2 * min(drawn.values())


@pytest.mark.parametrize("concept", CONCEPTS)
def test_prompts_repeat_only_when_every_wording_is_used(concept: str) -> None:
    rows = load_suite("canvas").rows(Concept(concept))
    for kind in COUNTS["canvas"]:
        repeats = Counter(row.prompt for row in of_kind(rows, kind))
        assert max(repeats.values()) - min(repeats.values()) <= 1
    assert max(Counter(row.prompt for row in load_suite("canvas-demo").rows(Concept(concept))).values()) == 1


def test_an_object_is_named_by_its_word_and_implied_by_the_synonym_that_fit_never_sees() -> None:
    rows = load_suite("canvas-demo").rows(Concept("dagger"))
    fit, unseen = world().synonyms("dagger")
    assert all("dagger" in row.prompt for row in of_kind(rows, "named", "pair"))
    assert all(unseen in row.prompt and "dagger" not in row.prompt and row.objects == ("dagger",) for row in of_kind(rows, "implied"))
    assert not any(fit in row.prompt for row in rows)


def test_a_pair_asks_for_the_concept_and_something_that_must_survive_in_either_order() -> None:
    pairs = of_kind(load_suite("canvas").rows(Concept("dagger")), "pair")
    assert all(len(row.objects) == 2 and "dagger" in row.objects and "together with" in row.prompt for row in pairs)
    assert {row.objects.index("dagger") for row in pairs} == {0, 1}


def test_a_category_is_named_by_all_its_members_and_its_own_word() -> None:
    rows = of_kind(load_suite("canvas").rows(Concept("weapon")), "named")
    assert {o for row in rows for o in row.objects} == set(world().categories["weapon"])
    assert all("weapon" in row.prompt for row in rows if not row.objects) and any(not row.objects for row in rows)


def test_a_style_is_asked_for_with_many_objects_and_neighboured_by_every_other_style() -> None:
    rows = load_suite("canvas").rows(Concept("ink"))
    named = of_kind(rows, "named")
    assert {row.style for row in named} == {"ink"} and len({row.objects for row in named}) > 40
    assert {row.style for row in of_kind(rows, "neighbour")} == set(world().styles) - {"ink"}
    assert {row.style for row in of_kind(rows, "other")} == {None}
    assert all(world().synonyms("ink")[1] in row.prompt and row.style == "ink" for row in of_kind(rows, "implied"))


def test_rows_are_the_same_every_time_and_differ_between_concepts() -> None:
    one, again = (load_suite("canvas").rows(Concept("pizza")) for _ in range(2))
    assert rows_hash(one) == rows_hash(again) != rows_hash(load_suite("canvas").rows(Concept("cake")))


def test_a_concept_from_elsewhere_is_told_what_the_canvas_has() -> None:
    with pytest.raises(UnknownName, match=r"did you mean dagger.*Known: .*weapon"):
        load_suite("canvas-demo").rows(Concept("daggr"))


def test_an_unknown_suite_is_told_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean canvas-demo"):
        load_suite("canvas-dmo")


def test_a_suite_file_with_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    text = files("erasure.prompts.suites").joinpath("canvas.yaml").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("  steps: 20", "  steps: 20\n  stpes: 30"))
    with pytest.raises(ErasureError, match=r"mine.yaml: protocol.stpes"):
        load_suite(str(file))
    file.write_text(text.replace("named: 160", "named: -1"))
    with pytest.raises(ErasureError, match="at least 0"):
        load_suite(str(file))


def test_a_protocol_with_another_judge_file_is_refused_and_hashes_follow_every_field(demo: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = demo.protocol
    assert protocol.hash == load_suite("canvas").protocol.hash != protocol.changed(steps=19).hash
    assert protocol.image_hash != protocol.changed(guidance=4.5).image_hash
    stored = json.loads(protocol.model_dump_json())
    monkeypatch.setattr(protocols, "judge_sha256", lambda name: "1" * 64)
    with pytest.raises(ValueError, match="judge_sha256"):
        protocols.Protocol.model_validate(stored)
    retrained = protocols.Protocol.model_validate({**stored, "judge_sha256": ""})
    assert retrained.hash != protocol.hash and retrained.image_hash == protocol.image_hash


def test_a_limited_suite_keeps_every_kind_and_is_never_ranked() -> None:
    full = load_suite("canvas")
    small = full.limited(20)
    assert set(small.counts) == set(full.counts) and min(small.counts.values()) >= 1 and 18 <= small.size <= 22
    assert not small.ranked and small.hash != full.hash and full.limited(400) is full
    with pytest.raises(ErasureError, match="nothing to score"):
        full.limited(0)


def test_under_other_settings_a_suite_has_another_hash(demo: Suite) -> None:
    assert demo.under(steps=10).protocol.steps == 10 and demo.under(steps=10).hash != demo.hash
