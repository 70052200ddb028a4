"""Options that several verbs share, and what they stand for."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from ..concept import Concept, Kind, load
from ..errors import ErasureError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model."""

    model: str
    """Embedded model ("canvas"), hub id, diffusers folder or .safetensors checkpoint."""
    base_config: str | None = None
    """Folder with the configuration of a single-file checkpoint."""
    device: str | None = None
    """cuda where there is one, else cpu."""
    dtype: str = "float32"
    """float32, float16 or bfloat16."""

    def load(self) -> Any:
        import diffusers.utils.logging
        import transformers.utils.logging

        from ..models import load_base

        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()  # ours are the ones to look at
        return load_base(self.model, device=self.device, dtype=self.dtype, base_config=self.base_config)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Images:
    """How images are made; a change to the suite's protocol changes its hash, and such rows are never ranked with others."""

    suite: str
    """Suite by name or .yaml file; see `erasure suites`."""
    limit: int | None = None
    """Make about this many images a row, every kind in proportion; the table is then not ranked."""
    steps: int | None = None
    """Sampling steps, instead of the protocol's."""
    guidance: float | None = None
    """Guidance scale, instead of the protocol's."""
    batch_size: int = 32
    """Images per call of the pipeline."""

    def load(self) -> Any:
        from erasure.eval.suite import load_suite

        suite = load_suite(self.suite)
        changes = {key: value for key, value in (("steps", self.steps), ("guidance", self.guidance)) if value is not None}
        suite = suite.under(**changes) if changes else suite
        return suite if self.limit is None else suite.limited(self.limit)


Repeat = Annotated[tuple[str, ...], Parameter(negative=())]


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

    def concepts(self, model: str) -> tuple[Concept, ...]:
        named = tuple(load(name, canvas=model == "canvas") for name in self.concept)
        if not self.target:
            if self.anchor or self.retain:
                raise ErasureError("--anchor and --retain belong to --target")
            if not named:
                raise ErasureError("nothing to erase: give --concept or --target")
            return named
        own = Concept(self.target[0], kind=self.kind, targets=self.target, anchors=self.anchor or ("",), retain=self.retain)
        return (*named, own)


def emit(data: Any, as_json: bool, columns: tuple[str, ...] = ()) -> None:
    """Print records (a list of dicts) as a table of ``columns``, or anything as JSON."""
    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return
    table = Table(*columns, box=None, pad_edge=False)
    for record in data:
        table.add_row(*(_cell(record[c]) for c in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, (list, tuple)) else str(value)
