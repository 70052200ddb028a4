"""Concepts refuse what would erase the wrong thing."""

from pathlib import Path
from typing import Any

import pytest

from erasure import concept
from erasure.concept import Concept
from erasure.errors import ErasureError, UnknownName


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


def test_shipped_concepts_are_valid() -> None:
    for name, shipped in concept.available().items():
        assert shipped.pairs() and concept.load(name) is shipped
    with pytest.raises(UnknownName, match="--target"):
        concept.load("no such concept")
