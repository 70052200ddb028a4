"""Captions in the canvas's own words, of the fit side alone: what coders of its text encoder are trained on."""

import random

from .world import fill, world


def captions(n: int = 20_000, seed: int = 0) -> list[str]:
    """Prompts of one object or two, or of a category, each by a word that a fit may see, in templates of the fit split."""
    of, draw = world(), random.Random(seed)
    words = [word for name in of.objects for word in (name, of.synonyms(name)[0])] + list(of.categories)
    styles = [word for style in of.styles for word in (style, of.synonyms(style)[0])]
    templates, pairs = of.templates("fit"), of.pair_templates("fit")

    def one() -> str:
        noun = of.noun(*draw.sample(words, 2), pair=draw.choice(pairs)) if draw.random() < 0.3 else of.noun(draw.choice(words))
        style = draw.choice(styles) if draw.random() < 0.8 else None
        return fill(draw.choice(templates), noun, style, draw.choice(of.backgrounds) if draw.random() < 0.8 else None)

    return [*words, *styles, *(one() for _ in range(n))]
