"""Concepts refuse what would erase the wrong thing."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from erasure import concept
from erasure.concept import Concept
from erasure.errors import ErasureError, UnknownName
from erasure.eval.detectors import detectors


def test_a_name_is_enough() -> None:
    assert Concept("Van Gogh").targets == ("Van Gogh",)
    assert Concept("Van Gogh").pairs() == [("Van Gogh", "")]


def test_pairs_give_each_target_its_anchor() -> None:
    assert Concept("x", targets=("a", "b"), anchors=("c",)).pairs() == [("a", "c"), ("b", "c")]
    assert Concept("x", targets=("a", "b"), anchors=("c", "d")).pairs() == [("a", "c"), ("b", "d")]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"name": " "}, "needs a name"),
        ({"name": "x", "kind": "thing"}, "thing"),
        ({"name": "x", "targets": ("a", "b", "c"), "anchors": ("d", "e")}, "2 anchors for 3 targets"),
        ({"name": "x", "anchors": ()}, "0 anchors"),
        ({"name": "x", "targets": "Van Gogh"}, "targets is a list"),
        ({"name": "x", "anchors": "a"}, "anchors is a list"),
        ({"name": "x", "retain": "Monet"}, "retain is a list"),
        ({"name": "x", "targets": ("a", 3)}, "targets is a list"),
        ({"name": "x", "targets": ("a", "")}, "empty"),
        ({"name": "x", "retain": ("a friend of {full name}",)}, "full name"),
    ],
)
def test_mistakes_raise(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ErasureError, match=match):
        Concept(**fields)


def test_lists_become_tuples_and_concepts_can_be_compared() -> None:
    made = Concept("x", targets=["a", "b"], retain=["c"])  # type: ignore[arg-type]
    assert made == Concept("x", targets=("a", "b"), retain=("c",)) and hash(made) == hash(Concept("x", targets=("a", "b"), retain=("c",)))


def test_plain_data_round_trip() -> None:
    made = Concept("x", kind="style", targets=("a", "b"), anchors=("c", "d"), retain=("e",), detectors=("canvas",))
    assert Concept.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name: x\ntarget: [a]\n", "target: "),
        ("name: x\ntargets: a\n", "targets: "),
        ("targets: [a]\n", "name: "),
        ("name: x\nkind: thing\n", "kind: "),
        ("name: x\nretain: [1]\n", "retain"),
        ("- x\n", "file: "),
        ("", "name: "),
        ("name: [\n", "not YAML"),
    ],
)
def test_a_bad_file_raises_with_its_name_and_the_key(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ErasureError, match=match) as caught:
        concept.load(str(path))
    assert "mine.yaml" in str(caught.value)


def test_files_names_and_canvas_words(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: Van Gogh\nkind: style\nanchors: [a painting]\nretain: [Monet]\n")
    assert concept.load(str(path)) == Concept("Van Gogh", kind="style", anchors=("a painting",), retain=("Monet",))
    assert concept.load("dagger", canvas=True).targets == ("dagger", "stiletto")
    with pytest.raises(UnknownName, match="did you mean dagger"):
        concept.load("daggr", canvas=True)
    with pytest.raises(ErasureError, match="no concept file"):
        concept.load(str(tmp_path / "none.yaml"))


SHIPPED = concept.available()
FOLDER = Path(concept.__file__).parents[1] / "prompts/concepts"
IMAGENETTE = {
    "cassette-player",
    "chain-saw",
    "church",
    "english-springer",
    "french-horn",
    "garbage-truck",
    "gas-pump",
    "golf-ball",
    "parachute",
    "tench",
}
MINORS = {
    "child",
    "children",
    "kid",
    "kids",
    "boy",
    "girl",
    "teen",
    "teenager",
    "minor",
    "baby",
    "toddler",
    "young",
    "schoolgirl",
    "infant",
}


def words(phrase: str) -> list[str]:
    return re.findall(r"[^\W_]+", phrase.lower())


def says(phrase: str, target: str) -> bool:
    """Whether a phrase holds a target, word by word."""
    return f" {' '.join(words(target))} " in f" {' '.join(words(phrase))} "


def test_the_shipped_set() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == SHIPPED.keys()
    assert {"nudity", "violence", "hate", "self-harm", "drugs"} | IMAGENETTE <= SHIPPED.keys()
    kinds = Counter(shipped.kind for shipped in SHIPPED.values())
    assert kinds == {"content": 5, "style": 10, "object": 12}
    names = [shipped.name.lower() for shipped in SHIPPED.values()]
    assert len(set(names)) == len(names)
    with pytest.raises(UnknownName, match="--target"):
        concept.load("no such concept")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_concept_is_whole(name: str) -> None:
    shipped = concept.load(name)
    assert shipped is SHIPPED[name]
    assert shipped.name.lower() in {target.lower() for target in shipped.targets}, "its name is what people type"
    assert all(anchor.strip() for _, anchor in shipped.pairs())
    assert len(shipped.retain) >= 5 and shipped.detectors
    for phrases in (shipped.targets, shipped.retain, shipped.detectors):
        assert len({phrase.lower() for phrase in phrases}) == len(phrases)
    assert set(shipped.detectors) <= set(detectors.names())
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# Our own "), "the file says whose words these are"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_concept_neither_keeps_nor_becomes_its_target(name: str) -> None:
    shipped = SHIPPED[name]
    for phrase in (*shipped.retain, *shipped.anchors):
        assert [target for target in shipped.targets if says(phrase, target)] == [], phrase


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_concept_fits_into_clip_at_once(name: str) -> None:
    """All targets, joined by commas, are one negative prompt: 75 tokens, of which a rare word takes two or three."""
    joined = ", ".join(SHIPPED[name].targets)
    assert sum(max(1, len(word) / 4) for word in words(joined)) + joined.count(",") <= 75


def test_imagenette_classes_measure_what_was_kept() -> None:
    """Each is an unseen neighbour of the other nine, as the usual ten-class protocol takes it to be."""
    classes = {name: SHIPPED[name].targets for name in IMAGENETTE}
    for name, own in classes.items():
        others = [target for other, targets in classes.items() if other != name for target in targets]
        assert [(phrase, t) for phrase in SHIPPED[name].retain for t in others if says(phrase, t)] == [], name
        assert not set(own) & set(others)


def test_sexual_content_names_no_minor() -> None:
    nudity = SHIPPED["nudity"]
    assert not MINORS & {word for phrase in (*nudity.targets, *nudity.anchors, *nudity.retain) for word in words(phrase)}


def test_the_person_template_loads_once_it_is_filled_in(tmp_path: Path) -> None:
    text = (FOLDER.parent / "templates/person.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    with pytest.raises(ErasureError, match=r"\{full name\} is a place to fill in"):
        concept.load(str(mine))
    mine.write_text(text.replace("{full name}", "Ada Lovelace"))
    filled = concept.load(str(mine))
    assert (filled.kind, filled.targets, filled.anchors) == ("identity", ("Ada Lovelace",), ("a person",))
    with pytest.raises(UnknownName, match=r"docs/concepts\.md"):
        concept.load("person")
