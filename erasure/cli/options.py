"""Options that several verbs share, and what they stand for."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from ..concept import Concept, Kind, load
from ..errors import ErasureError
from .output import chatty


def _can_hold(_: Any, out: Path) -> None:
    """Said before any work: an output folder is a folder that can be made, or written to."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if os.path.lexists(p))
    if not place.is_dir():
        raise ValueError(f"{place} is a file; choose another folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{place} may not be written to; choose another folder, or change its permissions.")


Out = Annotated[Path, Parameter(help="Folder of the artefact.", validator=_can_hold)]
Folder = Annotated[Path, Parameter(validator=_can_hold)]
Seed = Annotated[int, Parameter(help="Seed of the fit.", validator=Number(gte=0))]
Json = Annotated[bool, Parameter(help="Print JSON.", negative=())]
DryRun = Annotated[bool, Parameter(help="Say what would be done, and stop.", negative=())]
Component = Annotated[
    str | None,
    Parameter(
        help="What alone must be that of the artefact's base, where the artefact changes nothing else: an erased text_encoder plugs into "
        "every pipeline that has the same one, of another family too."
    ),
]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
Engine = Annotated[
    Literal["local", "ray"], Parameter(help="Who makes the images: this process (or its launcher's ranks), or a Ray cluster's workers.")
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model."""

    model: str
    """Embedded model ("canvas", "canvas-flow"), hub id, diffusers folder or .safetensors checkpoint."""
    base_config: str | None = None
    """Folder with the configuration of a single-file checkpoint."""
    device: str | None = None
    """cuda where there is one, else cpu."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the weights and images."""

    def load(self) -> Any:
        import diffusers.utils.logging
        import transformers.utils.logging

        from erasure.eval.engines.ranks import Rank

        from ..models import load_base

        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()  # ours are the ones to look at
            if not chatty(json=False):
                library.utils.logging.set_verbosity_error()
        return load_base(**self.arguments() | {"device": Rank.here().device(self.device)})

    def arguments(self) -> dict[str, Any]:
        """Those of ``load_base``."""
        return {"model": self.model, "device": self.device, "dtype": self.dtype, "base_config": self.base_config}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Images:
    """How images are made; a change to the suite's protocol changes its hash, and such rows are never ranked with others."""

    suite: str
    """Suite by name or .yaml file; see `erasure suites`."""
    prompts: Path | None = None
    """File or folder with the suite's prompts, instead of its source; other bytes than pinned make another suite."""
    limit: Positive | None = None
    """Make about this many images a row, every kind in proportion; the table is then not ranked."""
    steps: Positive | None = None
    """Sampling steps, instead of the protocol's."""
    guidance: Annotated[float, Parameter(validator=Number(gte=0))] | None = None
    """Guidance scale, instead of the protocol's."""
    batch_size: Positive = 32
    """Images per call of the pipeline."""

    def load(self) -> Any:
        from erasure.eval.suite import load_suite

        suite = load_suite(self.suite)
        suite = suite if self.prompts is None else suite.with_prompts(self.prompts)
        changes = {key: value for key, value in (("steps", self.steps), ("guidance", self.guidance)) if value is not None}
        suite = suite.under(**changes) if changes else suite
        return suite if self.limit is None else suite.limited(self.limit)


Repeat = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class What:
    """The concepts: named ones, or one made of --target, --anchor, --retain."""

    concept: Repeat = ()
    """Name of a shipped concept, a .yaml file, or a word of the canvas; repeat for several."""
    target: Repeat = ()
    """Phrase to erase, for a concept of your own."""
    anchor: Repeat = ()
    """What it should become; one for all targets, or one each."""
    retain: Repeat = ()
    """Phrase that must survive."""
    kind: Kind = "object"
    """Sort of a concept of your own."""

    @property
    def named(self) -> bool:
        """Whether any concept is."""
        return bool(self.concept or self.target)

    def concepts(self, model: str) -> tuple[Concept, ...]:
        from ..models import EMBEDDED

        if twice := [name for name in self.concept if self.concept.count(name) > 1]:
            raise ErasureError(f"--concept {twice[0]} is given twice; once is enough")
        named = tuple(load(name, canvas=model in EMBEDDED) for name in self.concept)
        if not self.target:
            if self.anchor or self.retain:
                raise ErasureError("--anchor and --retain belong to --target")
            if not named:
                raise ErasureError("nothing to erase: give --concept or --target")
            return named
        own = Concept(self.target[0], kind=self.kind, targets=self.target, anchors=self.anchor or ("",), retain=self.retain)
        return (*named, own)


PIPED = 10_000
"""Columns of a table that nobody looks at through a window."""


def emit(data: Any, as_json: bool, columns: tuple[str, ...] = ()) -> None:
    """Print records (a list of dicts) as a table of ``columns``, or anything as JSON.

    On a terminal all columns but the first fold; into a pipe or a file, a record is one line, however long.
    """
    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[:1]:
        column.no_wrap = True  # names are there to be copied
    for record in data:
        table.add_row(*(Text(_cell(record[c])) for c in columns))
    Console(width=None if sys.stdout.isatty() else PIPED).print(table)


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, (list, tuple)) else str(value)
