"""What an attacker with the folded weights gets back: zeros filled in by magnitude, and a short benign fine-tuning.

    python benchmarks/masking_recovery.py out/dagger-minimalist --concept dagger
    python benchmarks/masking_recovery.py out/dagger-minimalist --concept dagger --n 100 --steps 50

The artefact is folded into its base. ``unzeroed``: each zeroed column or row gets Gaussian entries of the size that the rest of its layer
has, which needs no knowledge of the base (the zeros themselves say where to look: arXiv:2603.06640). ``fine-tuned``: the denoising loss on
images that the base makes of neutral prompts, all weights, without one image of the concept. judge_dev looks at the target on
``n`` prompts; intervals are Wilson's.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from search_dev import draw, prompts

from erasure import artifact, tuning
from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.world import world
from erasure.denoising import Denoising
from erasure.eval.stats import wilson
from erasure.families import family_of
from erasure.methods.masking import MaskEraser
from erasure.models import load_base
from erasure.seams.weights import parameter
from erasure.training import train

NEUTRAL = 64
"""Images to fine-tune on."""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact")
    parser.add_argument("--model", default="canvas")
    parser.add_argument("--concept", default="dagger")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    base = load_base(given.model, device="cpu")
    base.set_progress_bar_config(disable=True)
    eraser, _ = artifact.check(given.artefact, base)
    if not isinstance(eraser, MaskEraser):
        parser.error(f"{given.artefact} was made by {eraser.method.name}, not by masks")
    named, index = prompts(given.concept, given.n)[0], world().objects.index(given.concept)
    retain = canvas_concept(given.concept).retain
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
        base.unet.requires_grad_(False)
        hits = int(judge_dev()(draw(base, named, 0)).present[:, index].sum())
        low, high = wilson(hits, given.n)
        return f"{hits / given.n:.0%} ({low:.0%} to {high:.0%})"

    print(f"| weights | {given.concept} named, n = {given.n} |\n|---|---:|")
    print(f"| base | {attacked()} |", flush=True)
    print(f"| erased | {attacked(lambda: eraser.bake(base))} |", flush=True)
    fill = lambda: unzero(base, sorted(eraser.values(base)))  # noqa: E731
    print(f"| unzeroed | {attacked(lambda: eraser.bake(base), fill)} |", flush=True)
    tune = lambda: finetune(base, neutral, images, steps=given.steps)  # noqa: E731
    print(f"| fine-tuned, {given.steps} steps | {attacked(lambda: eraser.bake(base), tune)} |", flush=True)


if __name__ == "__main__":
    main()
