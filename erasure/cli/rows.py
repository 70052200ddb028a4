"""An artefact, or the base, as a row of a table."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..concept import Concept
from ..errors import ErasureError
from .options import Base, Images, What
from .output import chatty

if TYPE_CHECKING:
    from ..method import Eraser


def open_bench(
    artefact: str, base: Base, images: Images, what: What, out: Path, json: bool, component: str | None = None
) -> "tuple[Any, str, Eraser | None]":
    """The run folder of an artefact's concept, the name of its row, and the eraser, checked against the base it goes on.

    Whatever can be wrong without the base is said before the base is loaded.
    """
    from erasure.eval.bench import BASE, Bench

    from .. import artifact

    suite = images.load()
    eraser = _eraser(artefact, component)
    name = BASE
    if eraser is not None:
        name = row_name(artefact)
        if name == BASE:
            raise ErasureError(f"{artefact}: a folder called {BASE!r} would be taken for the base; rename it")
    elif suite.asks_concept and not what.named:
        raise ErasureError("the base has no concept of its own: say with --concept what the suite asks about")
    concept = _concept(suite, eraser, what, base.model)
    suite.rows(concept)
    pipe = base.load()
    suite = suite.fitting(pipe)
    if eraser is not None:
        artifact.verify(artefact, pipe, component=component)
    return Bench(out, pipe, base.model, suite, concept, images.batch_size, progress=chatty(json)), name, eraser


def row_name(artefact: str) -> str:
    """What an artefact, or the base, is called in tables: its folder's name."""
    return Path(artefact).resolve().name if artefact != "base" else artefact


def foretold(
    artefact: str,
    base: Base,
    images: Images,
    what: What,
    json: bool,
    more: dict[str, Any] | None = None,
    component: str | None = None,
) -> bool:
    """Say what a dry run on a prompt suite would make, without the model; False, and nothing said, where only the model can tell.

    more: what else to say.
    """
    from .suites import walk_through

    suite = images.load()
    if suite.prompts is None:
        return False
    needed = component is not None or (suite.asks_concept and not what.named)
    walk_through(suite, _concept(suite, _eraser(artefact, component) if needed else None, what, base.model), json, more)
    return True


def _eraser(artefact: str, component: str | None) -> "Eraser | None":
    """An artefact's eraser, checked against the component that it may change; None for the base."""
    from .. import artifact

    if artefact != "base":
        return artifact.load_eraser(artefact, component)[0]
    if component is not None:
        raise ErasureError("--component is for an artefact on another base than its own, and the base is none: leave it out")
    return None


def _concept(suite: Any, eraser: "Eraser | None", what: What, model: str) -> Concept:
    """The concept that was named, else the artefact's, else the suite's own where its rows depend on none."""
    if what.named:
        return _only(what.concepts(model))
    if eraser is not None and (suite.asks_concept or len(eraser.concepts) == 1):
        return _only(eraser.concepts)
    return suite.default_concept()


def _only(concepts: tuple[Concept, ...]) -> Concept:
    if len(concepts) != 1:
        raise ErasureError(f"a suite asks about one concept, not {len(concepts)}: choose one with --concept")
    return concepts[0]
