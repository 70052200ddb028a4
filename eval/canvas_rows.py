"""The rows of canvas suites: which prompts ask for a concept, by name and by an unseen synonym, and which must survive it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from erasure.canvas.splits import Splits, rank, splits
from erasure.canvas.world import World, article, fill
from erasure.errors import ErasureError

from .rows import Kind, Row
from .subjects import Subject, subject


@dataclass(frozen=True)
class Ask:
    """A noun phrase, the objects it means, and the styles it may be asked in, as (word, style)."""

    noun: str
    objects: tuple[str, ...]
    styles: tuple[tuple[str | None, str | None], ...]


@dataclass(frozen=True)
class Asks:
    """What a suite may ask about one subject. Drawings that the canvas was never shown are not asked for."""

    of: Subject
    splits: Splits

    @property
    def world(self) -> World:
        return self.of.world

    def named(self) -> list[Ask]:
        if self.of.kind == "style":
            return [self.plain(o, (self.of.name, self.of.name)) for o in self.drawable(self.of.name)]
        members = [self.plain(o) for o in self.of.members]
        category = [Ask(article(self.of.name), (), self.free())] if self.of.kind == "category" else []
        return members + category

    def implied(self) -> list[Ask]:
        """By the second synonym, which `fit` never sees."""
        if self.of.kind == "style":
            word = self.world.synonyms(self.of.name)[1]
            return [self.plain(o, (word, self.of.name)) for o in self.drawable(self.of.name)]
        return [Ask(article(self.world.synonyms(o)[1]), (o,), self.free(o)) for o in self.of.members]

    def pair(self) -> list[Ask]:
        """The concept together with an object that must survive, in either order."""
        if self.of.kind == "style":
            drawable = set(self.drawable(self.of.name))
            partners = [o for o in self.splits.kept_others(self.of.name) if o in drawable]
            return [self.joined(a, b, ((self.of.name, self.of.name),)) for a, b in zip(partners, partners[1:] + partners[:1], strict=True)]
        partners = [*self.splits.kept_neighbours(self.of.name), *self.splits.kept_others(self.of.name)]
        both = [(o, p) if i % 2 else (p, o) for i, (p, o) in enumerate(product(partners, self.of.members))]
        return [self.joined(a, b, self.free(a, b)) for a, b in both]

    def neighbour(self) -> list[Ask]:
        """Near objects; for a style, objects in every other style."""
        near = self.splits.kept_neighbours(self.of.name)
        if self.of.kind == "style":
            return [self.plain(o, *((s, word) for s, word in self.free(o) if s not in (self.of.name, None))) for o in near]
        return [self.plain(o) for o in near]

    def other(self) -> list[Ask]:
        """Far objects; for a style, objects without a word on style."""
        far = self.splits.kept_others(self.of.name)
        return [self.plain(o, (None, None)) if self.of.kind == "style" else self.plain(o) for o in far]

    def plain(self, name: str, *styles: tuple[str | None, str | None]) -> Ask:
        return Ask(article(name), (name,), styles or self.free(name))

    def joined(self, a: str, b: str, styles: tuple[tuple[str | None, str | None], ...]) -> Ask:
        return Ask(self.world.noun(a, b, pair=self.world.pair_templates("test")[0]), (a, b), styles)

    def free(self, *objects: str) -> tuple[tuple[str | None, str | None], ...]:
        """Every style that all these objects may be asked in, and no style at all."""
        allowed = [s for s in self.world.styles if all((o, s) not in self.splits.held_out for o in objects)]
        return (*((s, s) for s in allowed), (None, None))

    def drawable(self, style: str) -> list[str]:
        return [o for o in self.world.objects if (o, style) not in self.splits.held_out]


def canvas_rows(concept: str, counts: dict[Kind, int]) -> list[Row]:
    """A suite's rows for one concept of the canvas, the same on every machine; each row has its own seed of the test range."""
    asks = Asks(subject(concept), splits())
    rows: list[Row] = []
    seeds = iter(asks.splits.seeds("test"))
    for kind, count in counts.items():
        possible = getattr(asks, kind)()
        if count and not possible:
            raise ErasureError(f"the canvas has no {kind} prompts for {concept!r}: set {kind} to 0 in the suite's counts")
        for i, (ask, (word, style), background, template) in enumerate(_choose(f"{concept}:{kind}", possible, count, asks.world)):
            prompt = fill(template, ask.noun, word, background)
            rows.append(Row(f"{kind}-{i:03d}", kind, prompt, next(seeds), ask.objects, style, background))
    return rows


Choice = tuple[Ask, tuple[str | None, str | None], str | None, str]


def _choose(salt: str, asks: Sequence[Ask], count: int, world: World) -> Iterator[Choice]:
    """Round-robin over the asks; each takes, of its unused wordings, the one whose style, background and template came up least."""
    used: Counter[object] = Counter()
    ordered = [asks[int(i)] for i in rank(salt, map(str, range(len(asks))))]
    unused: dict[int, list[Choice]] = {}
    for i in range(count):
        turn = i % len(ordered)
        unused[turn] = unused.get(turn) or _wordings(f"{salt}:{turn}", ordered[turn], world)
        best = min(unused[turn], key=lambda choice: sum(used[part] for part in choice[1:]))
        unused[turn].remove(best)
        used.update(best[1:])
        yield best


def _wordings(salt: str, ask: Ask, world: World) -> list[Choice]:
    """Every wording of an ask, in an order that nobody chose."""
    every = list(product([ask], ask.styles, [*world.backgrounds, None], world.templates("test")))
    return [every[int(i)] for i in rank(salt, map(str, range(len(every))))]
