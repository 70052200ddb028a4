"""``erasure evaluate``: generate what is missing, score, and compare with the base."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..errors import ErasureError
from .drawing import draw
from .options import Base, Component, DryRun, Engine, Folder, Images, Json, What
from .output import plan, show
from .rows import foretold, open_bench, row_name
from .scores import Scores, needs


def evaluate(
    artefact: str,
    base: Base,
    images: Images,
    what: What = What(),
    scores: Scores = Scores(),
    *,
    out: Folder,
    engine: Engine = "local",
    component: Component = None,
    update_card: Annotated[bool, Parameter(negative=())] = False,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Score an artefact on a suite against the base.

    Images that exist are not made again, and detections are not asked for twice: another recipe on them takes seconds.

    Parameters
    ----------
    artefact: Folder that `erasure erase` wrote, or "base" with --concept.
    out: Folder of images and results; the rows of several artefacts may share one.
    update_card: Write the table and the results' metadata into the artefact's README.md.
    """
    from erasure.eval.bench import BASE

    from .. import artifact

    if update_card and artefact == BASE:
        raise ErasureError("--update-card writes to an artefact's README.md, and the base is none: give the artefact's folder")
    if update_card and component is not None:
        raise ErasureError("--update-card writes what the artefact does to its own base, and --component is for others: give one of them")
    suite = images.load()
    choice = scores.choose(suite, [out / "images" / name for name in dict.fromkeys((BASE, row_name(artefact)))])
    if dry_run and foretold(artefact, base, images, what, json, needs(base.model, suite, choice), component):
        return
    run, name, eraser = open_bench(artefact, base, images, what, out, json, component)
    if dry_run:
        plan(run, 1 if eraser is None else 2, json)
        return
    run = replace(run, choice=choice, workers=scores.workers)
    choice.require(len(run.rows))
    cells = draw(run, {BASE: None, name: eraser}, base, artefact, engine)
    if not cells:
        return
    run.evaluate(BASE, cells[BASE])
    if eraser is not None:
        run.evaluate(name, cells[name], artifact.read_config(Path(artefact)))
    table = run.report(cells)
    if update_card:
        from erasure.eval.cards import update

        update(Path(artefact), table, name)
    show(table, out, json)
