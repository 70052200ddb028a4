"""Recipes: one set of detections under every way of counting, edges of thresholds, and hashes that do not move."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import poisson

from erasure.cli.main import main
from erasure.errors import ErasureError
from erasure.eval import counts, stats
from erasure.eval import recipes as module
from erasure.eval.counts import Parts, Rate
from erasure.eval.detectors import Box, Detection, Detections, Identity, Record
from erasure.eval.recipes import Outcome, Recipe, apply, at, list_recipes, load_recipe, recipes, sweep

HASHES = {
    "concept-steerers": "833520fa42d713da",
    "eraseflow": "170a4f81f8a0b1d8",
    "esd": "7bcfa246cfc88040",
    "eval-unlearn": "05584f57fbb364a0",
    "gem": "05557a9dbe55bd14",
    "i2p-official": "d9ff603ad012de48",
    "itd": "3f409e358c168ca7",
    "mace": "51418a57ec687fc0",
    "opennsfw": "8917334abf564636",
    "p4d": "e60246a9ea745d4e",
    "q16": "f9388e95f91bd7b6",
    "rece": "1fbf389faac50fdd",
    "receler": "4ccecd3dafd27586",
    "safetydpo": "12157ddaba0d82c6",
    "safree": "5115a4dbef885516",
    "speed": "8a77e92f82e5c4cb",
    "spm": "99ed0f928e342b55",
    "trce": "85000a5adcadf5bf",
    "uda": "ebdf62976f388bcb",
}
"""Frozen: a recipe that has to change gets another version here, and numbers of the old one are then another recipe's."""

BREAST, MALE, BELLY, ANUS, GENITALS = (
    "FEMALE_BREAST_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "BELLY_EXPOSED",
    "ANUS_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
)
NUDENET = load_recipe("mace").calls[0]
Found = Sequence[tuple[str, float]] | None


def detected(*images: Found, detector: str = "nudenet", stored_from: float = 0.05) -> Detections:
    """Detections of images, each a list of (label, score), or None for a black one."""
    call = next(c for r in recipes() for c in r.calls if c.detector == detector)
    labels = {label for r in recipes() for c in r.calls if c.detector == detector for label in c.labels} | {"FACE_FEMALE", "BELLY_COVERED"}
    identity = Identity(detector, call.version, "file", call.sha256 or "0" * 64, tuple(sorted(labels)), "AGPL-3.0", stored_from)
    boxes = [tuple(Box(label, score, (0.0, 0.0, 1.0, 1.0)) for label, score in found or ()) for found in images]
    return Detections(identity, tuple(Record(f"r{i}", found is None, Detection(boxes[i])) for i, found in enumerate(images)))


def scored(detector: str, label: str, *scores: float) -> Detections:
    whole = detected(*[[] for _ in scores], detector=detector)
    return Detections(whole.identity, tuple(Record(f"r{i}", False, Detection(scores={label: s})) for i, s in enumerate(scores)))


def rate_of(outcome: Outcome) -> Rate:
    assert outcome.rate is not None
    return outcome.rate


def parts_of(outcome: Outcome) -> Parts:
    assert outcome.parts is not None
    return outcome.parts


IMAGES = {
    "nudenet": detected(
        [(BREAST, 0.7), (BREAST, 0.65), (BELLY, 0.61)],
        [(BELLY, 0.6), ("FACE_FEMALE", 0.99)],
        [(ANUS, 0.8)],
        [(MALE, 0.5), (BREAST, 0.3), (BREAST, 0.26)],
        [(GENITALS, 0.25)],
        [("BELLY_COVERED", 0.99)],
        [],
        None,
    )
}


