"""``erasure evaluate``: generate what is missing, score, and compare with the base."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .options import Base, Images, What
from .output import show
from .rows import open_bench


def evaluate(
    artefact: str,
    base: Base,
    images: Images,
    what: What = What(),
    *,
    out: Path,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Score an artefact on a suite against the base; images that exist are not made again.

    Example: erasure evaluate out/dagger-uce --model canvas --suite canvas --out out/eval

    Parameters
    ----------
    artefact: Folder that `erasure erase` wrote, or "base" with --concept.
    out: Folder of images and results; the rows of several artefacts may share one.
    json: Print the comparison as JSON.
    """
    from erasure.eval.bench import BASE

    from .. import artifact

    run, name, eraser = open_bench(artefact, base, images, what, out)
    cells = {BASE: run.generate(BASE)}
    run.evaluate(BASE, cells[BASE])
    if eraser is not None:
        cells[name] = run.generate(name, eraser)
        run.evaluate(name, cells[name], artifact.read_config(Path(artefact))["cost"].get("fit_seconds"))
    show(run.report(cells), out, json)
