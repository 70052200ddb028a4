"""A suite: how many prompts of which kind, under which protocol. Its rows follow from files, or from a concept alone."""

from collections import Counter
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from erasure.concept import Concept
from erasure.concept import load as load_concept
from erasure.errors import ErasureError
from erasure.reading import problems, read_yaml
from erasure.registry import unknown

from .prompt_rows import Columns, Loaded, Prompts, load_prompts
from .protocol import Protocol, digest, is_flow
from .rows import KINDS, Kind, Row
from .sources import Source, local

CANVAS: tuple[Kind, ...] = ("named", "pair", "implied", "neighbour", "other")
"""Kinds that the canvas has rows of."""


class Suite(BaseModel):
    """Prompts, seeds and protocol of one evaluation; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int = Field(ge=1)
    summary: str
    source: Literal["canvas", "prompts"]
    """Where the rows come from."""
    ranked: bool
    """Whether it has enough images to call one method better than another."""
    counts: dict[Kind, int] = Field(default={}, validate_default=True)
    """Images of each kind. For prompt suites: after the filters, as counted when the files were pinned; empty if nobody could."""
    protocol: Protocol
    flow: dict[str, Any] = {}
    """What of the protocol is otherwise for flow-matching models (SD 3, FLUX), which the other schedulers do not fit."""
    prompts: Prompts | None = None
    concept: str | None = None
    """The shipped concept that its rows ask for, where they do not depend on one."""
    recipes: tuple[str, ...] = ()
    """Names of the recipes that score it unless others are asked for; not part of its identity, as images are scored often."""
    metrics: tuple[str, ...] = ()
    """Names of the metrics, likewise."""
    limit: int | None = None
    """At most about so many images, every kind in proportion; set by ``limited``."""

    @field_validator("counts")
    @classmethod
    def _some_rows(cls, counts: dict[Kind, int], info: ValidationInfo) -> dict[Kind, int]:
        if any(n < 0 for n in counts.values()) or (counts and not sum(counts.values())):
            raise ValueError("an empty suite: counts are at least 0, and one of them has to be more")
        if info.data.get("source") == "canvas" and not counts:
            raise ValueError("Field required where the source is the canvas")
        return counts

    @model_validator(mode="after")
    def _whole(self) -> "Suite":
        if self.source == "prompts":
            if self.prompts is None or self.protocol.judge is not None:
                raise ValueError("source: prompts comes with a block prompts, and without a canvas judge")
        elif self.prompts is not None or self.protocol.judge is None:
            raise ValueError("source: canvas comes with a judge, and without a block prompts")
        elif strange := [kind for kind in self.counts if kind not in CANVAS]:
            raise ValueError(f"the canvas has no {', '.join(strange)} rows, but {', '.join(CANVAS)}")
        return self

    @property
    def size(self) -> int | None:
        """Images of one row of the table; before the filters where nobody counted, None where that is unknown too."""
        whole = sum(self.counts.values()) or (self.prompts.images if self.prompts else None)
        return whole if self.limit is None else self.limit if whole is None else min(whole, self.limit)

    @property
    def asks_concept(self) -> bool:
        """Whether the rows depend on the concept."""
        return self.prompts is None or self.prompts.asks_concept

    @property
    def hash(self) -> str:
        identity: dict[str, Any] = self.model_dump(include={"name", "version", "source", "ranked", "counts"})
        if self.prompts is not None:
            identity |= {"prompts": self.prompts.identity(), "limit": self.limit}
        return digest({**identity, "protocol": self.protocol.hash})

    def rows(self, concept: Concept) -> list[Row]:
        """The suite's images for a concept, the same every time; a concept from outside the suite's world raises UnknownName."""
        if self.prompts is None:
            from .canvas_rows import canvas_rows

            return canvas_rows(concept.name, self.counts)
        return list(self.load(concept).rows)

    def load(self, concept: Concept) -> Loaded:
        """The rows of a prompt suite, with what each filter dropped and the hashes of the files; see ``load_prompts``."""
        if self.prompts is None:
            raise ErasureError(f"suite {self.name} has no files of prompts: its rows come from the canvas")
        loaded = load_prompts(self.prompts, self.name, concept)
        found = dict(Counter(row.kind for row in loaded.rows))
        if self.counts and found != {kind: n for kind, n in self.counts.items() if n}:
            raise ErasureError(
                f"suite {self.name}: its filters left {found}, documented are {self.counts}: correct counts, with a new version"
            )
        return loaded if self.limit is None else Loaded(_spread(loaded.rows, self.limit), loaded.steps, loaded.sha256)

    def default_concept(self) -> Concept:
        """The concept to take where none is named; raises ErasureError where the rows depend on it."""
        if self.asks_concept:
            raise ErasureError(f"what suite {self.name} asks depends on the concept: give --concept or --target")
        return Concept(self.name, kind="content") if self.concept is None else load_concept(self.concept)

    def limited(self, images: int) -> "Suite":
        """A quick look at about that many images, every kind in proportion; never ranked, and its hash differs."""
        if images < 1:
            raise ErasureError(f"a limit of {images} images leaves nothing to score: give at least 1")
        if self.size is not None and images >= self.size:
            return self
        if self.prompts is not None:
            return self.model_copy(update={"limit": images, "ranked": False})
        whole = sum(self.counts.values())
        counts = {kind: max(round(n * images / whole), 1) if n else 0 for kind, n in self.counts.items()}
        return self.model_copy(update={"counts": counts, "ranked": False})

    def under(self, **changes: Any) -> "Suite":
        """The suite with changes to its protocol, such as ``steps=10``; what is set here goes for rows with their own value too."""
        try:
            changed = self.model_copy(update={"protocol": self.protocol.changed(**changes)})
        except ValidationError as error:
            raise ErasureError(f"suite {self.name}: {problems(error, Protocol.model_fields)}") from error
        return changed._prompts(columns=_without(self.prompts.columns, changes)) if self.prompts is not None else changed

    def fitting(self, pipe: Any) -> "Suite":
        """The suite under the protocol for the sort of model that a pipeline is; its hash tells the two apart."""
        return self.under(**self.flow) if self.flow and is_flow(pipe.scheduler) else self

    def with_prompts(self, path: Path) -> "Suite":
        """The suite on a local file, or on a folder with its files; other bytes than pinned make another suite, never ranked."""
        if self.prompts is None or self.prompts.source is None:
            raise ErasureError(f"suite {self.name} reads no file of prompts: leave out --prompts")
        return self._on(local(self.prompts.source, path))

    def sample(self) -> "Suite":
        """The suite on a few rows of the same columns that we wrote; for tests and dry runs, never ranked."""
        if self.prompts is None or self.prompts.source is None or self.prompts.sample is None:
            return self
        of, name = self.prompts.source, self.prompts.sample
        same = tuple(file.model_copy(update={"path": name, "sha256": None, "rows": None}) for file in of.files)
        return self._on(Source(package="samples", files=same)).model_copy(update={"name": f"{self.name}-sample"})

    def _on(self, source: Source) -> "Suite":
        pinned = [file.sha256 for file in self.prompts.source.files] if self.prompts and self.prompts.source else []
        changed = self._prompts(source=source)
        if [file.sha256 for file in source.files] == pinned and source.package is None:
            return changed
        return changed.model_copy(update={"counts": {}, "ranked": False})

    def _prompts(self, **update: Any) -> "Suite":
        return self.model_copy(update={"prompts": self.prompts and self.prompts.model_copy(update=update)})


def _without(columns: Columns, changes: dict[str, Any]) -> Columns:
    return columns.model_copy(update={key: None for key in ("guidance", "height", "width") if key in changes})


def _spread(rows: tuple[Row, ...], images: int) -> tuple[Row, ...]:
    """About so many rows, at even distances within each kind, in their order."""
    kept: set[str] = set()
    for kind in KINDS:
        of = [row for row in rows if row.kind == kind]
        n = min(len(of), max(round(len(of) * images / len(rows)), 1))
        kept |= {of[i * len(of) // n].id for i in range(n)}
    return tuple(row for row in rows if row.id in kept)


def load_suite(name: str) -> Suite:
    """A shipped suite by name, or any other by the path of its YAML file."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ErasureError(f"no suite file {name}; check the path")
        return _parse(path)
    shipped = _shipped()
    if name not in shipped:
        raise unknown("suite", name, sorted(shipped), "or give the path of a .yaml file")
    return _parse(shipped[name])


def list_suites() -> list[Suite]:
    """Every shipped suite, by name."""
    return [_parse(file) for _, file in sorted(_shipped().items())]


def _shipped() -> dict[str, Traversable]:
    found = files("erasure.prompts.suites").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in found if file.name.endswith(".yaml")}


def _parse(file: Traversable) -> Suite:
    try:
        return Suite.model_validate(read_yaml(file, f"suite {file.name}") or {})
    except ValidationError as error:
        raise ErasureError(f"suite {file.name}: {problems(error, (*Suite.model_fields, *Protocol.model_fields))}") from error
