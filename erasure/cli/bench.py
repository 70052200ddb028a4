"""``erasure bench``: base and methods on a suite, from nothing to table and report."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..errors import ErasureError
from .options import Base, DryRun, Folder, Images, Json, Seed, What
from .output import chatty, plan, show
from .scores import Scores

if TYPE_CHECKING:
    from ..method import ErasureMethod


def bench(
    base: Base,
    images: Images,
    what: What = What(),
    scores: Scores = Scores(),
    *,
    methods: str,
    preset: str | None = None,
    out: Folder,
    seed: Seed = 0,
    grid: Annotated[bool, Parameter(negative=())] = False,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Erase, generate, score and compare, from nothing to table and report.

    A killed run goes on where it stopped. Several concepts are erased one by one, each in a folder of its own below --out.

    Parameters
    ----------
    methods: Names of methods, separated by commas; `name.yaml` files give a method and its settings.
    preset: Preset of those methods that have one of this name (canvas, paper, ...), named without a file.
    out: Folder of artefacts, images, results, table and report.
    grid: Print where the matched-seed grid is drawn (grid.png).
    """
    from erasure.eval.bench import Bench

    chosen = parse_methods(methods, preset)
    concepts, suite = what.concepts(base.model), images.load()
    for concept in concepts:
        suite.rows(concept)  # a concept that the suite does not know is said before the base is loaded
    choice = scores.choose(suite, [])
    pipe = base.load()
    suite = suite.fitting(pipe)
    command = shlex.join(["erasure", *sys.argv[1:]])
    for concept in concepts:
        folder = out if len(concepts) == 1 else out / concept.name.replace(" ", "-")
        run = Bench(folder, pipe, base.model, suite, concept, images.batch_size, seed, chatty(json), choice, scores.workers)
        if dry_run:
            plan(run, 1 + len(chosen), json)
            continue
        table = run.run(chosen, [command])
        show(table, folder, json, grid)


def parse_methods(text: str, preset: str | None = None) -> "list[ErasureMethod]":
    """Methods by their names and files, separated by commas; none, or one twice, is an error, since rows bear the method's name.

    ``preset`` is for those among them that have one of this name; where none has, it is an error.
    """
    chosen = [parse_method(name, preset) for part in text.split(",") if (name := part.strip())]
    if preset is not None and not any(preset in method.PRESETS for method in chosen):
        known = sorted({name for method in chosen for name in method.PRESETS}) or ["none"]
        raise ErasureError(f"--preset {preset}: none of these methods has it (presets: {', '.join(known)})")
    if not chosen:
        raise ErasureError("--methods is empty; see `erasure methods`")
    names = [method.name for method in chosen]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ErasureError(f"--methods has {twice[0]} twice; compare two settings of a method by two runs, each with its own --out")
    return chosen


def parse_method(name: str, preset: str | None = None) -> "ErasureMethod":
    """A method by name with its defaults, or from a YAML file ``{method: NAME, field: value, ...}``."""
    from ..reading import read_yaml
    from ..registry import methods

    if not name.endswith((".yaml", ".yml")):
        found = methods.get(name)
        return found.from_config({"preset": preset} if preset in found.PRESETS else {})
    if not Path(name).is_file():
        raise ErasureError(f"no method file {name}; check the path, or give a name from `erasure methods`")
    config = read_yaml(Path(name), name)
    if not isinstance(config, dict) or not isinstance(config.get("method"), str):
        raise ErasureError(f"{name} does not say which method: it needs a key `method` with a name from `erasure methods`")
    return methods.get(config.pop("method")).from_config(config)
