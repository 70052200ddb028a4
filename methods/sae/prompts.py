"""The prompts that a concept's features and its gate are read from."""

from collections.abc import Sequence

from erasure.concept import Concept

TEMPLATES: dict[str, tuple[str, ...]] = {
    "style": ("{}", "a picture in {} style", "{} art"),
    "other": ("a {}", "a picture of a {}"),
}
"""What features are read from. A thing's bare word is not among them: the canvas sees a white page in it, which is nobody's own."""
PAIRED: dict[str, tuple[str, ...]] = {
    "style": ("a picture of a {x} and a {y} in {} style", "a picture of a {y} and a {x} in {} style"),
    "other": ("a picture of a {} and a {x}", "a picture of a {x} and a {}", "a picture of a {} and a {y}", "a picture of a {y} and a {}"),
}
"""A target beside things that are none: {x} and {y} are words of ``COMPANY``."""
COMPANY = ("cat", "house", "person", "tree")
"""Common things; the first two that no concept erases stand beside a target."""


def prompts_of(concept: Concept, phrases: Sequence[str]) -> list[str]:
    """Phrases in the templates of a concept's kind."""
    return [template.format(phrase) for phrase in phrases for template in TEMPLATES.get(concept.kind, TEMPLATES["other"])]


def accompanied(concept: Concept, concepts: Sequence[Concept]) -> list[str]:
    """Targets beside other things: a concept's share of such a prompt is less than of its bare phrase, and a gate has to open there too.

    Things that any of ``concepts`` erases are not taken; where fewer than two are left, there are no such prompts.
    """
    targets = _targets(concepts)
    free = [word for word in COMPANY if word not in targets][:2]
    if len(free) < 2:
        return []
    templates = PAIRED.get(concept.kind, PAIRED["other"])
    return [template.format(phrase, x=free[0], y=free[1]) for phrase in concept.targets for template in templates]


def retained(concepts: Sequence[Concept]) -> list[str]:
    """Prompts whose features stay: all concepts' retained phrases and anchors, and the templates without a phrase; no concept's target."""
    return list(dict.fromkeys(text for texts in retained_phrases(concepts).values() for text in texts))


def retained_phrases(concepts: Sequence[Concept]) -> dict[str, list[str]]:
    """Phrase -> the prompts that keep its features; "" is the templates without a phrase."""
    targets, found = _targets(concepts), dict[str, list[str]]()
    for concept in concepts:
        for phrase in dict.fromkeys(("", *concept.anchors, *concept.retain)):
            if phrase.casefold() not in targets:
                found[phrase] = list(dict.fromkeys([*found.get(phrase, []), *prompts_of(concept, (phrase,))]))
    return found


def _targets(concepts: Sequence[Concept]) -> set[str]:
    return {target.casefold() for concept in concepts for target in concept.targets}
