"""``erasure bench``: base and methods on a suite, from nothing to table and report."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import ErasureError
from ..method import ErasureMethod
from .options import Base, Images, What
from .output import plan, show


def bench(
    base: Base,
    images: Images,
    what: What = What(),
    *,
    methods: str,
    out: Path,
    seed: int = 0,
    grid: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Erase, generate, score and compare; a killed run goes on where it stopped. Several concepts are erased one by one.

    Example: erasure bench --model canvas --concept dagger --methods negative_prompt,uce,safree --suite canvas-demo --out out/demo

    Parameters
    ----------
    methods: Names of methods, separated by commas; `name.yaml` files give a method and its settings.
    out: Folder of artefacts, images, results, table and report.
    seed: Seed of the fits.
    grid: Print where the matched-seed grid is drawn (grid.png).
    json: Print the comparison as JSON.
    dry_run: Print how many images, minutes and megabytes this takes, and stop.
    """
    from erasure.eval.bench import Bench

    chosen = [parse_method(name) for name in methods.split(",") if name]
    if not chosen:
        raise ErasureError("--methods is empty; see `erasure methods`")
    concepts, suite, pipe = what.concepts(base.model), images.load(), base.load()
    command = shlex.join(["erasure", *sys.argv[1:]])
    for concept in concepts:
        folder = out if len(concepts) == 1 else out / concept.name.replace(" ", "-")
        run = Bench(folder, pipe, base.model, suite, concept, images.batch_size, seed, progress=not json)
        if dry_run:
            plan(run, 1 + len(chosen), json)
            continue
        table = run.run(chosen, [command])
        show(table, folder, json, grid)


def parse_method(name: str) -> ErasureMethod:
    """A method by name with its defaults, or from a YAML file ``{method: NAME, field: value, ...}``."""
    import yaml

    from ..registry import methods

    if not name.endswith((".yaml", ".yml")):
        return methods.get(name).from_config({})
    if not Path(name).is_file():
        raise ErasureError(f"no method file {name}")
    config: dict[str, Any] = yaml.safe_load(Path(name).read_text()) or {}
    if "method" not in config:
        raise ErasureError(f"{name} does not say which method: it needs a key `method`")
    return methods.get(config.pop("method")).from_config(config)
