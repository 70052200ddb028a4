"""``erasure generate``: images of an artefact, or of the base, for a suite."""

import json as jsonlib

from .drawing import draw
from .options import Base, Component, DryRun, Engine, Folder, Images, Json, What
from .output import plan
from .rows import foretold, open_bench


def generate(
    artefact: str,
    base: Base,
    images: Images,
    what: What = What(),
    *,
    out: Folder,
    shard: str = "1/1",
    engine: Engine = "local",
    component: Component = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Make a suite's images with an artefact, or with the base.

    A killed run goes on where it stopped.

    Parameters
    ----------
    artefact: Folder that `erasure erase` wrote, or "base"; suites that depend on the concept then take it from --concept.
    out: Folder of the images; `erasure evaluate` with the same --out scores them.
    shard: Part i/n of the chunks, for several machines on one folder.
    """
    from erasure.eval.store import parse_shard

    part = parse_shard(shard)
    if dry_run and foretold(artefact, base, images, what, json, component=component):
        return
    run, name, eraser = open_bench(artefact, base, images, what, out, json, component)
    if dry_run:
        plan(run, 1, json)
        return
    cells = draw(run, {name: eraser}, base, artefact, engine, part)
    if not cells:
        return
    cell = cells[name]
    missing = sum(len(c.rows) for c in cell.missing())
    if json:
        print(jsonlib.dumps({"folder": str(cell.folder), "images": len(run.rows), "missing": missing}))
        return
    print(f"{len(run.rows)} images in {cell.folder}, {missing} still missing")
