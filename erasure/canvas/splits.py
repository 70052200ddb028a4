"""Who may see what: dev and test concepts, held-out drawings, halves of neighbours. Picked by hash, written to splits.yaml."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from .world import World, world

if TYPE_CHECKING:  # the listings of the command line read the splits, and do not wait for torch
    from torch import Tensor

DEV_CATEGORY, DEV_OBJECT = "weapon", "dagger"
SEEDS = {"fit": range(0, 100_000), "dev": range(100_000, 200_000), "test": range(200_000, 300_000)}


def rank(salt: str, names: Iterable[str]) -> list[str]:
    """The names in the order of their salted SHA-256: a choice that nobody makes and anybody can check."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}:{name}".encode()).hexdigest())


def held_out(of: World, share: float = 0.1) -> list[tuple[str, str]]:
    """Object x style pairs that the canvas never sees: about ``share`` of all, at most one style an object."""
    one_each = [(o, rank(f"drawing:{o}", of.styles)[0]) for o in of.objects]
    chosen = rank("held-out", [f"{o}|{s}" for o, s in one_each])[: round(share * len(of.objects) * len(of.styles))]
    return sorted((o, s) for o, s in one_each if f"{o}|{s}" in chosen)


def training_drawings(of: World, without: Iterable[str] = ()) -> "Tensor":
    """Mask [objects, styles] of the drawings that the canvas may learn from, ``without`` some objects, styles or categories."""
    import torch

    allowed = torch.ones(len(of.objects), len(of.styles), dtype=torch.bool)
    for o, s in held_out(of):
        allowed[of.objects.index(o), of.styles.index(s)] = False
    for name in without:
        if name in of.styles:
            allowed[:, of.styles.index(name)] = False
        for o in of.categories.get(name, (name,) if name in of.objects else ()):
            allowed[of.objects.index(o)] = False
    return allowed


def choose(of: World) -> dict[str, Any]:
    """The content of splits.yaml: one rule, no hand in it but the demo's own dagger and its category for development."""
    categories = [c for c in rank("test-category", of.categories) if len(of.categories[c]) >= 5 and c != DEV_CATEGORY][:2]
    crowded = [c for c in of.categories if len(of.categories[c]) >= 4 and c not in (*categories, DEV_CATEGORY)]
    free = [o for c in crowded for o in of.categories[c]]
    objects = rank("test-object", free)[:4]
    dev_objects = [DEV_OBJECT, *(o for o in rank("dev-object", free) if o not in objects)][:6]
    styles = rank("test-style", of.styles)
    kept = sorted(o for members in of.categories.values() for o in rank("kept", members)[: len(members) // 2])
    return {
        "dev": [*dev_objects, styles[2], DEV_CATEGORY],
        "test": [*objects, *styles[:2], *categories],
        "kept": kept,
        "retain": sorted(set(of.objects) - set(kept)),
        "held_out": [list(pair) for pair in held_out(of)],
    }


@dataclass(frozen=True)
class Splits:
    """splits.yaml, with the questions that suites and concepts ask of it."""

    dev: tuple[str, ...]
    """Concepts for demos, searches and ablations."""
    test: tuple[str, ...]
    """Concepts of benchmark tables alone."""
    kept: frozenset[str]
    """Objects that suites use to measure what was kept."""
    retain: frozenset[str]
    """Objects that a method's retain list may hold."""
    held_out: frozenset[tuple[str, str]]
    """Drawings (object, style) that the canvas never saw."""

    def members(self, concept: str) -> tuple[str, ...]:
        """The objects that belong to a concept: itself, a category's members, or none for a style."""
        return world().categories.get(concept, (concept,) if concept in world().objects else ())

    def _neighbours(self, concept: str) -> list[str]:
        """Kept objects of the concept's own category, and of its sister where those are fewer than three."""
        own = self.members(concept)
        if not own:
            return []
        category = world().category_of(own[0])
        near = [o for o in world().categories[category] if o in self.kept and o not in own]
        return near if len(near) >= 3 else near + [o for o in world().categories[sister(category)] if o in self.kept]

    def kept_neighbours(self, concept: str) -> list[str]:
        """Objects near the concept that measure what was kept; for a style, every kept object (drawn in other styles)."""
        return sorted(self.kept) if concept in world().styles else self._neighbours(concept)

    def kept_others(self, concept: str) -> list[str]:
        """Objects far from the concept that measure what was kept."""
        near = set(self._neighbours(concept)) | set(self.members(concept))
        return [o for o in sorted(self.kept) if o not in near]

    def retained(self, concept: str) -> list[str]:
        """Objects that the concept's retain list may name."""
        return [o for o in sorted(self.retain) if o not in self.members(concept)]

    def seeds(self, split: str) -> range:
        """The seeds of a split: fit, dev or test."""
        return SEEDS[split]


def sister(category: str) -> str:
    """The category that counts as a category's neighbourhood: the next in the world's list, which is ordered by kind."""
    names = list(world().categories)
    return names[(names.index(category) + 1) % len(names)]


@cache
def splits() -> Splits:
    """The splits, read once from the package."""
    data = yaml.safe_load(files("erasure.canvas").joinpath("splits.yaml").read_text())
    return Splits(
        tuple(data["dev"]),
        tuple(data["test"]),
        frozenset(data["kept"]),
        frozenset(data["retain"]),
        frozenset((o, s) for o, s in data["held_out"]),
    )
