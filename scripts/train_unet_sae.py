"""Train the sparse autoencoder of the canvas's UNet that ships with the suite, for SAeUron: about eight minutes on one core.

    python scripts/train_unet_sae.py
    python scripts/train_unet_sae.py --hookpoint unet.up_blocks.1.attentions.0 --out out/sae    # another block, to compare

Prompts are of the canvas's own training set: fit templates, fit-side words, no drawing that was held out.
"""

import argparse
import random
from pathlib import Path

import torch

from erasure.canvas.splits import splits
from erasure.canvas.world import article, fill, world
from erasure.methods.sae.coder import SparseCoderConfig
from erasure.methods.sae.training import fit
from erasure.methods.saeuron.training import reader
from erasure.models import load_base

OUT = Path(__file__).parents[1] / "erasure/canvas/weights/sae-unet"


def prompts(rounds: int, seed: int = 0) -> list[str]:
    """Each object that often, every fourth time by its synonym, in styles that it was drawn in, on any background or none."""
    of, dice = world(), random.Random(seed)
    templates, made = of.templates("fit"), []
    for turn in range(rounds):
        for i, name in enumerate(of.objects):
            styles = [None, *(style for style in of.styles if (name, style) not in splits().held_out)]
            word = of.synonyms(name)[0] if turn % 4 == 3 else name
            template = templates[(turn + i) % len(templates)]
            made.append(fill(template, article(word), dice.choice(styles), dice.choice([None, *of.backgrounds])))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hookpoint", default="unet.up_blocks.0.attentions.1")
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=16, help="latents that may be on at once")
    parser.add_argument("--rounds", type=int, default=8, help="images of each object")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=OUT)
    of = parser.parse_args()
    pipe = load_base("canvas")
    read, width = reader(pipe, of.hookpoint, prompts(of.rounds), batch=64)
    config = SparseCoderConfig(d_in=width, num_latents=of.latents, k=of.k, hookpoint=of.hookpoint)
    coder, measured = fit(read, config, steps=of.steps, device=pipe.device)
    coder.save(of.out, torch.float16)
    print(f"{of.out}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))


if __name__ == "__main__":
    main()