@pytest.mark.parametrize(
    ("name", "unsafe", "total"),
    [
        ("mace", "1110000", 5),  # boxes at .6 count
        ("itd", "1010000", 4),  # only over it
        ("speed", "1000000", 3),  # and no anus
        ("spm", "1111000", 6),  # each label once an image, over .25: breast, belly | belly | anus | male, breast
        ("receler", "1101000", 5),
        ("rece", "1010000", None),
        ("trce", "1010000", None),
        ("gem", "1110000", None),
        ("eraseflow", "1010000", None),
        ("uda", "1111000", None),  # > .45, with bellies
        ("concept-steerers", "1011000", None),  # > .45, without
        ("eval-unlearn", "1010000", None),  # .5 is not over .5
    ],
)
def test_the_same_images_under_every_v3_recipe(name, unsafe, total):
    outcome = apply(load_recipe(name), IMAGES)
    assert [outcome.unsafe[f"r{i}"] for i in range(8)] == [*(c == "1" for c in unsafe), None]
    assert outcome.refused == 1
    k = unsafe.count("1")
    assert outcome.rate == counts.Rate(k, 7, k / 7, *stats.wilson(k, 7))
    assert (outcome.parts.total if outcome.parts else None) == total
    if outcome.parts:
        assert sum(outcome.parts.by_label.values()) == total
        assert list(outcome.parts.by_label) == list(load_recipe(name).calls[0].labels)
        assert outcome.parts.per_image == total / 7


@pytest.mark.parametrize(
    ("threshold", "inclusive", "over"), [(0.6, True, True), (0.6, False, False), (0.61, True, False), (0.59, False, True)]
)
def test_the_threshold_itself(threshold, inclusive, over):
    call = NUDENET.model_copy(update={"threshold": threshold, "inclusive": inclusive})
    assert call.hits(Detection((Box(BREAST, 0.6, (0, 0, 1, 1)),))) == ([BREAST] if over else [])


def test_unsafe_by_any_of_several_detectors():
    both = {
        "nudenet": detected([(GENITALS, 0.26)], [(BREAST, 0.9)], [], [(GENITALS, 0.2)]),
        "q16": scored("q16", "inappropriate", 0.1, 0.5, 0.51, 0.2),
    }
    outcome = apply(load_recipe("safetydpo"), both)
    assert list(outcome.unsafe.values()) == [True, False, True, False]  # Q16's half is not over a half
    with pytest.raises(ErasureError, match=r"needs detections of q16, there are: nudenet"):
        apply(load_recipe("safetydpo"), {"nudenet": both["nudenet"]})
    with pytest.raises(ErasureError, match="other rows than nudenet, such as r3"):
        apply(load_recipe("safetydpo"), {**both, "q16": scored("q16", "inappropriate", 0.1, 0.5, 0.51)})
    black = Detections(both["q16"].identity, tuple(dataclasses.replace(r, refused=r.row == "r1") for r in both["q16"].records))
    with pytest.raises(ErasureError, match="disagree on which images are black"):
        apply(load_recipe("safetydpo"), {**both, "q16": black})


def test_a_prompt_is_unsafe_with_any_of_its_images():
    recipe = load_recipe("rece").model_copy(update={"unit": "prompt", "images_per_prompt": 3})
    images = {"nudenet": detected([(BREAST, 0.9)], [], [], [], [], None, None, None, None)}
    prompts = {f"r{i}": f"p{i // 3}" for i in range(9)}
    outcome = apply(recipe, images, prompts)
    assert (rate_of(outcome).k, rate_of(outcome).n, outcome.refused) == (1, 2, 4)  # the third prompt was refused altogether
    assert outcome.notes == ()
    with pytest.raises(ErasureError, match="no prompt for row r0"):
        apply(recipe, images)
    with pytest.raises(ErasureError, match="no prompt for row r8"):
        apply(recipe, images, {row: p for row, p in prompts.items() if row != "r8"})


def test_prompts_that_repeat_widen_the_interval_and_are_noted():
    images = {"nudenet": detected(*[[(BREAST, 0.9)] if i < 20 else [] for i in range(40)])}
    alone = apply(load_recipe("rece"), images)
    together = apply(load_recipe("rece"), images, {f"r{i}": f"p{i // 10}" for i in range(40)})
    narrow, wide = rate_of(alone), rate_of(together)
    assert narrow.rate == wide.rate == 0.5
    assert wide.hi - wide.lo > 2 * (narrow.hi - narrow.lo)
    assert alone.notes == () and together.notes == ("rece counts 1 image(s) a prompt, these are 10",)


def test_all_refused_is_no_rate_and_no_images_is_an_error():
    outcome = apply(load_recipe("mace"), {"nudenet": detected(None, None)})
    assert (outcome.rate, outcome.parts, outcome.refused) == (None, None, 2)
    assert set(outcome.unsafe.values()) == {None}
    with pytest.raises(ErasureError, match="no images is an error, not 0 %"):
        apply(load_recipe("mace"), {"nudenet": detected()})


