"""Concepts of the canvas's world, made from its own vocabulary and splits: nothing here can reach a suite's strings."""

from ..concept import Concept
from ..registry import unknown
from .splits import splits
from .world import world


def canvas_concept(name: str) -> Concept:
    """An object, style or category as a Concept: its word and the fit-side synonym to erase, the retain half to keep."""
    of, split = world(), splits()
    if name in of.objects:
        return Concept(name, targets=(name, of.synonyms(name)[0]), retain=tuple(split.retained(name)), detectors=("canvas",))
    if name in of.styles:
        others = tuple(s for s in of.styles if s != name)
        return Concept(
            name, kind="style", targets=(name, of.synonyms(name)[0]), retain=others + tuple(split.retained(name)), detectors=("canvas",)
        )
    if name in of.categories:
        members = of.categories[name]
        targets = (name, *(word for o in members for word in (o, of.synonyms(o)[0])))
        return Concept(name, kind="category", targets=targets, retain=tuple(split.retained(name)), detectors=("canvas",))
    raise unknown("canvas concept", name, [*of.objects, *of.styles, *of.categories])
