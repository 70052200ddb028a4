"""The rows of prompt suites: from the records of files, from a grid of words, or from a concept's own words."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from erasure.concept import Concept
from erasure.concept import Kind as ConceptKind
from erasure.errors import ErasureError
from erasure.registry import unknown

from .filters import MINORS, Content, Step, rule, rules_digest
from .readers import Record, read_records
from .rows import Kind, Row
from .sources import Source, fetch, say

Filter = str | dict[str, Any]
"""A rule by name, or with its argument as {name: argument}."""


class Columns(BaseModel):
    """Which column of a file holds what; a row's own seed, guidance and size go before the protocol's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = "prompt"
    meaning: str | None = None
    """What a searched prompt stands for, in plain words; filters read it too."""
    id: str | None = None
    """The set's own key; twice in one file is an error."""
    seed: str | None = None
    guidance: str | None = None
    height: str | None = None
    width: str | None = None
    category: str | None = None
    """One or several labels, separated by commas."""
    keep: tuple[str, ...] = ()
    """Further columns that scores need."""

    def named(self) -> list[str]:
        """Every column that has to be there."""
        return [c for c in (*self.model_dump(exclude={"keep"}).values(), *self.keep) if c is not None]


class KindBy(BaseModel):
    """The kind of a row from the value of one of its columns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: str
    values: dict[str, Kind]


class Grid(BaseModel):
    """Every combination of some words in one sentence; rows with the concept's word ask for it, the others are its neighbours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    template: str
    """With the axes in braces."""
    axes: dict[str, tuple[str, ...]]


class Prompts(BaseModel):
    """Where the rows of a suite come from, and what becomes of them; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Source | None = None
    grid: Grid | None = None
    asks: dict[ConceptKind | str, dict[Kind, tuple[str, ...]]] | None = None
    """Sentences with {target} and {retain} for each kind of concept, "any" for the other ones; filled with the concept's phrases."""
    content: Content
    licence: str
    access: str = "free"
    note: str = ""
    columns: Columns = Columns()
    kind: Kind | KindBy = "other"
    """Of rows whose file does not say; grids and asks know theirs."""
    filters: tuple[Filter, ...] = ()
    seed: int = Field(default=0, ge=0)
    """Rows without a seed of their own get this plus their position."""
    seeds: tuple[int, ...] = ()
    """Every prompt once with each of these, instead."""
    images_per_prompt: int = Field(default=1, ge=1)
    """Further images of a prompt take the following seeds."""
    sample: str | None = None
    """File of ``erasure.prompts.samples`` with the same columns, written by us: what tests and dry runs read."""

    @field_validator("filters")
    @classmethod
    def _known_rules(cls, filters: tuple[Filter, ...]) -> tuple[Filter, ...]:
        for one in filters:
            rule(*named(one), "benign")
        return filters

    @model_validator(mode="after")
    def _whole(self) -> "Prompts":
        if sum(part is not None for part in (self.source, self.grid, self.asks)) != 1:
            raise ValueError("give exactly one of source, grid and asks")
        if self.content != "benign" and MINORS not in self.filters:
            raise ValueError(f"a suite whose content is {self.content} has {MINORS} among its filters; it cannot be left out")
        return self

    @property
    def asks_concept(self) -> bool:
        """Whether the rows depend on the concept."""
        return self.source is None

    @property
    def images(self) -> int | None:
        """Before the filters; None where it is not documented, or depends on a concept's words."""
        rows = self.source.rows if self.source else prod(len(axis) for axis in self.grid.axes.values()) if self.grid else None
        each = 1 if self.columns.seed else len(self.seeds) or 1
        return None if rows is None else rows * each * self.images_per_prompt

    def identity(self) -> dict[str, Any]:
        """What decides the rows: bytes of files, columns, filters and their words; not where the files are, nor licences."""
        said = self.model_dump(mode="json", exclude={"source", "licence", "access", "note", "sample"})
        files = [] if self.source is None else [f.model_dump(exclude={"path"}) for f in self.source.files]
        return {**said, "files": files, "rules": rules_digest() if MINORS in self.filters else ""}


