"""What of itd and of its coder matters, one setting at a time, on dev concepts: dev templates and seeds, judge_dev.

    python benchmarks/sae_ablation.py --minutes 20    # make what is missing; the same command goes on
    python benchmarks/sae_ablation.py --table         # docs/benchmarks/sae_ablation.json and the table of docs/methods/sae.md

Coders are trained as `erasure sae train` does. A prompt whose embeddings come out bit by bit as the base's is not drawn again:
its image is the base's.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from page import put
from search_dev import prompts, seen
from torch import Tensor

from erasure.canvas.captions import captions
from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.judging import Verdict
from erasure.canvas.splits import splits
from erasure.canvas.world import world
from erasure.errors import ErasureError
from erasure.eval import generate
from erasure.eval.rows import Row
from erasure.eval.stats import wilson
from erasure.eval.suite import load_suite
from erasure.method import Eraser, Run
from erasure.methods.itd import ItD
from erasure.methods.sae import SparseCoder, SparseCoderConfig
from erasure.methods.sae.formats import is_coder
from erasure.methods.sae.training import fit, reader
from erasure.models import load_base

DOCS = Path(__file__).parents[1] / "docs"
RECORDS = DOCS / "benchmarks" / "sae_ablation.json"
HOOKPOINT, STEPS, BATCH = "text_encoder.layers.2", 800, 64
CONCEPTS = ("dagger", "guitar", "flat")
IMAGES = 24
FIRST = {"named": 0, "kept": 1000}
"""Of each side, the first of its seeds."""
RELEASED = {"gate": "reconstruction", "error_term": False, "threshold_scale": 0.99, "factor": -8.0}
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    *({"k": k} for k in (4, 16, 32)),
    *({"factor": factor} for factor in (0.0, -1.0, -8.0)),
    {"threshold_scale": 0.99},
    {"gate": "reconstruction"},
    {"gate": "off", "error_term": False},
    RELEASED,
)
CODERS: tuple[dict[str, Any], ...] = (
    {"activation": "abstopk"},
    {"activation": "relu"},
    {"num_latents": 512},
    {"num_latents": 8192},
    {"k": 8},
    {"k": 32},
)
COLUMNS = ("changed", "explained, on, dead", *(f"{concept}, named" for concept in CONCEPTS), "unrecognised", "kept", "kept, bit by bit")


@dataclass(frozen=True)
class Cell:
    """What is changed of the coder and of the method, and on which concept; ``method`` None is the base."""

    concept: str
    coder: dict[str, Any]
    method: dict[str, Any] | None

    @property
    def file(self) -> str:
        return f"{self.concept}-{self.label or 'defaults'}.json".replace(" ", "-")

    @property
    def label(self) -> str:
        if self.method is None:
            return "base"
        parts = {**{f"coder {key}": value for key, value in self.coder.items()}, **self.method}
        return " ".join(f"{key}={value}" for key, value in parts.items())


def cells() -> Iterator[Cell]:
    yield from (Cell(concept, {}, None) for concept in CONCEPTS)
    yield from (Cell(concept, {}, setting) for setting in SETTINGS for concept in CONCEPTS)
    yield from (Cell(concept, coder, {}) for coder in CODERS for concept in CONCEPTS)


def trained(pipe: Any, changed: dict[str, Any], out: Path) -> tuple[str, dict[str, float]]:
    """Folder of a coder, trained if it is not there, and what its training measured; what ships where nothing is changed."""
    if not changed:
        return "", {}
    folder = out / "coders" / "-".join(f"{key}-{value}" for key, value in changed.items())
    if not is_coder(folder):
        read, width = reader(pipe, HOOKPOINT, captions(), BATCH)
        config = SparseCoderConfig(**{"d_in": width, "num_latents": 2048, "k": 16, "hookpoint": HOOKPOINT, **changed})
        coder, measured = fit(read, config, steps=STEPS, checkpoint=folder, settings=asdict(config), progress=False)
        (folder / "measured.json").write_text(json.dumps(measured))
        SparseCoder.save(coder, folder)
    return str(folder), json.loads((folder / "measured.json").read_text())


def run(arguments: argparse.Namespace) -> None:
    """Make what is missing while there is time."""
    started, slowest = time.monotonic(), 0.0
    pipe = load_base("canvas", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    for cell in cells():
        path = arguments.out / "cells" / cell.file
        if path.exists():
            continue
        if arguments.minutes is not None and time.monotonic() - started + slowest > 60 * arguments.minutes:
            print("out of time; the same command goes on from here")
            return
        began = time.monotonic()
        record = made(pipe, cell, arguments.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n")
        slowest = max(slowest, time.monotonic() - began)
        print(f"{cell.concept} {cell.label or 'defaults'}: {time.monotonic() - began:.0f} s", flush=True)


def made(pipe: Any, cell: Cell, out: Path) -> dict[str, Any]:
    """A cell's record: of each side, what the judge says of each image."""
    base = None if cell.method is None else json.loads((out / "cells" / Cell(cell.concept, {}, None).file).read_text())
    folder, measured = trained(pipe, cell.coder, out)
    found: dict[str, Any] = {"concept": cell.concept, "coder": cell.coder, "method": cell.method, "measured": measured}
    eraser = None
    if cell.method is not None:
        try:
            eraser = ItD(sae=folder, **cell.method).fit(pipe, [canvas_concept(cell.concept)], run=Run(progress=False))
        except ErasureError as error:
            return {**found, "refused": str(error)}
    named, kept, wanted = prompts(cell.concept, IMAGES)
    for side, texts in (("named", named), ("kept", kept)):
        moved = list(range(IMAGES)) if eraser is None else changed(pipe, eraser, texts)
        calls = {key: list(base[side][key]) if base else [False] * IMAGES for key in ("present", "unrecognised")}
        if moved:
            with nullcontext() if eraser is None else eraser.attach(pipe):
                verdict = judge_dev()(draw(pipe, texts, moved, FIRST[side]))
            present = seen(verdict, cell.concept) if side == "named" else there(verdict, cell.concept, [wanted[i] for i in moved])
            for i, one, lost in zip(moved, present.tolist(), verdict.unrecognised.tolist(), strict=True):
                calls["present"][i], calls["unrecognised"][i] = one, lost
        found[side] = {**calls, "changed": len(moved)}
    return found


