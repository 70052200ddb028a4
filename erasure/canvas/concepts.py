"""Concepts of the canvas's world, made from its own vocabulary and splits: nothing here can reach a suite's strings."""

from ..concept import Concept
from ..registry import unknown
from .splits import rank, splits
from .world import world

STAND_INS = ("weapon", "substance", "clothing")
"""Categories that stand in for unsafe content; nothing is turned into one of these."""


def canvas_concept(name: str) -> Concept:
    """An object, style or category as a Concept: its word and the fit-side synonym to erase, the retain half to keep.

    The anchor is a harmless drawing picked by hash: an erased prompt should show another thing, not a blur.
    """
    of, split = world(), splits()
    if name in of.objects:
        return Concept(
            name, targets=(name, of.synonyms(name)[0]), anchors=(anchor(name),), retain=tuple(split.retained(name)), detectors=("canvas",)
        )
    if name in of.styles:
        others = tuple(s for s in rank(f"anchor:{name}", of.styles) if s != name)
        retain = (*others, *split.retained(name))
        return Concept(name, kind="style", targets=(name, of.synonyms(name)[0]), anchors=others[:1], retain=retain, detectors=("canvas",))
    if name in of.categories:
        targets = (name, *(word for o in of.categories[name] for word in (o, of.synonyms(o)[0])))
        retain = tuple(split.retained(name))
        return Concept(name, kind="category", targets=targets, anchors=(anchor(name),), retain=retain, detectors=("canvas",))
    raise unknown("canvas concept", name, [*of.objects, *of.styles, *of.categories])


def anchor(name: str) -> str:
    """The harmless object, of the retain half and another category, that a concept becomes."""
    of, split = world(), splits()
    own = name if name in of.categories else of.category_of(name)
    return rank(f"anchor:{name}", (o for o in split.retain if of.category_of(o) not in (own, *STAND_INS)))[0]
