"""Numbers as papers and boards printed them: shown apart, with source, table and protocol, and never ranked with anything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from erasure.errors import ErasureError
from erasure.reading import problems, read_yaml

HEADING = "As published, under other protocols"
WARNING = (
    "Printed by their authors, or by a third party's table; nothing here was measured by this suite. Seeds, detectors, prompt lists and "
    "FIDs differ from source to source: compare within one table alone."
)


class PublishedColumn(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: str = ""
    better: Literal["up", "down", ""]


class Published(BaseModel):
    """One table of one source; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Paper or board, with venue or address."""
    table: str
    """Which of its tables."""
    protocol: str
    """In words: model, prompts, detector, threshold, FID implementation, as far as the source says."""
    checked: Literal["source", "second-hand"]
    """Whether the numbers were read in the source, or in a note on it."""
    suites: tuple[str, ...] = Field(min_length=1)
    """Suites of ours that ask the nearest thing."""
    columns: dict[str, PublishedColumn] = Field(min_length=1)
    rows: dict[str, dict[str, FiniteFloat]] = Field(min_length=1)
    """Method -> column -> number, in the order of the source."""
    note: str = ""

    @model_validator(mode="after")
    def _columns_exist(self) -> "Published":
        for method, values in self.rows.items():
            if strange := set(values) - set(self.columns):
                raise ValueError(f"row {method} has {', '.join(sorted(strange))}, which is no column of the table")
            if not values:
                raise ValueError(f"row {method} has no numbers")
        return self

    @property
    def title(self) -> str:
        return f"{self.source}, {self.table}"

    @property
    def about(self) -> str:
        caution = "" if self.checked == "source" else " Second-hand: check the source before quoting."
        return f"Protocol: {' '.join(self.protocol.split())}" + (f" {' '.join(self.note.split())}" if self.note else "") + caution

    def heading(self, name: str) -> str:
        column = self.columns[name]
        return name + (f" ({column.unit})" if column.unit else "") + {"down": " ↓", "up": " ↑", "": ""}[column.better]

    def text(self, method: str, name: str) -> str:
        value = self.rows[method].get(name)
        return "-" if value is None else f"{value:g}"


def load_published(paths: Sequence[Path], suite: str) -> list[Published]:
    """The tables of some files, and those of folders that are about a suite. Raises ErasureError for a file that is none."""
    found = []
    for path in paths:
        if not path.exists():
            raise ErasureError(f"no published rows at {path}: give a .yaml file, or a folder of them such as docs/published")
        if path.is_dir() and not (files := sorted(path.glob("*.yaml"))):
            raise ErasureError(f"{path} holds no .yaml file of published rows")
        tables = [_parse(file) for file in (files if path.is_dir() else [path])]
        found += [table for table in tables if path.is_file() or suite in table.suites]
    return found


def _parse(path: Path) -> Published:
    try:
        return Published.model_validate(read_yaml(path, str(path)) or {})
    except ValidationError as error:
        raise ErasureError(f"{path}: {problems(error, (*Published.model_fields, *PublishedColumn.model_fields))}") from error