def changed(pipe: Any, eraser: Eraser, texts: Sequence[str]) -> list[int]:
    """Prompts whose embeddings the eraser moves by a bit or more."""
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    plain, _ = pipe.encode_prompt(list(texts), **options)
    with eraser.attach(pipe):
        edited, _ = pipe.encode_prompt(list(texts), **options)
    return [i for i in range(len(texts)) if not torch.equal(plain[i], edited[i])]


def draw(pipe: Any, texts: Sequence[str], chosen: Sequence[int], first: int) -> Tensor:
    seeds, protocol = splits().seeds("dev"), load_suite("canvas").protocol
    rows = [Row(id=str(i), kind="other", prompt=texts[i], seed=seeds[first + i]) for i in chosen]
    with generate.under(pipe, protocol):
        return generate.draw(pipe, rows, protocol)


def there(verdict: Verdict, concept: str, wanted: Sequence[tuple[str, str]]) -> Tensor:
    """Whether each image shows the object that was asked for, and where a style is erased its style, bool [n]."""
    of = world()
    found = verdict.present[torch.arange(len(wanted)), [of.objects.index(name) for name, _ in wanted]]
    return found & (verdict.style == torch.tensor([of.styles.index(style) for _, style in wanted])) if concept in of.styles else found


def gather(out: Path, before: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """A record for each setting, over the concepts; where a cell is not there, the one from ``before``, and none without either."""
    parts: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in cells():
        if (path := out / "cells" / cell.file).exists():
            parts.setdefault(cell.label, []).append((cell, json.loads(path.read_text())))
    found = {record["changed"]: record for record in before}
    for label, own in parts.items():
        if len(own) == len(CONCEPTS):
            sides = {cell.concept: None if "refused" in record else rate(record["named"]["present"]) for cell, record in own}
            fitted = [record for _, record in own if "refused" not in record]
            pooled = {
                "unrecognised": rate([one for record in fitted for one in record["named"]["unrecognised"]]),
                "kept": rate([one for record in fitted for one in record["kept"]["present"]]),
                "identical": rate([i >= record["kept"]["changed"] for record in fitted for i in range(IMAGES)]),
            }
            found[label] = {"changed": label, "coder": own[0][1]["measured"], "named": sides, **pooled}
    return [found[label] for label in dict.fromkeys(cell.label for cell in cells()) if label in found]


def rate(calls: Sequence[bool]) -> dict[str, Any]:
    lo, hi = wilson(sum(calls), len(calls))
    return {"value": sum(calls) / len(calls), "lo": lo, "hi": hi, "n": len(calls)}


def line(record: dict[str, Any]) -> str:
    def percent(of: dict[str, Any] | None) -> str:
        return "refused" if of is None else f"{100 * of['value']:.0f} % ({100 * of['lo']:.0f}-{100 * of['hi']:.0f})"

    measured, name = record["coder"], record["changed"]
    coder = f"{100 * measured['explained']:.0f} %, {measured['latents_on']:.0f}, {100 * measured['dead']:.0f} %" if measured else ""
    title = {"": "nothing: the defaults", "base": "base"}.get(name, f"`{name}`")
    shown = [*record["named"].values(), record["unrecognised"], record["kept"]]
    same = "" if name == "base" else percent(record["identical"])
    return f"| {' | '.join([title, coder, *map(percent, shown), same])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="start nothing that would end later")
    parser.add_argument("--out", type=Path, default=Path("out/sae-ablation"), help="where coders and cells go")
    parser.add_argument("--table", action="store_true", help="write the table of what there is, and stop")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments)
        return
    records = gather(arguments.out, json.loads(RECORDS.read_text()) if RECORDS.exists() else [])
    RECORDS.write_text(json.dumps(records, indent=1) + "\n")
    head = [f"| {' | '.join(COLUMNS)} |", f"|---|---|{'---:|' * (len(COLUMNS) - 2)}"]
    table = "\n".join([*head, *map(line, records)])
    put(DOCS / "methods" / "sae.md", Path(__file__).name, table)
    print(table)


if __name__ == "__main__":
    main()
