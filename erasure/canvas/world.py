"""What the canvas can draw and how prompts name it: objects, styles, backgrounds, synonyms, templates, splits."""

import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class World:
    """The vocabulary of world.yaml, in its order; indices into these tuples are the labels of judges and training."""

    data: dict[str, Any] = field(repr=False)

    @cached_property
    def categories(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(members) for name, members in self.data["categories"].items()}

    @cached_property
    def objects(self) -> tuple[str, ...]:
        return tuple(o for members in self.categories.values() for o in members)

    @cached_property
    def _rows(self) -> dict[str, list[str]]:
        return {o: row for members in self.data["categories"].values() for o, row in members.items()}

    @cached_property
    def icons(self) -> tuple[str, ...]:
        return tuple(self._rows[o][0] for o in self.objects)

    @cached_property
    def styles(self) -> tuple[str, ...]:
        return tuple(self.data["styles"])

    @cached_property
    def style_sets(self) -> tuple[str, ...]:
        return tuple(row[0] for row in self.data["styles"].values())

    @cached_property
    def backgrounds(self) -> tuple[str, ...]:
        return tuple(self.data["backgrounds"])

    @cached_property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(tuple(rgb) for rgb in self.data["backgrounds"].values())

    def synonyms(self, name: str) -> tuple[str, str]:
        """The synonym that `fit` may see and the one that only suites have, of an object or a style."""
        row = self._rows[name] if name in self._rows else self.data["styles"][name]
        return row[1], row[2]

    def category_of(self, name: str) -> str:
        return next(c for c, members in self.categories.items() if name in members)

    def templates(self, split: str) -> tuple[str, ...]:
        return tuple(self.data["templates"][split])

    def pair_templates(self, split: str) -> tuple[str, ...]:
        return tuple(self.data["pairs"][split])

    def noun(self, *objects: str, pair: str = "{x} and {y}") -> str:
        """An object word with its article, or two of them joined by a pair template."""
        if len(objects) == 1:
            return article(objects[0])
        return pair.format(x=article(objects[0]), y=article(objects[1]))


PLURALS = frozenset("swords sabres blades jeans trousers pants grapes scissors shears strings".split())


def article(noun: str) -> str:
    """The noun with its article; plurals stay bare."""
    return noun if noun.split()[-1] in PLURALS else _articles(f"a {noun}")


def _articles(text: str) -> str:
    return re.sub(r"\ba (?=[aeio]|u(?!ni))", "an ", text)


def fill(template: str, noun: str, style: str | None = None, background: str | None = None) -> str:
    """A prompt from a template; brackets that hold an absent style or background are left out.

    >>> fill("a[ {s}] drawing of {o}[ on a {b} background]", "a cat", "ink")
    'an ink drawing of a cat'
    """
    values = {"s": style, "b": background, "o": noun}

    def bracket(match: re.Match[str]) -> str:
        field_name = re.search(r"\{(\w)\}", match[1])
        return match[1] if field_name is None or values[field_name[1]] else ""

    return _articles(re.sub(r"\[([^\]]*)\]", bracket, template).format(**values))


@cache
def world() -> World:
    """The canvas's world, read once from the package."""
    return World(yaml.safe_load(files("erasure.canvas").joinpath("world.yaml").read_text()))
