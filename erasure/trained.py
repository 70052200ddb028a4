"""What the methods that train have in common: presets, what is trained, and a fit that leaves the pipeline as it was."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import fingerprint, tuning
from .adapter import AdapterEraser
from .callbacks import Callback, Progress
from .concept import Concept
from .denoising import Denoising
from .errors import ErasureError, NotErased
from .families import Family
from .method import ErasureMethod, Run, WeightEraser
from .training import Loss, train
from .tuning import Part, Tuned

T = TypeVar("T")
if TYPE_CHECKING:
    OfPreset = Annotated[T, "None becomes the preset's value as soon as the method is made"]
else:
    OfPreset = T | None
FROM_PRESET: Any = None
"""The default of a field whose value the preset has."""
TEMPLATES: dict[str, tuple[str, ...]] = {
    "style": ("{}", "a {} picture of a house", "a cat in the style of {}", "a drawing of an apple, {} style", "{} art of an airplane"),
    "other": ("{}", "a {}", "a picture of {}", "an image with a {}", "a drawing with {}"),
}
SAVE_EVERY = 50
"""Steps between two states of a training on disk."""
CEILING = 1e3
"""Mean squared error of predictions, which have about unit variance, from which on a run is lost."""


@dataclass(frozen=True)
class Session:
    """What the objective of a method works with, while a fit is under way."""

    denoising: Denoising
    tuned: Tuned
    concepts: tuple[Concept, ...]
    run: Run
    stack: ExitStack
    """Closed when training ends."""

    def pool(self, prompts: Sequence[str], images: int, *, steps: int, guidance: float, batch: int, whole: bool = False) -> "Pool":
        """That many images that the base makes of prompts, each from a seed of its own; ``whole``: with the way to each.

        Prompts take turns; where there are more than images, those at even distances, since all templates of a phrase stand together.
        """
        draw = torch.Generator().manual_seed(self.run.seed)
        seeds = torch.randint(2**31, (images,), generator=draw).tolist()
        sources = [i * len(prompts) // images if len(prompts) > images else i % len(prompts) for i in range(images)]
        texts = [prompts[i] for i in sources]
        made, t = [], torch.zeros(0)
        with self.tuned.reference():
            for start in tqdm(range(0, images, batch), desc="samples", disable=not self.run.progress):
                part = slice(start, start + batch)
                states, t = self.denoising.paths(texts[part], seeds[part], steps=steps, guidance=guidance)
                made.append(states if whole else states[:, -1:])
        return Pool(torch.cat(made), t, texts, sources)


@dataclass(frozen=True)
class Pool:
    """Samples of the base, with their prompts."""

    states: Tensor
    """[images, steps + 1, ...] from pure noise on, or [images, 1, ...]: the clean latents alone."""
    t: Tensor
    """Timesteps [steps] of all states but the clean ones."""
    prompts: list[str]
    sources: list[int]
    """Each sample's place in the list of prompts that the samples were made of."""

    def state(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[int]]:
        """States [n, ...] from anywhere on the ways to some images, their timesteps [n], and which images these are."""
        which = torch.randint(len(self.prompts), (n,), generator=generator)
        when = torch.randint(len(self.t), (n,), generator=generator)
        return self.states[which, when], self.t[when.to(self.t.device)], which.tolist()

    def noised(self, of: Denoising, n: int, generator: torch.Generator) -> "Noised":
        """Some of the images, each with noise of a random timestep."""
        which = torch.randint(len(self.prompts), (n,), generator=generator)
        x0 = self.states[which, -1]
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        t = of.timesteps(n, generator)
        x_t = of.schedule.add_noise(x0, noise, t)
        return Noised(x_t, t, of.schedule.target(x0, noise, t).float(), [self.prompts[i] for i in which], [self.sources[i] for i in which])


