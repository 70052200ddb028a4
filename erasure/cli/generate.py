"""``erasure generate``: images of an artefact, or of the base, for a suite."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .options import Base, Images, What
from .output import plan
from .rows import open_bench


def generate(
    artefact: str,
    base: Base,
    images: Images,
    what: What = What(),
    *,
    out: Path,
    shard: str = "1/1",
    dry_run: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Make a suite's images with an artefact, or with "base"; a killed run goes on where it stopped.

    Example: erasure generate out/dagger-uce --model canvas --suite canvas --out out/eval --shard 1/4

    Parameters
    ----------
    artefact: Folder that `erasure erase` wrote, or "base" with --concept.
    out: Folder of the images; `erasure evaluate` with the same --out scores them.
    shard: Part i/n of the chunks, for several machines on one folder.
    dry_run: Print how many images, minutes and megabytes this takes, and stop.
    """
    from erasure.eval.store import parse_shard

    run, name, eraser = open_bench(artefact, base, images, what, out)
    if dry_run:
        plan(run, 1, json=False)
        return
    cell = run.generate(name, eraser, parse_shard(shard))
    print(f"{len(run.rows)} images in {cell.folder}, {sum(len(c.rows) for c in cell.missing())} still missing")
