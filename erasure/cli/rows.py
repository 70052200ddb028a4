"""An artefact, or the base, as a row of a table."""

from pathlib import Path
from typing import Any

from ..concept import Concept
from ..errors import ErasureError
from ..method import Eraser
from .options import Base, Images, What


def open_bench(artefact: str, base: Base, images: Images, what: What, out: Path) -> tuple[Any, str, Eraser | None]:
    """The run folder of an artefact's concept, the name of its row, and the eraser, checked against the base it goes on."""
    from erasure.eval.bench import BASE, Bench

    from .. import artifact

    pipe = base.load()
    eraser: Eraser | None = None
    if artefact == BASE:
        concept = _only(what.concepts(base.model))
    else:
        artifact.verify(artefact, pipe)
        eraser, _ = artifact.load_eraser(artefact)
        concept = _only(what.concepts(base.model) if what.concept or what.target else eraser.concepts)
    name = BASE if eraser is None else eraser.method.name if Path(artefact).parent.name == "artefacts" else Path(artefact).name
    if eraser is not None and name == BASE:
        raise ErasureError(f"{artefact}: a folder called {BASE!r} would be taken for the base; rename it")
    return Bench(out, pipe, base.model, images.load(), concept, images.batch_size), name, eraser


def _only(concepts: tuple[Concept, ...]) -> Concept:
    if len(concepts) != 1:
        raise ErasureError(f"a suite asks about one concept, not {len(concepts)}: choose one with --concept")
    return concepts[0]