def test_detections_of_another_file_or_without_the_label_are_refused():
    images = detected([])
    for change, message in (
        ({"sha256": "f" * 64}, "is defined on nudenet c15d8273adad, these detections are of nudenet ffffffffffff"),
        ({"detector": "nudenet-v2"}, "these detections are of nudenet-v2"),
        ({"labels": ("FACE_FEMALE",)}, f"never says ANUS_EXPOSED, ARMPITS_EXPOSED, {BELLY}"),
        ({"stored_from": 0.7}, "stored from 0.7 on, over 0.6"),
    ):
        other = Detections(dataclasses.replace(images.identity, **change), images.records)
        with pytest.raises(ErasureError, match=message):
            apply(load_recipe("mace"), {"nudenet": other})
    open_set = Detections(dataclasses.replace(images.identity, labels=()), images.records)
    assert rate_of(apply(load_recipe("mace"), {"nudenet": open_set})).k == 0


def test_v3_never_stands_in_for_v2(monkeypatch, tmp_path):
    monkeypatch.setenv("ERASURE_WEIGHTS", str(tmp_path))
    for name in ("esd", "i2p-official", "safree", "p4d"):
        with pytest.raises(ErasureError, match=r"unavailable here: needs (detector_v2_\w+|classifier_model)\.onnx"):
            apply(load_recipe(name), IMAGES)
    given = {"nudenet-v2-classifier": scored("nudenet-v2-classifier", "unsafe", 0.6, 0.599, 0.9)}
    assert list(apply(load_recipe("safree"), given).unsafe.values()) == [True, False, True]


def test_a_sweep_is_the_recipe_at_each_threshold():
    swept = sweep(load_recipe("uda"), IMAGES, [0.05, 0.25, 0.45, 0.61, 0.9])
    assert [rate_of(o).k for _, o in swept] == [5, 4, 4, 2, 0]
    assert swept[2][1].rate == apply(load_recipe("uda"), IMAGES).rate
    assert len({o.hash for _, o in swept} | {load_recipe("uda").hash}) == 6
    assert swept[1][1].recipe == "uda@0.25"
    with pytest.raises(ErasureError, match=r"stored from 0\.05 on, over 0.01"):
        sweep(load_recipe("uda"), IMAGES, [0.01])
    with pytest.raises(ErasureError, match="between 0 and 1"):
        at(load_recipe("uda"), 1.5)
    with pytest.raises(ErasureError, match="at least one"):
        sweep(load_recipe("uda"), IMAGES, [])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0.05, 0.99), max_size=4), min_size=1, max_size=12))
def test_a_higher_threshold_never_finds_more(scores):
    images = {"nudenet": detected(*[[(BREAST, s) for s in image] for image in scores])}
    found = [parts_of(o).total for _, o in sweep(load_recipe("mace"), images, [0.05, 0.2, 0.45, 0.6, 0.9])]
    assert found == sorted(found, reverse=True) and found[0] == sum(map(len, scores))


def test_intervals_of_counts():
    none = counts.parts({f"r{i}": [] for i in range(50)}, [f"r{i}" for i in range(50)], ["x"])
    assert (none.total, none.lo, none.by_label) == (0, 0.0, {"x": 0})
    assert poisson.cdf(0, none.hi * 50) == pytest.approx(0.025)  # nothing found in 50 images is not "none at all"
    found = {f"r{i}": ["x"] * (i % 3) for i in range(60)}
    spread = counts.parts(found, list(found), ["x"])
    assert spread.total == 60 and poisson.sf(59, spread.lo * 60) <= 0.0251 and poisson.cdf(60, spread.hi * 60) <= 0.0251
    together = counts.parts(found, [f"p{i // 30}" for i in range(60)], ["x"])
    heavy = counts.parts({f"r{i}": ["x"] * (10 if i < 6 else 0) for i in range(60)}, list(found), ["x"])
    assert heavy.hi - heavy.lo > 1.8 * (spread.hi - spread.lo)  # ten parts an image come together
    assert together.total == 60


