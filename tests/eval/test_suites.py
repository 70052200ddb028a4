import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from erasure.canvas.splits import splits
from erasure.canvas.world import world
from erasure.concept import Concept, load
from erasure.errors import ErasureError, UnknownName
from erasure.eval import protocol as protocols
from erasure.eval.filters import suggests_a_minor
from erasure.eval.rows import Row
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
    on_canvas = [(s.name, s.size, s.ranked) for s in list_suites() if s.source == "canvas"]
    assert on_canvas == [("canvas", 400, True), ("canvas-demo", 72, False)]


def test_what_prompt_suites_added_leaves_the_identity_of_canvas_results_alone() -> None:
    """Computed before there was any other suite, with the judge's hash of the fixture; stored results carry such hashes."""
    frozen = {"canvas": ("dddb848e3564952a", "65cb1aed57bc4c6e"), "canvas-demo": ("d21d32af5be1f5a3", "4fcc6668048ce802")}
    for name, (suite, rows) in frozen.items():
        assert (load_suite(name).hash, rows_hash(load_suite(name).rows(Concept("dagger")))) == (suite, rows)


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
    assert set(small.counts) == set(full.counts) and min(small.counts.values()) >= 1 and 18 <= (small.size or 0) <= 22
    assert not small.ranked and small.hash != full.hash and full.limited(400) is full
    with pytest.raises(ErasureError, match="nothing to score"):
        full.limited(0)


def test_under_other_settings_a_suite_has_another_hash(demo: Suite) -> None:
    assert demo.under(steps=10).protocol.steps == 10 and demo.under(steps=10).hash != demo.hash


PROMPT_SUITES = [s.name for s in list_suites() if s.source == "prompts"]
UNPINNED = {"mma-diffusion", "p4d", "ring-a-bell-nudity", "safesora"}
"""Sets whose files nobody who wrote the suites could see: gated, or on the hub alone."""


@pytest.mark.parametrize("name", PROMPT_SUITES)
def test_a_shipped_prompt_suite_is_pinned_counted_and_safe(name: str) -> None:
    suite = load_suite(name)
    assert suite.prompts is not None and suite.name == name
    source = suite.prompts.source
    if source is not None:
        assert source.pinned == bool(suite.counts) == (name not in UNPINNED)
        assert all(file.sha256 and file.rows for file in source.files) or name in UNPINNED
        assert sum(suite.counts.values()) <= (source.rows or 0) * suite.prompts.images_per_prompt
    assert suite.prompts.content == "benign" or "no_minors" in suite.prompts.filters
    assert suite.prompts.licence and (suite.concept is None or load(suite.concept))


@pytest.mark.parametrize("name", [n for n in PROMPT_SUITES if not load_suite(n).asks_concept])
def test_the_sample_of_a_suite_has_its_columns_and_never_its_name_or_rank(name: str) -> None:
    suite = load_suite(name)
    sample = suite.sample()
    loaded = sample.load(suite.default_concept())
    assert suite.prompts is not None and loaded.rows
    assert sample is suite or (sample.hash != suite.hash and sample.name == f"{name}-sample" and not sample.ranked)
    kinds = set(suite.counts) or {row.kind for row in loaded.rows}
    assert {row.kind for row in loaded.rows} == kinds
    columns = suite.prompts.columns
    assert all(
        (row.guidance is not None) == bool(columns.guidance) and (row.height is not None) == bool(columns.height) for row in loaded.rows
    )
    assert any(row.categories for row in loaded.rows) or not columns.category
    assert {key for row in loaded.rows for key in row.about} >= set(columns.keep)


def test_our_neutral_captions_are_varied_and_about_nobody() -> None:
    rows = load_suite("neutral").rows(Concept("anything"))
    assert len({row.prompt for row in rows}) == len({row.seed for row in rows}) == len(rows) == 120
    assert set(Counter(row.categories for row in rows).values()) == {10}
    assert all(row.prompt[0].islower() and not suggests_a_minor(row.prompt, "sexual") for row in rows)


def test_a_limited_prompt_suite_spreads_over_the_file_and_kinds() -> None:
    mini = load_suite("unlearncanvas-mini")
    small = mini.limited(12)
    rows = small.rows(Concept("Dogs"))
    assert Counter(row.kind for row in rows) == {"named": 3, "neighbour": 9} and len({row.about["style"] for row in rows}) >= 4
    assert (small.size, small.ranked) == (12, False) and len({small.hash, mini.hash, mini.limited(13).hash}) == 3
    assert mini.limited(500) is mini


def test_what_the_protocol_is_told_goes_before_what_rows_say() -> None:
    i2p = load_suite("i2p").sample()
    assert {row.guidance for row in i2p.rows(Concept("x"))} >= {7.0, 10.0, 12.0}
    told = i2p.under(guidance=5.0)
    assert {row.guidance for row in told.rows(Concept("x"))} == {None} and told.protocol.guidance == 5.0 and told.hash != i2p.hash
    assert {row.width for row in told.rows(Concept("x"))} == {512, 384}
    assert {row.guidance for row in i2p.under(steps=5).rows(Concept("x"))} >= {7.0, 10.0}


def test_a_flow_model_gets_the_protocol_for_its_sort() -> None:
    class FlowMatchSomething:
        config: ClassVar[dict[str, Any]] = {}

    i2p = load_suite("i2p").sample()
    fitted = i2p.fitting(SimpleNamespace(scheduler=FlowMatchSomething()))
    assert fitted.protocol.scheduler == "FlowMatchEulerDiscreteScheduler" and fitted.protocol.height == 1024 and fitted.hash != i2p.hash
    assert {(row.guidance, row.width) for row in fitted.rows(Concept("x"))} == {(None, None)}
    assert i2p.fitting(SimpleNamespace(scheduler=SimpleNamespace())) is i2p


def test_suites_name_recipes_and_metrics_that_exist() -> None:
    from erasure.eval.metrics import metrics
    from erasure.eval.recipes import load_recipe

    for suite in map(load_suite, PROMPT_SUITES):
        assert {load_recipe(recipe).name for recipe in suite.recipes} == set(suite.recipes)
        assert set(suite.metrics) <= set(metrics.names())
