"""All methods on all test concepts of the canvas, as cells that resume: one cell is a model, a concept, a method and a fit seed.

    python benchmarks/canvas.py --minutes 60                      # make what is missing, breadth first; stop in time
    python benchmarks/canvas.py --model canvas-flow --methods uce,esd
    python benchmarks/canvas.py --shard 1/2                       # every second concept, for two machines or two processes
    python benchmarks/canvas.py --table                           # the pages canvas.md and masking.md, measured.yaml, README

A finished cell is its results.json in ``docs/benchmarks/cells/MODEL/CONCEPT/METHOD[-seedN].json`` and is never made again. Images stay
in ``--out``. Order: the base and methods without training on all concepts, then trained ones with seed 0, then further seeds. Methods have
their defaults, or the preset ``canvas`` where they have one.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from canvas_cells import Cell, gather_memory
from canvas_readme import updated
from canvas_table import publish, summarise

from erasure.artifact import read_config
from erasure.canvas.concepts import canvas_concept
from erasure.canvas.splits import splits
from erasure.errors import ErasureError
from erasure.eval.bench import BASE, Bench
from erasure.eval.suite import load_suite
from erasure.method import ErasureMethod
from erasure.models import EMBEDDED, load_base
from erasure.registry import methods

DOCS = Path(__file__).resolve().parents[1] / "docs/benchmarks"
MEASURED = Path(__file__).parents[1] / "erasure/canvas/measured.yaml"
README = Path(__file__).parents[1] / "README.md"
ROWS: dict[str, tuple[str, ...]] = {
    "canvas": (
        "negative_prompt", "uce", "safree", "sld", "perp_neg", "itd", "saeuron", "conceptprune", "ssd_diffusion", "minimalist",
        "adv_unlearn", "esd", "concept_ablation", "salun", "safety_dpo", "gs_lora",
    ),
    "canvas-flow": ("negative_prompt", "uce", "safree", "itd", "minimalist", "adv_unlearn", "esd"),
}  # fmt: skip
MASKS = ("negative_prompt", "uce", "safree", "itd", "minimalist", "conceptprune", "ssd_diffusion")
"""Rows of the page on masks."""
SETTINGS: dict[str, dict[str, Any]] = {
    "conceptprune": {"sampling_steps": 20, "guidance": 4.0, "timesteps": 4, "ratio": 0.1, "agreement": 0.5, "base": "anchor"},
    "ssd_diffusion": {"sampling_steps": 20, "guidance": 4.0},
}
"""What the search on dev concepts found, where it is not a preset of the method."""
FIT_SEEDS = 3
IMAGES = {"canvas": 160, "canvas-flow": 60}
"""A cell; canvas-flow guides in a second call, so an image takes twice as long."""


def configured(name: str, model: str) -> ErasureMethod:
    """A method as the table has it: with the model's own preset, the canvas's where it has none, or its defaults."""
    found = methods.get(name)
    preset = next(({"preset": one} for one in (model, "canvas") if one in getattr(found, "PRESETS", {})), {})
    return found.from_config({**preset, **SETTINGS.get(name, {})})


def order(model: str, names: list[str], concepts: list[str], seeds: int) -> Iterator[Cell]:
    """Cells, breadth first: cheap methods, then trained ones by fit seed."""
    trained = [name for name in names if getattr(methods.get(name), "trained", False)]
    for seed in range(seeds):
        for some in ([name for name in names if name not in trained] if seed == 0 else [], trained):
            for concept in concepts:
                yield from (Cell(model, concept, name, seed) for name in some)


def make(cell: Cell, pipe: Any, docs: Path, out: Path) -> None:
    """Fit, draw and score one cell, and the concept's base before it, and keep their results."""
    home = out / cell.model / cell.concept
    suite = load_suite("canvas").limited(IMAGES[cell.model]).fitting(pipe)
    bench = Bench(home / f"seed{cell.seed}", pipe, cell.model, suite, canvas_concept(cell.concept), seed=cell.seed, progress=False)
    first = home / "seed0"
    if cell.seed and not (bench.folder / "images" / BASE).exists():  # the base knows no fit seed
        shutil.copytree(first / "images" / BASE, bench.folder / "images" / BASE)
    base = bench.evaluate(BASE, bench.generate(BASE))
    keep(base, Cell(cell.model, cell.concept, BASE).path(docs))
    eraser, folder = bench.fit(configured(cell.method, cell.model))
    keep(bench.evaluate(cell.method, bench.generate(cell.method, eraser), read_config(folder)), cell.path(docs))


def keep(results: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(results / "results.json", file)


def run(arguments: argparse.Namespace, names: list[str], concepts: list[str]) -> None:
    """Make the cells that are missing, until there is no time for another like the slowest so far."""
    started, slowest, pipe = time.monotonic(), 0.0, None
    part, parts = (int(each) for each in arguments.shard.split("/"))
    for cell in order(arguments.model, names, concepts[part - 1 :: parts], arguments.seeds):
        if cell.path(arguments.docs).exists():
            continue
        if arguments.minutes is not None and time.monotonic() - started + slowest > 60 * arguments.minutes:
            print("out of time; the same command goes on from here")
            return
        if pipe is None:
            pipe = load_base(arguments.model, device="cpu")
        began = time.monotonic()
        try:
            make(cell, pipe, arguments.docs, arguments.out)
            said = "done"
        except ErasureError as error:
            keep_failure(cell.path(arguments.docs), error)
            said = f"failed: {error}"
        slowest = max(slowest, time.monotonic() - began)
        print(f"{cell.model} {cell.concept} {cell.method} seed {cell.seed}: {said}, {time.monotonic() - began:.0f} s", flush=True)


def keep_failure(file: Path, error: ErasureError) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"failed": str(error)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=EMBEDDED, default="canvas")
    parser.add_argument("--methods", help="names, separated by commas; all of the model's table, if not given")
    parser.add_argument("--concepts", default=",".join(splits().test), help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=FIT_SEEDS, help="fit seeds of trained methods")
    parser.add_argument("--shard", default="1/1", help="i/n: only every n-th concept, from the i-th on")
    parser.add_argument("--minutes", type=float, help="start no cell that would end later")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of cells/, where finished ones are kept, and of the page")
    parser.add_argument("--out", type=Path, default=Path("out/canvas"), help="where images and artefacts go")
    parser.add_argument("--table", action="store_true", help="write the page from the cells that there are, and stop")
    arguments = parser.parse_args()
    concepts = arguments.concepts.split(",")
    if not arguments.table:
        return run(arguments, arguments.methods.split(",") if arguments.methods else list(ROWS[arguments.model]), concepts)
    masks = {model: [name for name in names if name in MASKS] for model, names in ROWS.items()}
    for model in ROWS:
        gather_memory(arguments.docs, model, arguments.out)
    for page, models in ((arguments.docs / "canvas.md", ROWS), (arguments.docs.parent / "methods" / "masking.md", masks)):
        publish(arguments.docs, page, models, concepts, range(arguments.seeds))
    if arguments.docs.resolve() != DOCS:  # pages elsewhere are a trial, which what ships does not take its figures from
        return
    summarise(arguments.docs, MEASURED, ROWS, concepts, range(arguments.seeds))
    README.write_text(updated(README.read_text(), yaml.safe_load(MEASURED.read_text())["canvas"], len(concepts)))


if __name__ == "__main__":
    main()
