"""What benchmarks/merging.py asks for: concepts that do not get in each other's way, prompts that name them, prompts of what is kept."""

from dataclasses import dataclass, replace

from erasure.canvas.concepts import STAND_INS, canvas_concept
from erasure.canvas.splits import rank, splits
from erasure.canvas.world import article, fill, world
from erasure.concept import Concept

CONCEPTS = ("dagger", "guitar", "drum", "pizza", "penguin", "trumpet", "weapon", "flat")
"""Those of the split for development, objects first: a merge of n has the first n."""
SIZES = (2, 4, 8)
IMAGES = 48
"""Images a side of each merge: the named ones in equal parts of its concepts."""


@dataclass(frozen=True)
class Asked:
    """Prompts, by what they are for: a concept that is named, or an object that is kept."""

    texts: list[str]
    wanted: list[str]
    seed: int
    """Place of the first one's seed among those of the dev split."""


def concept_of(name: str) -> Concept:
    """As elsewhere on the canvas, but retaining nothing that another expert erases, nor turned into it."""
    one, gone = canvas_concept(name), erased()
    anchor = one.anchors[0]
    if anchor in gone:
        own = world().category_of(name)
        anchor = rank(f"anchor:{name}", (o for o in splits().retain - gone if world().category_of(o) not in (own, *STAND_INS)))[0]
    return replace(one, anchors=(anchor,), retain=tuple(phrase for phrase in one.retain if phrase not in gone))


def erased() -> frozenset[str]:
    """All that any expert erases: concepts, and the members of categories."""
    return frozenset(CONCEPTS) | {o for name in CONCEPTS for o in splits().members(name)}


def named(concept: str, n: int) -> Asked:
    """n prompts that name a concept; those of a lesser n are their beginning."""
    of, drawn = world(), []
    members = [o for o in splits().members(concept) if o == concept or o not in CONCEPTS]
    for i in range(n):
        if concept in of.styles:
            objects = [o for o in kept_objects() if (o, concept) not in splits().held_out]
            drawn.append((objects[i % len(objects)], (concept, of.synonyms(concept)[0])[i % 2]))
        else:
            name = members[i % len(members)]
            drawn.append(((name, of.synonyms(name)[0])[i // len(members) % 2], style(name, i)))
    return Asked([text(i, word, of_style) for i, (word, of_style) in enumerate(drawn)], [concept] * n, 100 * CONCEPTS.index(concept))


def kept(n: int) -> Asked:
    """n prompts for objects that no expert erases, spread over all of these, in styles that none does."""
    objects = rank("merging-kept", kept_objects())
    chosen = [objects[i % len(objects)] for i in range(n)]
    return Asked([text(i, name, style(name, i)) for i, name in enumerate(chosen)], chosen, 1000)


def kept_objects() -> list[str]:
    return sorted(splits().kept - erased())


def style(name: str, i: int) -> str:
    free = [s for s in world().styles if s not in CONCEPTS and (name, s) not in splits().held_out]
    return free[i % len(free)]


def text(i: int, word: str, of_style: str) -> str:
    templates, backgrounds = world().templates("dev"), world().backgrounds
    return fill(templates[i % len(templates)], article(word), of_style, backgrounds[i % len(backgrounds)])


def share(size: int) -> int:
    return IMAGES // size


def most(concept: str) -> int:
    """Named images of a concept in the smallest merge that has it."""
    return share(next(size for size in SIZES if CONCEPTS.index(concept) < size))
