"""The examiner's honesty: what suites ask is out of reach of whatever is fitted, and nobody chose the split by hand."""

import ast
import re
from importlib.resources import files
from itertools import pairwise, product
from pathlib import Path

import pytest
import yaml

import erasure
from erasure.canvas.concepts import canvas_concept
from erasure.canvas.splits import SEEDS, choose, held_out, splits, training_drawings
from erasure.canvas.world import article, fill, world
from erasure.errors import UnknownName
from erasure.methods.uce import TEMPLATES

ROOT = Path(erasure.__file__).parent
CONCEPTS = [*splits().dev, *splits().test]


def test_the_file_is_what_the_rule_says() -> None:
    assert yaml.safe_load(files("erasure.canvas").joinpath("splits.yaml").read_text()) == choose(world())


def test_eight_dev_and_eight_test_concepts_apart() -> None:
    of, split = world(), splits()
    assert len(split.dev) == len(split.test) == 8 and not set(split.dev) & set(split.test)
    assert "dagger" in split.dev
    kinds = [("object" if c in of.objects else "style" if c in of.styles else "category") for c in split.test]
    assert sorted(kinds) == ["category"] * 2 + ["object"] * 4 + ["style"] * 2
    for name in split.dev:  # not even a member of a test category
        assert not {m for t in split.test for m in split.members(t)} & set(split.members(name))


def test_kept_and_retain_halves_are_apart_and_complete() -> None:
    of, split = world(), splits()
    assert not split.kept & split.retain and split.kept | split.retain == set(of.objects)
    for members in of.categories.values():
        assert abs(len(split.kept & set(members)) - len(members) / 2) <= 0.5
    for name in CONCEPTS:
        kept = set(split.kept_neighbours(name)) | set(split.kept_others(name))
        assert kept and kept <= split.kept
        assert not kept & set(split.members(name)) and not kept & set(canvas_concept(name).retain)
    for name in [c for c in CONCEPTS if c not in of.styles]:
        assert len(split.kept_neighbours(name)) >= 2
        assert not set(split.kept_neighbours(name)) & set(split.kept_others(name))


def test_about_a_tenth_of_the_drawings_is_held_out() -> None:
    of, split = world(), splits()
    drawings = len(of.objects) * len(of.styles)
    assert 0.09 <= len(split.held_out) / drawings <= 0.11
    assert len({o for o, _ in split.held_out}) == len(split.held_out), "at most one style an object"
    mask = training_drawings(of)
    assert int((~mask).sum()) == len(held_out(of))
    assert not any(mask[of.objects.index(o), of.styles.index(s)] for o, s in split.held_out)


def test_the_control_is_trained_without_the_test_concepts() -> None:
    of, split = world(), splits()
    mask = training_drawings(of, without=split.test)
    for name in split.test:
        if name in of.styles:
            assert not mask[:, of.styles.index(name)].any()
        for member in split.members(name):
            assert not mask[of.objects.index(member)].any()
    assert mask.any()


def test_seeds_are_apart() -> None:
    spans = sorted((r.start, r.stop) for r in SEEDS.values())
    assert set(SEEDS) == {"fit", "dev", "test"}
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


# strings


def words_of_suites() -> dict[str, str]:
    """Every synonym that only suites may use, with what it means."""
    of = world()
    return {of.synonyms(name)[1]: name for name in (*of.objects, *of.styles)}


def reachable(name: str) -> set[str]:
    concept = canvas_concept(name)
    return {concept.name, *concept.targets, *concept.anchors, *concept.retain}


def test_every_word_means_one_thing() -> None:
    of = world()
    words = [w for n in (*of.objects, *of.styles) for w in (n, *of.synonyms(n))]
    words += [*of.backgrounds, *(c for c in of.categories if c in CONCEPTS)]
    assert len(set(words)) == len(words), sorted({w for w in words if words.count(w) > 1})


@pytest.mark.parametrize("name", CONCEPTS)
def test_no_concept_reaches_a_suites_synonym(name: str) -> None:
    for phrase in reachable(name):
        for word in words_of_suites():
            assert not re.search(rf"\b{re.escape(word)}\b", phrase), f"{name}: {phrase!r} holds {word!r}"


def wordings(split: str) -> set[str]:
    """Every prompt that the templates of a split can give, for all objects."""
    of = world()
    styles, backgrounds = (*of.styles, None), (*of.backgrounds, None)
    every = product(of.templates(split), of.objects, styles, backgrounds)
    return {fill(template, article(o), s, b) for template, o, s, b in every}


