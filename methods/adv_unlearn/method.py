"""The bilevel problem: attacks on the prompt inside, ESD's loss at the attacked prompt outside, on the shared training loop."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from erasure import tuning
from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.families import Family
from erasure.method import Run, WeightEraser
from erasure.methods import esd
from erasure.trained import FROM_PRESET, OfPreset, Pool, Session, TrainedMethod
from erasure.training import Loss
from erasure.tuning import Part, Tuned

from .attack import Reader, Slots, Strategy, attack_step
from .eraser import TextPart, TextWeights, filed, parameters


@dataclass(frozen=True, kw_only=True)
class AdvUnlearn(TrainedMethod):
    """AdvUnlearn (Zhang et al., NeurIPS 2024): ESD's loss at the prompts that bring the concept back best, on the text encoder.

    In each step an attacker moves token embeddings until the model predicts at the attacked prompt what the base predicts for the concept;
    then the model learns ESD's target there, and the base's predictions for what is retained. What is trained by default is the CLIP text
    encoder, so the artefact is that alone, and every pipeline that reads it is erased. On FLUX.1, CLIP gives only the pooled vector
    and on SD3 T5 reads the prompt too: there what T5 says stays as it was.

    Unlike the released code: the attack is projected, its gradients do not pile up, all pieces of the concept's words stay in the prompt,
    and training goes on at the attack's last state. States lie on the ways to images that the base made once; for the text encoder
    that is the same distribution, since the code samples its states with the unchanged encoder too.
    """

    name: ClassVar[str] = "adv_unlearn"
    paper: ClassVar[str] = "arXiv:2405.15234"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "part": "text", "steps": 1000, "lr": 1e-5, "batch": 1, "guidance": 3.0, "sampling_steps": 50, "eta": 1.0, "start": "null",
            "images": 100,
            "retain_scale": 0.3, "retain_batch": 5, "neutral": True, "expand": False, "warmup": 200,
            "attack_steps": 30, "attack_lr": 1e-3, "radius": 1.0, "attack_states": "fresh",
        },
        "canvas": {
            "part": "text", "steps": 100, "lr": 3e-4, "batch": 4, "guidance": 4.0, "sampling_steps": 10, "eta": 1.0, "start": "kind",
            "images": 32,
            "retain_scale": 1.0, "retain_batch": 4, "neutral": False, "expand": True, "warmup": 20,
            "attack_steps": 1, "attack_lr": 0.02, "radius": 0.3, "attack_states": "same",
        },
    }  # fmt: skip

    part: OfPreset[TextPart | Part] = FROM_PRESET  # type: ignore[assignment]
    """What is trained: text (all blocks of the CLIP encoders), text_attn, text_mlp; or of the denoiser kv, x, u, full, selfattn."""
    strategy: Strategy = "prefix"
    """Where the attack acts: on new tokens before or behind the prompt, in the place of its first other words (with the concept's alone,
    before it), or on the concept's own."""
    tokens: int = 1
    """New tokens of the attack, k; add has none."""
    attack_steps: OfPreset[int] = FROM_PRESET
    """Steps of the attack; 1 is the fast attack, which wants an attack_lr near radius / √dim to go as far as the radius."""
    attack_lr: OfPreset[float] = FROM_PRESET
    """Size of an attack step in each entry of a token embedding, whose deviation is about 0.01 in SD 1.5."""
    radius: OfPreset[float] = FROM_PRESET
    """Length that a prompt's perturbation may have; token embeddings of SD 1.5 have about 0.4."""
    attack_states: OfPreset[Literal["fresh", "same"]] = FROM_PRESET
    """Whether each attack step looks at another state on the way to the same image (paper: of other noise, too), or at the one that the
    model is trained on."""
    warmup: OfPreset[int] = FROM_PRESET
    """Steps at clean prompts before the first attack."""
    eta: OfPreset[float] = FROM_PRESET
    """Strength of the negative guidance, η, of ESD's target."""
    start: OfPreset[Literal["null", "anchor", "kind"]] = FROM_PRESET
    """Where ESD's target is guided away from the concept: null (paper), the anchor, so that another thing is drawn, or (kind) the anchor
    for styles and null for all else (both ours)."""
    retain_batch: OfPreset[int] = FROM_PRESET
    """Retained prompts a step."""
    neutral: OfPreset[bool] = FROM_PRESET
    """Retain our list of neutral captions, too, but for those that name the concept."""
    images: OfPreset[int] = FROM_PRESET
    """Samples of the base, and as many of what is retained, on whose ways the states lie."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"tokens": 1, "attack_steps": 1, "warmup": 0, "retain_batch": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ErasureError(f"adv_unlearn: {name} is {getattr(self, name)}; it has to be at least {bound}")
        if not (0 < self.attack_lr < 100 and 0 < self.radius < 1000):
            raise ErasureError(f"adv_unlearn: attack_lr is {self.attack_lr} and radius {self.radius}; give numbers above 0")
        if not -100 <= self.eta <= 100:
            raise ErasureError(f"adv_unlearn: eta is {self.eta}; the paper's is 1, and more than 100 is no guidance")

    def tuned(self, pipe: Any, family: Family, seed: int) -> AbstractContextManager[Tuned]:
        if self.part in get_args(TextPart):
            return tuning.weights(pipe, parameters(pipe, family, self.part, self.layers))  # type: ignore[arg-type]
        return super().tuned(pipe, family, seed)

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> WeightEraser:
        tensors = self.run(pipe, concepts, run)
        text = self.part in get_args(TextPart)
        return self.eraser(tuple(concepts), {filed(name) if text else name: tensor for name, tensor in tensors.items()})

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> WeightEraser:
        return (TextWeights if self.part in get_args(TextPart) else WeightEraser)(self, concepts, tensors)

    def objective(self, session: Session) -> Loss:
        of, targets, kept = session.denoising, self._targets(session.concepts), self._kept(session.concepts)
        reader = Reader(of)
        starts = self._starts(session.concepts)
        reader.check(next(iter(targets)))
        of.encode([*targets, *starts.values(), *kept])  # from here on what the base's encoders say is known
        making: dict[str, Any] = {"steps": self.sampling_steps, "guidance": self.guidance, "batch": max(self.batch, 8), "whole": True}
        gone = session.pool(list(targets), self.images, **making)
        others = session.pool(kept, self.images, **making) if kept and self.retain_scale else None

        def loss(step: int, generator: torch.Generator) -> Tensor:
            x_t, t, some = gone.state(self.batch, generator)
            prompts = [gone.prompts[i] for i in some]
            with session.tuned.reference():
                null, concept = (of.predict(x_t, t, texts) for texts in ([""] * len(prompts), prompts))
                start = of.predict(x_t, t, [starts[text] for text in prompts]) if any(starts.values()) else None
            perturbed = None
            if step >= self.warmup:
                slots = reader.slots(prompts, [targets[text] for text in prompts], self.strategy, self.tokens, generator)
                view = _View(gone, some, x_t, t, concept)
                perturbed = slots, self.attacked(session, reader, slots, prompts, view, generator)
            total = (of.predict(x_t, t, reader.encode(prompts, perturbed)) - esd.target(null, concept, self.eta, start)).square().mean()
            if others is not None:
                x_t, t, some = others.state(self.retain_batch, generator)
                prompts = [others.prompts[i] for i in some]
                with session.tuned.reference():
                    wanted = of.predict(x_t, t, prompts)
                total = total + self.retain_scale * (of.predict(x_t, t, reader.encode(prompts)) - wanted).square().mean()
            return total

        return loss

    def attacked(
        self,
        session: Session,
        reader: Reader,
        slots: Mapping[str, Slots],
        prompts: Sequence[str],
        view: "_View",
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Perturbations [n, tokens, dim] by component, after the last step towards the base's predictions for the concept."""
        of, delta = session.denoising, reader.start(slots)
        for _ in range(self.attack_steps):
            x_t, t, concept = view.x_t, view.t, view.concept
            if self.attack_states == "fresh":
                x_t, t = view.elsewhere(generator)
                with session.tuned.reference():
                    concept = of.predict(x_t, t, prompts)
            error = (of.predict(x_t, t, reader.encode(prompts, (slots, delta))) - concept).square().sum()
            error = error * concept[0].numel() ** -0.5  # a mean's gradients are zero in float16 on large latents; signs are those of any
            gradients = torch.autograd.grad(error, list(delta.values()))
            delta = {
                component: attack_step(each.detach(), gradient, self.attack_lr, self.radius).requires_grad_()
                for (component, each), gradient in zip(delta.items(), gradients, strict=True)
            }
        return {component: each.detach() for component, each in delta.items()}

    def _targets(self, concepts: Sequence[Concept]) -> dict[str, str]:
        """Every prompt that names a concept, and the target phrase in it."""
        return {
            template.format(target): target
            for concept in concepts
            for template in self._templates(concept.kind)
            for target in concept.targets
        }

    def _starts(self, concepts: Sequence[Concept]) -> dict[str, str]:
        """The prompt whose prediction ESD's target starts from, for every prompt that names a concept: the anchor's, or none."""
        return {
            prompt: anchor if self.start == "anchor" or (self.start == "kind" and concept.kind == "style") else ""
            for concept in concepts
            for prompt, anchor in self.phrases([concept])
        }

    def _kept(self, concepts: Sequence[Concept]) -> list[str]:
        """Retained phrases in every template, and neutral captions that name no concept."""
        found = self.retained(concepts)
        if self.neutral:
            with files("erasure.prompts").joinpath("lists/neutral.csv").open(encoding="utf-8") as file:
                captions = [row["prompt"] for row in csv.DictReader(file)]
            erased = [target.casefold() for concept in concepts for target in concept.targets]
            found += [caption for caption in captions if not any(target in caption.casefold() for target in erased)]
        return found


@dataclass(frozen=True)
class _View:
    """Where the model is looked at: states [n, ...] of some images of a pool, and the base's predictions for the concept there."""

    pool: Pool
    images: list[int]
    x_t: Tensor
    t: Tensor
    concept: Tensor

    def elsewhere(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Other states on the ways to the same images, and their timesteps."""
        when = torch.randint(len(self.pool.t), (len(self.images),), generator=generator)
        return self.pool.states[self.images, when], self.pool.t[when.to(self.pool.t.device)]