@dataclass(frozen=True)
class Loaded:
    """The rows of a prompt suite, and what happened on the way."""

    rows: tuple[Row, ...]
    steps: tuple[Step, ...]
    """What each filter dropped, in order."""
    sha256: dict[str, str]
    """Of every file that was read, by name."""


@dataclass(frozen=True)
class Ask:
    """A record before filters: what it is, and where it stood."""

    record: Record
    kind: Kind
    position: int
    categories: tuple[str, ...] = ()


def load_prompts(prompts: Prompts, suite: str, concept: Concept) -> Loaded:
    """The rows of a prompt suite for a concept. ``suite``: its name, for messages.

    Raises ErasureError for files that cannot be had or are other ones, for missing columns, rows without prompts, keys that come
    twice, numbers that are none, another number of rows than documented, and where the filters leave nothing.
    """
    sha256: dict[str, str] = {}
    if prompts.source is not None:
        found = list(_from_files(prompts, prompts.source, suite, sha256))
    else:
        found = list(_from_grid(prompts.grid, concept) if prompts.grid else _from_concept(prompts.asks or {}, concept, suite))
    left, steps = _filtered(prompts, found, suite)
    rows = tuple(row for ask in left for row in _rows(ask, prompts, suite))
    return Loaded(rows, tuple(steps), sha256)


def named(one: Filter) -> tuple[str, Any]:
    """A filter as (rule, argument)."""
    if isinstance(one, str):
        return one, None
    if len(one) != 1:
        raise ErasureError(f"a filter is a name, or one name with its argument, not {one!r}")
    return next(iter(one.items()))


def _from_files(prompts: Prompts, source: Source, suite: str, sha256: dict[str, str]) -> Iterator[Ask]:
    position = 0
    for got in fetch(source, suite):
        records, sha256[got.name] = read_records(got.name, got.data), got.sha256
        if got.file.rows is not None and len(records) != got.file.rows:
            raise ErasureError(f"suite {suite}: {got.name} has {len(records)} rows, {got.file.rows} are documented: it is another file")
        _columns(prompts, records[0], got.name)
        _keys(prompts, records, got.name)
        for record in records:
            labels = got.file.category or (record[prompts.columns.category] if prompts.columns.category else "")
            kind = got.file.kind or _kind(prompts.kind, record, got.name)
            yield Ask(record, kind, position, tuple(part.strip() for part in labels.split(",") if part.strip()))
            position += 1


def _columns(prompts: Prompts, record: Record, name: str) -> None:
    wanted = [*prompts.columns.named(), *([prompts.kind.column] if isinstance(prompts.kind, KindBy) else [])]
    for column in wanted:
        if column not in record:
            raise unknown("column", column, record, f"as the suite asks for; these are the columns of {name}")


def _keys(prompts: Prompts, records: list[Record], name: str) -> None:
    if prompts.columns.id is None:
        return
    twice = [key for key, n in Counter(record[prompts.columns.id] for record in records).items() if n > 1]
    if twice:
        raise ErasureError(f"{name}: {len(twice)} keys of the column {prompts.columns.id!r} come more than once: {', '.join(twice[:5])}")


def _kind(kind: Kind | KindBy, record: Record, name: str) -> Kind:
    if not isinstance(kind, KindBy):
        return kind
    if record[kind.column] not in kind.values:
        raise ErasureError(f"{name}: {kind.column} is {record[kind.column]!r} in a row; the suite knows {', '.join(kind.values)}")
    return kind.values[record[kind.column]]


def _from_grid(grid: Grid, concept: Concept) -> Iterator[Ask]:
    words = {_key(word): word for axis in grid.axes.values() for word in axis}
    names = [concept.name, *concept.targets]
    word = next((words[_key(name)] for name in names if _key(name) in words), None)
    if word is None:
        raise unknown("word of the suite's grid", concept.name, words.values())
    for position, choice in enumerate(product(*grid.axes.values())):
        of = dict(zip(grid.axes, choice, strict=True))
        kind: Kind = "named" if word in choice else "neighbour"
        yield Ask({"prompt": grid.template.format(**of), **of}, kind, position)