def test_no_prompt_of_a_suite_is_one_that_the_canvas_trains_on() -> None:
    fit = wordings("fit")
    for split in ("dev", "test"):
        assert not wordings(split) & fit
    assert not set(world().pair_templates("test")) & set(world().pair_templates("fit"))


@pytest.mark.parametrize("name", CONCEPTS)
def test_no_concept_or_preset_reaches_a_suites_prompt(name: str) -> None:
    phrases = reachable(name) - {""}
    templates = [template for kind in TEMPLATES.values() for template in kind]
    presets = {template.format(noun) for template in templates for phrase in phrases for noun in (phrase, article(phrase))}
    for split in ("dev", "test"):
        assert not (phrases | presets) & wordings(split)


def test_concepts_of_every_kind() -> None:
    dagger, ink, fruit = canvas_concept("dagger"), canvas_concept("ink"), canvas_concept("fruit")
    assert dagger.targets == ("dagger", "stiletto") and dagger.kind == "object" and "dagger" not in dagger.retain
    assert ink.targets == ("ink", "monochrome") and ink.kind == "style" and {"flat", "cartoon", "sticker"} < set(ink.retain)
    assert fruit.kind == "category" and {"fruit", "apple", "red pippin", "banana"} < set(fruit.targets)
    assert not set(world().categories["fruit"]) & set(fruit.retain)
    with pytest.raises(UnknownName, match="did you mean dagger"):
        canvas_concept("dager")


# grammar


@pytest.mark.parametrize(
    ("template", "noun", "style", "background", "expected"),
    [
        ("a[ {s}] drawing of {o}[ on a {b} background]", "a cat", None, None, "a drawing of a cat"),
        ("a[ {s}] drawing of {o}[ on a {b} background]", "an owl", "ink", "orange", "an ink drawing of an owl on an orange background"),
        ("[{s} ]art[, {b} background], showing {o}", "a cat", "flat", None, "flat art, showing a cat"),
        ("[on a {b} page there is ]{o}[ in {s} style]", "jeans", None, "mint", "on a mint page there is jeans"),
        ("{o}[, {s}][, {b}]", "a cat and an owl", None, "sky", "a cat and an owl, sky"),
    ],
)
def test_fill(template: str, noun: str, style: str | None, background: str | None, expected: str) -> None:
    assert fill(template, noun, style, background) == expected


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("cat", "a cat"),
        ("apple", "an apple"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("t-shirt", "a t-shirt"),
        ("ice cream", "an ice cream"),
        ("crossed swords", "crossed swords"),
        ("jeans", "jeans"),
        ("grapes", "grapes"),
        ("acoustic strummer", "an acoustic strummer"),
    ],
)
def test_article(noun: str, expected: str) -> None:
    assert article(noun) == expected


def test_pairs() -> None:
    assert world().noun("apple", "jeans", pair="{x} next to {y}") == "an apple next to jeans"
    assert world().noun("owl") == "an owl"


# imports


def imported(path: Path) -> set[str]:
    """Every dotted name that a file imports or reaches by string, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names} | {node.module or ""}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            found.add(node.value)
    return found


def fitting_code() -> list[Path]:
    return sorted([*(ROOT / "methods").glob("**/*.py"), *(p for p in [ROOT / "training.py"] if p.exists())])


def test_nothing_that_fits_sees_the_test_judge() -> None:
    paths = fitting_code()
    assert {"uce.py", "session.py", "negative_prompt.py", "sld.py"} <= {p.name for p in paths}
    for path in paths:
        assert not [name for name in imported(path) if "judge_test" in name], path.name
        assert not [name for name in imported(path) if re.match(r"(erasure\.)?eval\b", name)], f"{path.name} imports the examiner"


def test_the_walk_would_find_a_hidden_import(tmp_path: Path) -> None:
    for line in (
        "from erasure.canvas.judge_test import judge_test",
        "import erasure.canvas.judge_test",
        "from ..canvas import judge_test",
    ):
        (tmp_path / "x.py").write_text(f"def f():\n    {line}\n")
        assert any("judge_test" in name for name in imported(tmp_path / "x.py"))
    (tmp_path / "x.py").write_text('import_module("erasure.canvas.judge_test")\n')
    assert any("judge_test" in name for name in imported(tmp_path / "x.py"))
