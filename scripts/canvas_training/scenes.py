"""Labelled scenes (object or pair, style, background) with their captions: the training data of every part."""

from dataclasses import dataclass

import torch
from torch import Tensor

from erasure.canvas.world import World, fill

PAIR_SHARE, CATEGORY_SHARE, SYNONYM_SHARE, DROP_WORD = 0.25, 0.02, 0.4, 0.15


@dataclass
class Scenes:
    """Labels of n scenes: objects [n, 2] (-1: none), styles [n], backgrounds [n], shifts [n, 2, 2] in pixels."""

    objects: Tensor
    styles: Tensor
    backgrounds: Tensor
    shifts: Tensor

    def __len__(self) -> int:
        return len(self.styles)

    def __getitem__(self, index: Tensor) -> "Scenes":
        return Scenes(self.objects[index], self.styles[index], self.backgrounds[index], self.shifts[index])


def sample(n: int, allowed: Tensor, generator: torch.Generator, pair_share: float = PAIR_SHARE, jitter: int = 2) -> Scenes:
    """Draw scenes uniformly from the ``allowed`` [objects, styles] drawings; both of a pair share a style and differ."""
    drawings = allowed.nonzero()

    def pick() -> Tensor:
        return drawings[torch.randint(len(drawings), (n,), generator=generator)]

    first, second = pick(), pick()
    for _ in range(64):  # redraw partners of another style, or of the same object
        wrong = (second[:, 1] != first[:, 1]) | (second[:, 0] == first[:, 0])
        if not wrong.any():
            break
        second = torch.where(wrong[:, None], pick(), second)
    paired = (torch.rand(n, generator=generator) < pair_share) & ~wrong
    objects = torch.stack([first[:, 0], torch.where(paired, second[:, 0], -1)], dim=1)
    return Scenes(
        objects,
        first[:, 1],
        torch.randint(8, (n,), generator=generator),
        torch.randint(-jitter, jitter + 1, (n, 2, 2), generator=generator),
    )


def caption(
    world: World, objects: list[int], style: int, background: int, generator: torch.Generator, noise: float = 0.0
) -> tuple[str, bool, bool, bool]:
    """A training caption of a scene, and whether it names the object (not its category), the style and the background."""

    def chance(p: float) -> bool:
        return torch.rand((), generator=generator).item() < p

    def choose(options: tuple[str, ...]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    named = [world.objects[i] for i in objects if i >= 0]
    exact = not (len(named) == 1 and chance(CATEGORY_SHARE))
    words = [choose(world.synonyms(o)) if chance(SYNONYM_SHARE) else o for o in named] if exact else [world.category_of(named[0])]
    with_style, with_background = not chance(DROP_WORD), not chance(DROP_WORD)
    style_word = choose(world.synonyms(world.styles[style])) if chance(0.2) else world.styles[style]
    text = fill(
        choose(world.templates("fit")),
        world.noun(*words, pair=choose(world.pair_templates("fit"))),
        style_word if with_style else None,
        world.backgrounds[background] if with_background else None,
    )
    while chance(noise):  # filler words anywhere: templates that nobody has seen must not confuse the encoder
        tokens = text.split()
        tokens.insert(int(torch.randint(len(tokens) + 1, (), generator=generator)), choose(FILLERS))
        text = " ".join(tokens)
    return text, exact, with_style, with_background


FILLERS = tuple(
    "! here is against together with illustration over card image picture of the one some very nice small big simple new old view "
    "photo sketch scene poster print there it this that good best quality , . please show me draw make".split()
)
