"""What a block of the denoiser says while the base draws: activations by timestep, and their mean codes."""

import csv
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.errors import ErasureError, NotErased
from erasure.families import Family
from erasure.seams import denoiser
from erasure.seams.issued import Inputs
from erasure.trained import TEMPLATES

from ..sae.coder import SparseCoder
from ..sae.hookpoints import editing

log = logging.getLogger("erasure")

GUIDANCE, BATCH = 5.0, 8


class Clock:
    """The timestep of the denoiser call under way, as its own inputs say it."""

    now: float | None = None

    def see(self, inputs: Inputs) -> None:
        self.now = float(torch.as_tensor(inputs["timestep"]).flatten()[0])

    def read(self) -> float:
        if self.now is None:
            raise NotErased("the block was called outside of its denoiser, so the attached eraser cannot tell the timestep")
        return self.now


def block_of(pipe: Any, family: Family, hookpoint: str) -> nn.Module:
    """The module of a dotted name with its component (unet.up_blocks.1.attentions.1); others raise."""
    ((component, module),) = family.parts(pipe)
    path = hookpoint.removeprefix(f"{component}.")
    blocks = [name for name, _ in module.named_modules() if name.rpartition(".")[0].endswith("attentions")]
    try:
        if path:
            return module.get_submodule(path)
    except AttributeError:
        pass
    listed = ", ".join(f"{component}.{name}" for name in blocks)
    raise ErasureError(f"{type(pipe).__name__} has no hookpoint {hookpoint!r}; its cross-attention blocks are {listed}")


def patches(x: Tensor) -> Tensor:
    """Maps [n, d, h, w] as tokens [n, h * w, d]; tokens stay."""
    return x.flatten(2).mT if x.ndim == 4 else x


def maps(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens [n, h * w, d] in the shape of ``like``."""
    return tokens.mT.reshape(like.shape) if like.ndim == 4 else tokens


@torch.no_grad()
def activations(
    pipe: Any, family: Family, hookpoint: str, prompts: Sequence[str], *, steps: int, seed: int = 0, bar: Any = None
) -> Iterator[tuple[float, Tensor]]:
    """Timestep and output [images, patches, d] of a block on the text side, while the base draws an image of each prompt.

    The sampler is DDIM on the model's own noise schedule, at guidance 5; image i has seed ``seed`` + i, so that nothing depends on batches.
    ``pipe`` is left as it was. ``bar``: a progress bar to move on by images.
    """
    denoising, block, clock = Denoising(pipe, family), block_of(pipe, family, hookpoint), Clock()
    for start in range(0, len(prompts), BATCH):
        part, found = prompts[start : start + BATCH], list[tuple[float, Tensor]]()

        def read(x: Tensor, n: int = len(part), found: list[tuple[float, Tensor]] = found) -> None:
            found.append((clock.read(), patches(x[-n:]).float()))

        with ExitStack() as stack:
            stack.enter_context(denoiser.calls(pipe, family, clock.see))
            stack.enter_context(editing(block, read))
            denoising.paths(part, [seed + start + i for i in range(len(part))], steps=steps, guidance=GUIDANCE)
        if bar is not None:
            bar.update(len(part))
        yield from found


def mean_codes(coder: SparseCoder, states: Iterable[tuple[float, Tensor]]) -> dict[float, Tensor]:
    """Mean codes [n] over all patches of all images, by timestep: μ_i(D, t)."""
    sums, counts = dict[float, Tensor](), dict[float, int]()
    for t, x in states:
        codes = coder.to(x.device).encode(x).flatten(0, -2).double()
        sums[t] = sums.get(t, 0) + codes.sum(0)
        counts[t] = counts.get(t, 0) + len(codes)
    return {t: (total / counts[t]).float().cpu() for t, total in sums.items()}


def prompt(phrase: str, kind: str, i: int) -> str:
    """The phrase in template i of its kind, from the first again after the last."""
    templates = TEMPLATES.get(kind, TEMPLATES["other"])
    return templates[i % len(templates)].format(phrase)


def prompts_of(concept: Concept, n: int) -> list[str]:
    """n prompts of a concept: all its targets in a template, then in the next."""
    phrases = concept.targets
    return [prompt(phrases[i % len(phrases)], concept.kind, i // len(phrases)) for i in range(n)]


def retained(concepts: Sequence[Concept]) -> dict[str, str]:
    """Retained phrases that no concept erases, with the kind of theirs."""
    erased = {target.casefold() for concept in concepts for target in concept.targets}
    phrases = {phrase: concept.kind for concept in concepts for phrase in concept.retain if phrase}
    if clash := sorted(phrase for phrase in phrases if phrase.casefold() in erased):
        log.warning("erased by one concept and retained by another, so erased: %s", ", ".join(clash))
    return {phrase: kind for phrase, kind in phrases.items() if phrase not in clash}


def contrast(phrases: Mapping[str, str], images: int) -> list[str]:
    """Prompts of D_¬c: phrases with their kinds, each in one template or more, or our neutral list where there is none.

    At least ``images``, and at most four times as many, which skips phrases in even steps.
    """
    if not phrases:
        with files("erasure.prompts").joinpath("lists/neutral.csv").open(encoding="utf-8") as file:
            return [row["prompt"] for row in csv.DictReader(file)][: 4 * images]
    names = list(phrases)
    n = min(max(images, len(names)), 4 * images)
    drawn = [names[i * len(names) // n if n < len(names) else i % len(names)] for i in range(n)]
    return [prompt(name, phrases[name], i + i // len(names)) for i, name in enumerate(drawn)]
