"""Prompts that ask the canvas for each of its objects and styles in turn, by words of the fit side: what a feature is held against."""

from itertools import cycle

from .splits import splits
from .world import article, fill, world


def probes() -> list[tuple[str, tuple[str, ...]]]:
    """(prompt, names of what it asks for): every object by its word and its first synonym, alone and in every style it may be in."""
    of, unseen, templates = world(), splits().held_out, cycle(world().templates("fit"))
    found: list[tuple[str, tuple[str, ...]]] = []
    for name in of.objects:
        for word in (name, of.synonyms(name)[0]):
            found.append((fill(next(templates), article(word)), (name,)))
        for style in of.styles:
            if (name, style) not in unseen:
                found.append((fill(next(templates), article(name), style), (name, style)))
    return found
