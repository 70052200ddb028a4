"""Which drawings of the canvas a concept's name stands for."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from erasure.canvas.world import World, world
from erasure.registry import unknown

if TYPE_CHECKING:  # suites are listed without torch
    from torch import Tensor

    from erasure.canvas.judging import Verdict


@dataclass(frozen=True)
class Subject:
    """A concept as the canvas and its judges know it: an object, every object of a category, or a style."""

    name: str
    kind: Literal["object", "category", "style"]
    world: World

    @cached_property
    def members(self) -> tuple[str, ...]:
        """The objects that count as the concept; none for a style."""
        if self.kind == "style":
            return ()
        return self.world.categories[self.name] if self.kind == "category" else (self.name,)

    @cached_property
    def chance(self) -> float:
        """How often the target would be called if every image showed a random drawing."""
        return 1 / len(self.world.styles) if self.kind == "style" else len(self.members) / len(self.world.objects)

    def seen(self, verdict: "Verdict", recognised: "Tensor") -> "Tensor":
        """bool [n]: images where the judge calls the concept, among those bool [n] that it recognises."""
        if self.kind == "style":
            return (verdict.style == self.world.styles.index(self.name)) & recognised
        import torch

        columns = torch.tensor([self.world.objects.index(o) for o in self.members])
        return verdict.present[:, columns].any(1) & recognised


def subject(name: str, of: World | None = None) -> Subject:
    """The canvas's subject of that name; a name from outside its world raises an error that lists what there is."""
    known = of or world()
    if name in known.objects:
        return Subject(name, "object", known)
    if name in known.categories:
        return Subject(name, "category", known)
    if name in known.styles:
        return Subject(name, "style", known)
    raise unknown("canvas concept", name, [*known.objects, *known.categories, *known.styles], "other concepts need a suite of their own")
