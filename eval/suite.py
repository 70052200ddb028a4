"""A suite: how many prompts of which kind, under which protocol. Its rows follow from a concept alone."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.registry import unknown

from .canvas_rows import Kind, Row, canvas_rows
from .protocol import Protocol, digest


class Suite(BaseModel):
    """Prompts, seeds and protocol of one evaluation; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int = Field(ge=1)
    summary: str
    source: Literal["canvas"]
    """Where the rows come from."""
    ranked: bool
    """Whether it has enough images to call one method better than another."""
    counts: dict[Kind, int]
    protocol: Protocol

    @field_validator("counts")
    @classmethod
    def _some_rows(cls, counts: dict[Kind, int]) -> dict[Kind, int]:
        if any(n < 0 for n in counts.values()) or not sum(counts.values()):
            raise ValueError("counts are at least 0, and one of them is more")
        return counts

    @property
    def size(self) -> int:
        """Images of one row of the table."""
        return sum(self.counts.values())

    @property
    def hash(self) -> str:
        return digest({**self.model_dump(exclude={"protocol", "summary"}), "protocol": self.protocol.hash})

    def rows(self, concept: Concept) -> list[Row]:
        """The suite's images for a concept, the same every time; a concept from outside the suite's world raises UnknownName."""
        return canvas_rows(concept.name, self.counts)

    def limited(self, images: int) -> "Suite":
        """A quick look at about that many images, every kind in proportion; never ranked, and its hash differs."""
        if images < 1:
            raise ErasureError(f"a limit of {images} images leaves nothing to score")
        if images >= self.size:
            return self
        counts = {kind: max(round(n * images / self.size), 1) if n else 0 for kind, n in self.counts.items()}
        return self.model_copy(update={"counts": counts, "ranked": False})

    def under(self, **changes: Any) -> "Suite":
        """The suite with changes to its protocol, such as ``steps=10``."""
        return self.model_copy(update={"protocol": self.protocol.changed(**changes)})


def load_suite(name: str) -> Suite:
    """A shipped suite by name, or any other by the path of its YAML file."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ErasureError(f"no suite file {name}")
        return _parse(path)
    shipped = _shipped()
    if name not in shipped:
        raise unknown("suite", name, shipped, "or give the path of a .yaml file")
    return _parse(shipped[name])


def list_suites() -> list[Suite]:
    """Every shipped suite, by name."""
    return [_parse(file) for _, file in sorted(_shipped().items())]


def _shipped() -> dict[str, Traversable]:
    found = files("erasure.prompts.suites").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in found if file.name.endswith(".yaml")}


def _parse(file: Traversable) -> Suite:
    try:
        return Suite.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ErasureError(f"suite {file.name}: {problems}") from error
