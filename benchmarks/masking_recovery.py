"""What an attacker with the folded weights gets back: zeros filled in by magnitude, and a short benign fine-tuning.

    python benchmarks/masking_recovery.py                                    # dagger on both canvases, into docs/methods/masking.md
    python benchmarks/masking_recovery.py --models canvas --concept guitar --n 100 --steps 50

``minimalist`` is fitted with the model's preset and folded into the weights. ``unzeroed``: each zeroed column or row gets Gaussian
entries of the size that the rest of its layer has, which needs no knowledge of the base (the zeros themselves say where to look:
arXiv:2603.06640). ``fine-tuned``: the denoising loss on images that the base makes of neutral prompts, all weights, without one image of
the concept. judge_dev looks at the target on ``n`` prompts of the dev split; intervals are Wilson's.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from page import put
from search_dev import draw, prompts, seen

from erasure import tuning
from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.denoising import Denoising
from erasure.eval.stats import wilson
from erasure.families import family_of
from erasure.method import Run
from erasure.methods.masking import Minimalist
from erasure.models import EMBEDDED, load_base
from erasure.seams.weights import parameter
from erasure.training import train

PAGE = Path(__file__).parents[1] / "docs" / "methods" / "masking.md"
NEUTRAL = 64
"""Images to fine-tune on."""
HEAD = "| model | base | erased | unzeroed | fine-tuned |\n|---|---:|---:|---:|---:|"


@torch.no_grad()
def unzero(pipe: Any, names: Sequence[str], seed: int = 0) -> int:
    """Fill all-zero columns of matrices [o, i] and zero entries of vectors [o] with noise of the rest's size; gives how many there were."""
    draw, filled = torch.Generator().manual_seed(seed), 0
    for name in names:
        weight = parameter(pipe, name)
        by_column = weight.ndim == 2 and not name.rpartition(".")[0].endswith(("norm1.linear", "norm1_context.linear", "norm.linear"))
        lines = weight.T if by_column else weight  # rows of this view are what a mask switches off
        zero = lines.abs().flatten(1).sum(1) == 0 if lines.ndim > 1 else lines == 0
        if zero.all() or not zero.any():
            continue
        # Gains of a norm have a mean; entries of a matrix have none to speak of.
        rest = lines[~zero]
        noise = torch.randn(lines[zero].shape, generator=draw).to(weight)
        lines[zero] = rest.mean() + noise * rest.std()
        filled += int(zero.sum())
    return filled


def finetune(pipe: Any, prompts: Sequence[str], images: torch.Tensor, *, steps: int = 50, lr: float = 1e-5, seed: int = 0) -> None:
    """Move all weights of the denoiser down the denoising loss on latents [n, ...] of ``prompts``, in place."""
    family = family_of(pipe)
    of = Denoising(pipe, family)
    live = {name: parameter(pipe, name) for name in tuning.chosen(pipe, family, "full")}

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(prompts), (8,), generator=generator).tolist()
        x0 = images[which]
        noise, t = torch.randn(x0.shape, generator=generator).to(x0), of.timesteps(8, generator)
        made = of.predict(of.schedule.add_noise(x0, noise, t), t, [prompts[i] for i in which])
        return (made - of.schedule.target(x0, noise, t)).square().mean()

    train(live, loss, steps=steps, lr=lr, seed=seed)
    for weight in live.values():
        weight.requires_grad_(False)


def measure(model: str, concept: str, n: int, steps: int) -> str:
    """A row of the table: the target still seen in the base, after erasing, and after each attack."""
    base = load_base(model, device="cpu")
    base.set_progress_bar_config(disable=True)
    eraser = Minimalist(preset=model).fit(base, [canvas_concept(concept)], run=Run(seed=0))  # type: ignore[arg-type]
    named, retain = prompts(concept, n)[0], canvas_concept(concept).retain
    neutral = [f"a {retain[i % len(retain)]}" for i in range(NEUTRAL)]
    seeds = list(range(10_000, 10_000 + NEUTRAL))
    images = Denoising(base, family_of(base)).paths(neutral, seeds, steps=20, guidance=4.0)[0][:, -1]
    originals = {name: parameter(base, name).detach().clone() for name in tuning.chosen(base, family_of(base), "full")}

    def attacked(*attacks: Callable[[], Any]) -> str:
        with torch.no_grad():
            for name, value in originals.items():
                parameter(base, name).copy_(value)
        for attack in attacks:
            attack()
        hits = int(seen(judge_dev()(draw(base, named, 0)), concept).sum())
        low, high = wilson(hits, n)
        return f"{hits / n:.0%} ({low:.0%}-{high:.0%})"

    def erase() -> None:
        eraser.bake(base)

    found = [
        attacked(),
        attacked(erase),
        attacked(erase, lambda: unzero(base, sorted(eraser.values(base)))),
        attacked(erase, lambda: finetune(base, neutral, images, steps=steps)),
    ]
    return f"| {model} | " + " | ".join(found) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=EMBEDDED, default=list(EMBEDDED))
    parser.add_argument("--concept", default="dagger")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--steps", type=int, default=50, help="of fine-tuning")
    given = parser.parse_args()
    rows = [measure(model, given.concept, given.n, given.steps) for model in given.models]
    said = f"{given.concept} named and still seen by judge_dev, n = {given.n}; fine-tuned for {given.steps} steps on neutral images."
    put(PAGE, "masking_recovery.py", "\n".join([said, "", HEAD, *rows]))


if __name__ == "__main__":
    main()