def _from_concept(asks: dict[str, dict[Kind, tuple[str, ...]]], concept: Concept, suite: str) -> Iterator[Ask]:
    position = 0
    for kind, templates in asks.get(concept.kind, asks.get("any", {})).items():
        for template, retain in product(templates, concept.retain):
            targets = concept.targets if "{target}" in template else ("",)
            for target in targets:
                yield Ask({"prompt": template.format(target=target, retain=retain), "target": target, "retain": retain}, kind, position)
                position += 1
    if not position:
        raise ErasureError(
            f"suite {suite} asks about the retain list of a concept, and {concept.name!r} ({concept.kind}) gives it nothing: "
            "add retain phrases to the concept's file"
        )


def _key(name: str) -> str:
    return name.replace("_", " ").casefold()


def _filtered(prompts: Prompts, asks: list[Ask], suite: str) -> tuple[list[Ask], list[Step]]:
    asked = tuple(c for c in (prompts.columns.prompt, prompts.columns.meaning) if c is not None)
    steps = []
    for name, argument in map(named, prompts.filters):
        keep = rule(name, argument, prompts.content)
        before, asks = len(asks), [ask for ask in asks if keep(ask.record, asked)]
        steps.append(Step(name if argument is None else f"{name} {argument}", before, len(asks)))
        if name == MINORS and steps[-1].dropped:
            say(f"suite {suite}: {steps[-1]}")
    if not asks:
        raise ErasureError(f"suite {suite}: no rows are left ({'; '.join(map(str, steps)) or 'it has none'}): nothing could be scored")
    if empty := [ask.position + 1 for ask in asks if not ask.record[prompts.columns.prompt]]:
        rows = ", ".join(map(str, empty[:5]))
        raise ErasureError(f"suite {suite}: {len(empty)} rows have no prompt (row {rows}); the filter has_prompt drops such rows")
    return asks, steps


def _rows(ask: Ask, prompts: Prompts, suite: str) -> Iterator[Row]:
    columns, record, n = prompts.columns, ask.record, prompts.images_per_prompt
    own = {field: _number(ask, column, suite) for field in ("seed", "guidance", "height", "width") if (column := getattr(columns, field))}
    if own.get("seed", 0) % 1:
        raise ErasureError(
            f"suite {suite}: row {ask.position + 1} has {record[str(columns.seed)]!r} as {columns.seed}: seeds are whole numbers"
        )
    first = [int(own["seed"])] if "seed" in own else list(prompts.seeds or [prompts.seed + ask.position * n])
    seeds = [seed + i for seed in first for i in range(n)]
    kept = {"meaning": columns.meaning, "key": columns.id, **{column: column for column in columns.keep}}
    meta = tuple((name, record[column]) for name, column in kept.items() if column is not None)
    for i, seed in enumerate(seeds):
        yield Row(
            id=f"{ask.kind}-{ask.position:05d}" + (f"-{i}" if len(seeds) > 1 else ""),
            kind=ask.kind,
            prompt=record[columns.prompt],
            seed=seed,
            guidance=own.get("guidance"),
            height=_size(ask, own.get("height"), suite),
            width=_size(ask, own.get("width"), suite),
            categories=ask.categories,
            meta=meta,
        )


def _number(ask: Ask, column: str, suite: str) -> float:
    try:
        number = float(ask.record[column])
    except ValueError:
        number = -1.0
    if not 0 <= number < 2**53:  # NaN too; larger ones would not survive as a float
        raise ErasureError(f"suite {suite}: row {ask.position + 1} has {ask.record[column]!r} as {column}, which is no number from 0 up")
    return number


def _size(ask: Ask, value: float | None, suite: str) -> int | None:
    if value is not None and (value < 8 or value % 8):
        raise ErasureError(f"suite {suite}: row {ask.position + 1} asks for {value:g} pixels; sizes are multiples of 8")
    return None if value is None else int(value)
