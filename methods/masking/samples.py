"""What the masked model should make: pairs of a prompt's noise and the final latents that are wanted of it."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from erasure.concept import Concept, Kind
from erasure.errors import ErasureError
from erasure.trained import TEMPLATES

from .chain import Chain

NEUTRAL = (
    "a dog on a meadow", "a wooden table with fruit", "a red car in a street", "mountains at sunset", "a woman who reads a book",
    "a bowl of soup", "an old house by a lake", "a child with a ball", "a boat at sea", "a city at night", "a vase of flowers", "a bird",
)  # fmt: skip
"""Preserved where a concept has no retain list."""
BESIDE, COMPANIONS = ("a {0} and a {1}", "a {1} with a {0}"), 8
"""Templates of a target in company, and how many retained phrases keep each target company in each of them."""
AT_ONCE = 8
"""Images that the base makes in one batch."""


@dataclass(frozen=True)
class Samples:
    """Prompts with their noise [n, ...] and the final latents [n, ...] that they should give."""

    prompts: list[str]
    noise: Tensor
    wanted: Tensor

    def loss(self, chain: Chain, n: int, generator: torch.Generator) -> Tensor:
        """Mean squared distance of the model's final latents to the wanted ones, over ``n`` of them."""
        which = torch.randint(len(self.prompts), (n,), generator=generator).tolist()
        made = chain.final(self.noise[which], [self.prompts[i] for i in which])
        return (made - self.wanted[which]).square().mean()


def phrases(concept: Concept, expand: bool, company: bool, seed: int) -> list[tuple[str, str]]:
    """Each target with what it becomes, in its kind's templates (``expand``: all of them), and beside retained phrases (``company``)."""
    alone = [
        (template.format(target), template.format(anchor) if anchor else "")
        for template in _templates(concept.kind, expand)
        for target, anchor in concept.pairs()
    ]
    if not company or concept.kind == "style":  # whose templates have things in them
        return alone
    draw = random.Random(seed)
    return alone + [
        (template.format(target, other), template.format(anchor, other) if anchor else f"a {other}")
        for target, anchor in concept.pairs()
        for template in BESIDE
        for other in draw.sample(concept.retain, min(len(concept.retain), COMPANIONS))
    ]


def retained(concepts: Sequence[Concept], expand: bool) -> list[str]:
    """What is kept: the retain lists, or neutral captions where there are none."""
    retain = [phrase for concept in concepts for phrase in concept.retain] or list(NEUTRAL)
    return [template.format(phrase) for phrase in retain for template in _templates("other", expand)]


def _templates(kind: Kind | Literal["other"], expand: bool) -> tuple[str, ...]:
    templates = TEMPLATES.get(kind, TEMPLATES["other"])
    return templates if expand else templates[:1]


@torch.no_grad()
def from_base(chain: Chain, pairs: Sequence[tuple[str, str]], images: int, seed: int, progress: bool) -> Samples:
    """Pairs (prompt, what it should become) in turn: what the base makes of the second, from the noise of the first."""
    draw = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**31, (images,), generator=draw).tolist()
    texts = [pairs[i % len(pairs)] for i in range(images)]
    noise, wanted = [], []
    for begin in tqdm(range(0, images, AT_ONCE), desc="targets", disable=not progress):
        part = texts[begin : begin + AT_ONCE]
        noise.append(chain.start([prompt for prompt, _ in part], seeds[begin : begin + AT_ONCE]))
        wanted.append(chain.final(noise[-1], [become for _, become in part]))
    return Samples([prompt for prompt, _ in texts], torch.cat(noise), torch.cat(wanted))


@torch.no_grad()
def from_file(chain: Chain, path: Path) -> Samples:
    """A user's targets: lines of JSON with ``prompt``, ``seed`` and ``image``, the file (relative to this one) of what it should become.

    Errors: a line without these keys, an image that cannot be read, or one of another size than the pipeline makes, raises with its line.
    """
    if not path.is_file():
        raise ErasureError(f"no file of image pairs {path}; give lines of JSON with prompt, seed and image")
    prompts: list[str] = []
    noise: list[Tensor] = []
    wanted: list[Tensor] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, seed, image = str(row["prompt"]), int(row["seed"]), Image.open(path.parent / row["image"]).convert("RGB")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ErasureError(
                f"{path}, line {number}: needs prompt, seed and a readable image ({type(error).__name__}: {error})"
            ) from error
        start = chain.start([prompt], [seed])
        latents = _encoded(chain.denoising.pipe, image, start)
        if latents.shape != start.shape:
            raise ErasureError(
                f"{path}, line {number}: an image of {image.width} x {image.height} gives latents {tuple(latents.shape[1:])}, the pipeline "
                f"makes {tuple(start.shape[1:])}: scale the image, or set size"
            )
        prompts, noise, wanted = [*prompts, prompt], [*noise, start], [*wanted, latents]
    if not prompts:
        raise ErasureError(f"{path} has no image pair")
    return Samples(prompts, torch.cat(noise), torch.cat(wanted))


def _encoded(pipe: Any, image: Image.Image, like: Tensor) -> Tensor:
    """Latents of an image, packed as ``like`` where the pipeline packs them."""
    vae = pipe.vae
    pixels = pipe.image_processor.preprocess(image).to(vae.device, vae.dtype)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents: Tensor = (vae.encode(pixels).latent_dist.mode() - shift) * vae.config.scaling_factor
    if like.ndim == 3:
        latents = pipe._pack_latents(latents, *latents.shape)
    return latents.to(like)
