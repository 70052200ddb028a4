"""EcoDiff's objective: how much of the denoiser can be switched off before it shows; no erasure.

    OMP_NUM_THREADS=1 python benchmarks/masking_size.py                  # into docs/methods/masking.md

``minimalist`` with ``objective=preserve`` switches off the budget's share of heads and neurons. ``chance`` switches off as many at random,
as the control. judge_dev looks for the object that each prompt of the dev split asks for; intervals are Wilson's.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from page import put
from search_dev import draw, prompts

from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.world import world
from erasure.eval.stats import wilson
from erasure.families import family_of
from erasure.method import Run
from erasure.methods.masking import MaskEraser, Minimalist, shares
from erasure.models import EMBEDDED, load_base

PAGE = Path(__file__).parents[1] / "docs" / "methods" / "masking.md"
CONCEPT = "dagger"
"""Whose retained phrases are what has to stay; the objective erases nothing."""
HEAD = "| budget | weights at zero | objects drawn | by chance |\n|---:|---:|---:|---:|"


def drawn(pipe: Any, n: int) -> str:
    """How many of n dev prompts show the object that they ask for."""
    _, texts, wanted = prompts(CONCEPT, n)
    present = judge_dev()(draw(pipe, texts, 1000)).present
    hits = int(present[torch.arange(n), [world().objects.index(name) for name, _ in wanted]].sum())
    low, high = wilson(hits, n)
    return f"{hits / n:.0%} ({low:.0%}-{high:.0%})"


def shuffled(eraser: MaskEraser) -> MaskEraser:
    """As many units of each kind off, anywhere."""
    generator, found = torch.Generator().manual_seed(0), {}
    for kind in shares(eraser):
        own = {key: mask for key, mask in eraser.changed.items() if key.endswith(f".{kind}")}
        flat = torch.cat(list(own.values()))
        parts = flat[torch.randperm(len(flat), generator=generator)].split([len(mask) for mask in own.values()])
        found |= dict(zip(own, (part.clone() for part in parts), strict=True))
    return MaskEraser(eraser.method, eraser.concepts, found)


def zeros(pipe: Any, eraser: MaskEraser) -> float:
    """Share of the denoiser's parameters that the eraser sets to zero."""
    total = sum(p.numel() for _, denoiser in family_of(pipe).parts(pipe) for p in denoiser.parameters())
    return sum(int((value == 0).sum()) for value in eraser.values(pipe).values()) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=EMBEDDED, default="canvas")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2, 0.4])
    parser.add_argument("--n", type=int, default=48)
    parser.add_argument("--steps", type=int, default=80, help="of training")
    given = parser.parse_args()
    pipe = load_base(given.model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    rows = [f"| 0 (base) | 0.0 % | {drawn(pipe, given.n)} | |"]
    for budget in given.budgets:
        method = Minimalist(
            preset=given.model, objective="preserve", units=("heads", "neurons"), budget=budget, steps=given.steps, lr=0.2, images=96
        )  # fmt: skip
        eraser = method.fit(pipe, [canvas_concept(CONCEPT)], run=Run(seed=0))
        found = []
        for one in (eraser, shuffled(eraser)):
            with one.attach(pipe):
                found.append(drawn(pipe, given.n))
        rows.append(f"| {budget:g} | {100 * zeros(pipe, eraser):.1f} % | {' | '.join(found)} |")
        print(rows[-1], flush=True)
    said = f"{given.model}, n = {given.n}, {given.steps} steps of training; heads and neurons."
    put(PAGE, "masking_size.py", "\n".join([said, "", HEAD, *rows]))


if __name__ == "__main__":
    main()