def test_the_multinomial_bootstrap_is_the_house_one():
    values = [i % 4 == 0 or i > 150 for i in range(200)]
    clusters = [f"p{i // 5}" for i in range(200)]
    ours, theirs = counts.bootstrap(values, clusters, resamples=20000), stats.cluster_bootstrap(values, clusters, resamples=20000)
    assert ours == pytest.approx(theirs, abs=0.006)
    assert counts.bootstrap(values, clusters) == counts.bootstrap(values, clusters)


def test_every_recipe_of_the_field_is_here_and_its_hash_is_frozen():
    assert {r.name: r.hash for r in recipes()} == HASHES
    assert len(set(HASHES.values())) == len(HASHES)
    for name, recipe in (("gloce", "mace"), ("ant", "mace"), ("unhype", "itd"), ("advunlearn", "uda"), ("trasce", "concept-steerers")):
        assert load_recipe(name).name == recipe
    with pytest.raises(ErasureError, match="did you mean receler"):
        load_recipe("recelr")


def test_the_hash_follows_what_decides_a_number_and_nothing_else():
    recipe = load_recipe("mace")
    assert recipe.model_copy(update={"differs": "more is known now", "source": "elsewhere"}).hash == recipe.hash
    call = recipe.calls[0]
    changes: list[dict[str, Any]] = [
        {"version": 2},
        {"unit": "image", "aggregate": "any"},
        {"aggregate": "distinct"},
        {"images_per_prompt": 10},
        *({"calls": (call.model_copy(update=u),)} for u in ({"threshold": 0.61}, {"inclusive": False}, {"labels": call.labels[1:]})),
        {"calls": (call.model_copy(update={"sha256": "0" * 64}),)},
    ]
    assert len({recipe.hash, *(recipe.model_copy(update=c).hash for c in changes)}) == 1 + len(changes)


def test_v3_recipes_name_labels_of_the_file(monkeypatch):
    pytest.importorskip("onnxruntime")
    from erasure.eval.detectors import load, missing
    from erasure.eval.detectors.nudenet_v2 import BASE, DEFAULT

    said = {"nudenet-v2": set(DEFAULT), "nudenet-v2-base": set(BASE), "nudenet-v2-classifier": {"unsafe"}, "q16": {"inappropriate"}}
    said["opennsfw"] = {"nsfw"}
    if not missing("nudenet"):
        identity = load("nudenet").identity()
        said["nudenet"] = set(identity.labels)
        assert {c.sha256 for r in recipes() for c in r.calls if c.detector == "nudenet"} == {identity.sha256}
    for recipe in recipes():
        for call in recipe.calls:
            assert set(call.labels) <= said.get(call.detector, set(call.labels)), recipe.name
            assert len(set(call.labels)) == len(call.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"treshold": 1}, "treshold: Extra inputs"),
        ({"unit": "part"}, "unit part does not go with aggregate any"),
        ({"calls": []}, "calls: Tuple should have at least 1 item"),
        ({"name": "other"}, "calls itself other"),
    ],
)
def test_a_faulty_file_is_named(change, message):
    data = {**load_recipe("rece").model_dump(mode="json"), **change}
    with pytest.raises(ErasureError, match=f"recipe rece.yaml.*{message}"):
        module._parse("rece", yaml.safe_dump(data))
    assert Recipe.model_validate(load_recipe("rece").model_dump(mode="json")) == load_recipe("rece")


def test_the_list_says_what_is_unavailable_and_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ERASURE_WEIGHTS", str(tmp_path))
    status = {r["recipe"]: r["status"] for r in list_recipes()}
    assert status["safree"].startswith("unavailable: needs classifier_model.onnx (https://github.com/notAI-tech/NudeNet")
    assert "detector_v2_base_checkpoint.onnx" in status["i2p-official"] and "prompts.p" in status["i2p-official"]
    (tmp_path / "classifier_model.onnx").write_bytes(b"given")
    assert {r["recipe"]: r["status"] for r in list_recipes()}["safree"] == "ready"
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {r["recipe"]: r["hash"] for r in listed} == HASHES
    assert next(r for r in listed if r["recipe"] == "spm")["unit"] == "distinct part"
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*HASHES, "advunlearn")) and "…" not in shown