@dataclass(frozen=True)
class Noised:
    """States x_t [n, ...] of timesteps t [n], what the model should predict there, and the prompts of the images."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    prompts: list[str]
    sources: list[int]
    """As in the pool."""


@dataclass(frozen=True, kw_only=True)
class TrainedMethod(ErasureMethod):
    """A method that moves weights of the denoiser down a loss. Fields that are not given take the value of ``preset``."""

    families: ClassVar[frozenset[str]] = frozenset(("sd1", "sd2", "sdxl", "sd3", "flux"))
    trained: ClassVar[bool] = True

    preset: Literal["paper", "canvas"] = "paper"
    """Values of what is not given: the paper's for SD 1.5, or quick ones for the canvas."""
    part: OfPreset[Part] = FROM_PRESET
    """What is trained: kv (keys, values of the text), x (cross-attention), u (all but that, time embedding and output), full, selfattn."""
    layers: tuple[str, ...] = ()
    """Names of layers to train instead, or dotted parts of names."""
    steps: OfPreset[int] = FROM_PRESET
    """Optimiser steps."""
    lr: OfPreset[float] = FROM_PRESET
    """Learning rate of Adam."""
    batch: OfPreset[int] = FROM_PRESET
    """Prompts a step."""
    accumulation: int = 1
    """Batches a step; gradients are averaged over them."""
    guidance: OfPreset[float] = FROM_PRESET
    """Guidance scale of the samples that it trains on."""
    sampling_steps: OfPreset[int] = FROM_PRESET
    """Sampling steps of these."""
    retain_scale: OfPreset[float] = FROM_PRESET
    """Weight of the loss on what is kept."""
    expand: OfPreset[bool] = FROM_PRESET
    """Put each phrase into five short templates, too."""
    size: int | None = None
    """Pixels a side of the samples; the pipeline's own if not given."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Automatic mixed precision; weights and optimiser stay in float32."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""

    def __post_init__(self) -> None:
        for name, value in self.PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        least = {"steps": 1, "batch": 1, "accumulation": 1, "sampling_steps": 2, "size": 8, "rank": 1, "images": 1}
        for name, bound in least.items():
            if (value := getattr(self, name, None)) is not None and value < bound:
                raise ErasureError(f"{self.name}: {name} is {value}; it has to be at least {bound}")
        if not 0 < self.lr < math.inf or not 0 <= self.retain_scale < math.inf:
            raise ErasureError(f"{self.name}: lr is {self.lr} and retain_scale {self.retain_scale}; give lr above 0 and a scale from 0 on")

    @abstractmethod
    def objective(self, session: Session) -> Loss:
        """The loss of one micro-batch, after whatever has to be drawn or measured first."""

    def tuned(self, pipe: Any, family: Family, seed: int) -> AbstractContextManager[Tuned]:
        """What is trained."""
        return tuning.weights(pipe, tuning.chosen(pipe, family, self.part, self.layers))

    def optimiser(self) -> dict[str, Any]:
        """Further arguments of ``train``."""
        return {}

    def ceiling(self) -> float:
        """Loss from which on a run is lost."""
        return CEILING

    def watchers(self, tuned: Tuned) -> tuple[Callback, ...]:
        """What else has to happen after each step."""
        return ()

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> WeightEraser:
        tensors = self.run(pipe, concepts, run)
        return WeightEraser(self, tuple(concepts), tensors)

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> WeightEraser:
        return WeightEraser(self, concepts, tensors)

    def run(self, pipe: Any, concepts: Sequence[Concept], run: Run) -> dict[str, Tensor]:
        """Train, and give the trained tensors; ``pipe`` is as before afterwards."""
        family = self.family(pipe)
        check_concepts(self.name, concepts)
        if both := {_same(word) for word, _ in self.phrases(concepts)} & {_same(phrase) for phrase in self.retained(concepts)}:
            raise ErasureError(f"{self.name}: the prompt {min(both)!r} is erased and retained: take its phrase out of the retain list")
        if vars(pipe).get("_erasers"):
            raise NotErased(f"{self.name} is fitted on a bare base, and this pipeline has an eraser attached: detach it first")
        agreed = {
            "method": {self.name: self.config()},
            "concepts": [concept.to_dict() for concept in concepts],
            "base": fingerprint.take(pipe) if run.checkpoint else None,
        }
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())  # whatever the caller has switched off
            tuned = stack.enter_context(self.tuned(pipe, family, run.seed))
            stack.enter_context(tuning.checkpointed(pipe, family, self.gradient_checkpointing))
            session = Session(Denoising(pipe, family, self.size), tuned, tuple(concepts), run, stack)
            bar = Progress(self.name, run.progress)
            stack.callback(bar.close)
            train(
                tuned.parameters, self.objective(session), steps=self.steps, lr=self.lr, seed=run.seed, accumulation=self.accumulation,
                precision=self.precision, ceiling=self.ceiling(), checkpoint=run.checkpoint, save_every=SAVE_EVERY, settings=agreed,
                callbacks=(*self.watchers(tuned), bar, *run.callbacks), **self.optimiser(),
            )  # fmt: skip
            return tuned.tensors()

    def phrases(self, concepts: Sequence[Concept]) -> list[tuple[str, str]]:
        """Target and anchor of every concept, in every template."""
        found = {
            (template.format(target), template.format(anchor).strip() if anchor else ""): None
            for concept in concepts
            for template in self._templates(concept.kind)
            for target, anchor in concept.pairs()
        }
        return list(found)

    def retained(self, concepts: Sequence[Concept]) -> list[str]:
        """What is kept, in every template."""
        found = {t.format(phrase): None for concept in concepts for phrase in concept.retain for t in self._templates("other")}
        return list(found)

    def _templates(self, kind: str) -> tuple[str, ...]:
        templates = TEMPLATES.get(kind, TEMPLATES["other"])
        return templates if self.expand else templates[:1]


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(TrainedMethod):
    """A method that may train a LoRA instead of the weights themselves."""

    rank: int | None = None
    """Train a LoRA of this rank on the part's linear layers, instead of the weights: a small file that other tools load."""

    def chosen(self, pipe: Any, family: Family) -> list[str]:
        """Dotted names of the parameters, or of those of the layers that get a LoRA."""
        return tuning.chosen(pipe, family, self.part, self.layers)

    def tuned(self, pipe: Any, family: Family, seed: int) -> AbstractContextManager[Tuned]:
        names = self.chosen(pipe, family)
        return tuning.weights(pipe, names) if self.rank is None else tuning.lora(pipe, names, self.rank, seed)

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> WeightEraser | AdapterEraser:  # type: ignore[override]
        return self.eraser(tuple(concepts), self.run(pipe, concepts, run))

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> WeightEraser | AdapterEraser:  # type: ignore[override]
        return WeightEraser(self, concepts, tensors) if self.rank is None else AdapterEraser(self, concepts, tensors)


def check_concepts(name: str, concepts: Sequence[Concept]) -> None:
    """Raise where there is no concept, or one of them retains what another erases."""
    if not concepts:
        raise ErasureError(f"{name} was given no concept to erase")
    erased = {_same(target): concept.name for concept in concepts for target in concept.targets}
    for concept in concepts:
        for phrase in concept.retain:
            if (by := erased.get(_same(phrase))) is not None:
                raise ErasureError(
                    f"{name}: concept {concept.name!r} retains {phrase!r}, which {by!r} erases; training would pull both ways: "
                    "take it out of one of them"
                )


def _same(phrase: str) -> str:
    return " ".join(phrase.casefold().split())
