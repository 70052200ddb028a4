"""Through which text encoder of canvas-flow a concept is asked for, before and after AdvUnlearn has changed its CLIP.

    python benchmarks/flow_encoders.py            # four dev concepts, into docs/methods.md
    python benchmarks/flow_encoders.py --concepts flat --n 48

FLUX's pipeline takes a prompt for CLIP, which gives the pooled vector alone, and one for the T5, which gives the tokens. Here either
reads the concept's name or, in its place, the anchor's. With the anchor for CLIP the base says how much an eraser could reach that
changes CLIP alone and makes it say the anchor. Dev templates and seeds, one fit seed; judge_dev looks for the concept; intervals are
Wilson's over all concepts' images.
"""

import argparse
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from page import put
from search_dev import prompts, seen
from torch import Tensor

from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.splits import splits
from erasure.canvas.world import article
from erasure.concept import Concept
from erasure.eval.generate import under
from erasure.eval.stats import wilson
from erasure.eval.suite import load_suite
from erasure.families import call_options
from erasure.method import Run
from erasure.methods.adv_unlearn import AdvUnlearn
from erasure.models import load_base

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
CASES = ((False, 0, 0), (False, 1, 0), (False, 0, 1), (True, 0, 0), (True, 0, 1))
"""Whether CLIP is the erased one, and which of (concept, anchor) each encoder reads."""
HEAD = "| CLIP | CLIP reads | T5 reads | {concepts} | all |\n|---|---|---|{rule}---:|"


def renamed(text: str, concept: Concept) -> str:
    """A prompt that asks for the anchor wherever it named the concept."""
    names = "|".join(re.escape(name) for name in sorted(concept.targets, key=len, reverse=True))
    noun, anchor = re.compile(rf"\b(an? )?({names})\b"), concept.anchors[0]
    changed = noun.sub(lambda found: article(anchor) if found[1] else anchor, text)
    if changed == text:
        raise ValueError(f"{text!r} does not name {concept.name}")
    return changed


@torch.no_grad()
def drawn(pipe: Any, clip: Sequence[str], t5: Sequence[str], batch: int = 24) -> Tensor:
    """Images [n, 3, height, width] of prompts that differ between the encoders."""
    protocol, images = load_suite("canvas").fitting(pipe).protocol, []
    with under(pipe, protocol):
        for start in range(0, len(clip), batch):
            part = slice(start, min(start + batch, len(clip)))
            made = pipe(
                prompt=list(clip[part]),
                prompt_2=list(t5[part]),
                negative_prompt=[""] * len(clip[part]),
                true_cfg_scale=protocol.true_cfg,
                guidance_scale=protocol.guidance,
                num_inference_steps=protocol.steps,
                height=protocol.height,
                width=protocol.width,
                generator=[torch.Generator().manual_seed(seed) for seed in splits().seeds("dev")[part]],
                output_type="pt",
                **call_options(pipe),
            )
            images.append(made.images.float())
    return torch.cat(images)


def measure(pipe: Any, name: str, n: int) -> list[int]:
    """Of n images in each case, those that show the concept."""
    concept = canvas_concept(name)
    named = prompts(name, n)[0]
    texts = (named, [renamed(text, concept) for text in named])
    eraser = AdvUnlearn.from_config({"preset": "canvas"}).fit(pipe, [concept], run=Run(seed=0))
    found = []
    for erased, clip, t5 in CASES:
        with eraser.attach(pipe) if erased else nullcontext():
            found.append(int(seen(judge_dev()(drawn(pipe, texts[clip], texts[t5])), name).sum()))
    print(name, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", choices=splits().dev, default=["guitar", "pizza", "weapon", "flat"])
    parser.add_argument("--n", type=int, default=24, help="images a concept and case")
    given = parser.parse_args()
    pipe = load_base("canvas-flow", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    counts = [measure(pipe, name, given.n) for name in given.concepts]
    lines = []
    for (erased, clip, t5), hits in zip(CASES, zip(*counts, strict=True), strict=True):
        total, n = sum(hits), given.n * len(hits)
        low, high = wilson(total, n)
        read = " | ".join(("concept", "anchor")[which] for which in (clip, t5))
        rates = " | ".join(f"{k / given.n:.0%}" for k in hits)
        lines.append(f"| {'AdvUnlearn' if erased else 'base'} | {read} | {rates} | {total / n:.0%} ({low:.0%}-{high:.0%}, n={n}) |")
    said = f"The concept seen by judge_dev; {given.n} images a concept and line, one fit seed."
    head = HEAD.format(concepts=" | ".join(given.concepts), rule="---:|" * len(given.concepts))
    put(PAGE, "flow_encoders.py", "\n".join([said, "", head, *lines]))


if __name__ == "__main__":
    main()
