"""What is to be erased, what it should become, and what must survive."""

import re
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .errors import ErasureError
from .reading import problems, read_yaml
from .registry import unknown

Kind = Literal["object", "style", "category", "content", "identity"]
PLACEHOLDER = re.compile(r"\{[^{}]*\}")
"""What the templates of ``erasure.prompts.templates`` have where the user's words go; nobody's prompt means it."""


@dataclass(frozen=True)
class Concept:
    """A concept to erase; ``Concept("Van Gogh", kind="style", anchors=("a painting",))`` is enough.

    Source: the fields that the methods of this suite read, in one place.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    """What people call it."""
    kind: Kind = "object"
    """What sort of thing it is; prompt templates of methods depend on it."""
    targets: tuple[str, ...] = ()
    """Phrases that mean the concept; its name if empty."""
    anchors: tuple[str, ...] = ("",)
    """What each target should become: one for all, or one per target."""
    retain: tuple[str, ...] = ()
    """Neighbours that must survive."""
    detectors: tuple[str, ...] = ()
    """Names of detectors that can see it, for evaluation."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ErasureError("a concept needs a name")
        if self.kind not in get_args(Kind):
            raise ErasureError(f"concept {self.name!r}: kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        for key in ("targets", "anchors", "retain", "detectors"):
            phrases = getattr(self, key)
            if isinstance(phrases, str) or not all(isinstance(phrase, str) for phrase in phrases):
                raise ErasureError(f"concept {self.name!r}: {key} is a list of phrases, not {phrases!r}")
            object.__setattr__(self, key, tuple(phrases))
        if not self.targets:
            object.__setattr__(self, "targets", (self.name,))
        if not all(target.strip() for target in self.targets):
            raise ErasureError(f"concept {self.name!r}: a target is empty, which would erase every prompt")
        if open_place := PLACEHOLDER.search(" ".join((self.name, *self.targets, *self.anchors, *self.retain))):
            raise ErasureError(f"concept {self.name!r}: {open_place[0]} is a place to fill in, not a phrase; put the words there")
        lost = [phrase for phrase in self.retain if _same(phrase) in map(_same, self.targets)]
        if lost:
            where = f"retain[{self.retain.index(lost[0])}]"
            raise ErasureError(f"concept {self.name!r}: {where}, {lost[0]!r}, is a target too; take it out of retain or out of targets")
        if len(self.anchors) not in (1, len(self.targets)):
            raise ErasureError(f"concept {self.name!r}: {len(self.anchors)} anchors for {len(self.targets)} targets; give one, or one each")

    def pairs(self) -> list[tuple[str, str]]:
        """Each target with its anchor."""
        anchors = self.anchors if len(self.anchors) == len(self.targets) else self.anchors * len(self.targets)
        return list(zip(self.targets, anchors, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "concept") -> "Concept":
        """A concept from plain data; an unknown key or a wrong type is an error that names it."""
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise ErasureError(f"{source}: {problems(error, (field.name for field in fields(cls)))}") from error
        except ErasureError as error:
            raise ErasureError(f"{source}: {error}") from error


def _same(phrase: str) -> str:
    """Phrases that differ by case and spaces alone are one."""
    return " ".join(phrase.casefold().split())


def load(name: str, *, canvas: bool = False) -> Concept:
    """A concept by the name of a shipped file, by the path of a YAML file, or by a word of the canvas's world."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ErasureError(f"no concept file {name}; check the path")
        return Concept.from_dict(read_yaml(path, name) or {}, source=name)
    if canvas:
        from .canvas.concepts import canvas_concept

        return canvas_concept(name)
    shipped = available()
    if name not in shipped:
        raise unknown(
            "concept", name, shipped, hint="or give --target and --anchor, or a .yaml file (docs/concepts.md has one for a person)"
        )
    return shipped[name]


@cache
def available() -> dict[str, Concept]:
    """Shipped concepts by name, found by scanning ``erasure.prompts.concepts``."""
    found = (p for p in files("erasure.prompts.concepts").iterdir() if p.name.endswith(".yaml"))
    loaded = {p.name.removesuffix(".yaml"): Concept.from_dict(read_yaml(p, p.name), source=p.name) for p in found}
    return dict(sorted(loaded.items()))
