"""Selective synaptic dampening, carried to the denoising loss: weights that matter far more for the concept than for the rest shrink."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erasure import tuning
from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.errors import ErasureError, NotErased
from erasure.method import ErasureMethod, Run, WeightEraser
from erasure.methods.masking.samples import NEUTRAL
from erasure.methods.salun import saliency_mask
from erasure.trained import TEMPLATES, Pool, Session, check_concepts
from erasure.tuning import Part

AT_ONCE = 8
"""Images that the base makes in one batch."""


def dampen(
    param: Tensor,
    fisher_forget: Tensor,
    fisher_all: Tensor,
    alpha: float,
    bound: float = 1.0,
    dampening: float = 1.0,
    exponent: float = 1.0,
) -> Tensor:
    """θ min((λ F_all / F_forget)^p, bound) where F_forget > α F_all, and θ elsewhere; all tensors of one shape. ``param`` stays.

    ``alpha`` is the selection weighting α, ``dampening`` the constant λ, ``exponent`` p (1 in the paper), and ``bound`` what a factor is
    at most: 1, so that no weight grows. Errors: Fisher terms below 0, not finite, or of another shape raise.
    Source: Foster et al., AAAI 2024; the released code has the exponent and the bound.
    """
    for name, fisher in (("forget", fisher_forget), ("all", fisher_all)):
        if fisher.shape != param.shape:
            raise ValueError(f"the Fisher terms of {name} are {tuple(fisher.shape)}, the parameters {tuple(param.shape)}")
        if not fisher.isfinite().all() or (fisher < 0).any():
            raise ErasureError(f"ssd_diffusion: Fisher terms of {name} are not finite, or below 0; load the base in float32 or bfloat16")
    chosen = fisher_forget > alpha * fisher_all
    ratio = dampening * fisher_all / torch.where(chosen, fisher_forget, 1)  # where it is chosen, F_forget is above 0
    return torch.where(chosen, (param * ratio.pow(exponent).clamp(max=bound)).to(param.dtype), param)


@dataclass(frozen=True, kw_only=True)
class SSD(ErasureMethod):
    """Selective Synaptic Dampening (Foster et al., AAAI 2024), a method for classifiers: our transfer to the denoising loss.

    The importance of a weight is the mean squared gradient of the denoising loss (the diagonal of the Fisher information), on images
    of the concept and on images of anchors and retain list, all made by the base, under the same noise. No training follows. The paper's
    F over all training data has the concept's class in it; a share s of that in ours would only make α larger: α (1 - s) / (1 - α s).
    Memory: three times the chosen parameters; gradients go into the sums one parameter at a time.
    """

    name: ClassVar[str] = "ssd_diffusion"
    paper: ClassVar[str] = "arXiv:2308.07707"
    families: ClassVar[frozenset[str]] = frozenset(("sd1", "sd2", "sdxl", "sd3", "flux"))
    trained: ClassVar[bool] = True

    alpha: float = 10.0
    """A weight is dampened if its F on the concept is above α times that on the rest; the paper's 10 is for classifiers."""
    share: float | None = None
    """Dampen this share of the weights instead: those with the highest ratios."""
    dampening: float = 1.0
    """Dampening constant λ: chosen weights are scaled by λ / ratio, but never up."""
    part: Part = "full"
    """Which weights: kv (keys, values of the text), x (cross-attention), u (all but that, time embedding and output), full, selfattn."""
    layers: tuple[str, ...] = ()
    """Names of layers to take instead, or dotted parts of names."""
    batch: int = 1
    """Images whose mean gradient is squared: 1 is the Fisher information; the authors' code squares gradients of whole batches."""
    images: int = 32
    """Images of the concept, and as many of the rest."""
    draws: int = 4
    """Noises and timesteps for each image."""
    sampling_steps: int = 25
    """Sampling steps of the images."""
    guidance: float = 7.5
    """Guidance scale of the images."""
    size: int | None = None
    """Pixels a side of the images; the pipeline's own if not given."""

    def __post_init__(self) -> None:
        if not self.alpha >= 0 or not self.dampening >= 0 or not (self.share is None or 0 < self.share <= 1):
            raise ErasureError(
                f"ssd_diffusion: alpha is {self.alpha}, dampening {self.dampening}, share {self.share}; give the first two from 0 on, and "
                "a share above 0 and up to 1, or none"
            )
        for name, least in {"batch": 1, "images": 1, "draws": 1, "sampling_steps": 2}.items():
            if getattr(self, name) < least:
                raise ErasureError(f"ssd_diffusion: {name} is {getattr(self, name)}; it has to be at least {least}")

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> WeightEraser:
        family = self.family(pipe)
        check_concepts(self.name, concepts)
        if vars(pipe).get("_erasers"):
            raise NotErased("ssd_diffusion is fitted on a bare base, and this pipeline has an eraser attached: detach it first")
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())  # whatever the caller has switched off
            tuned = stack.enter_context(tuning.weights(pipe, tuning.chosen(pipe, family, self.part, self.layers)))
            session = Session(Denoising(pipe, family, self.size), tuned, tuple(concepts), run, stack)
            making: dict[str, Any] = {"steps": self.sampling_steps, "guidance": self.guidance, "batch": AT_ONCE}
            forget, rest = (self.fisher(session, session.pool(texts, self.images, **making)) for texts in self.prompts(concepts))
            changed = self._dampened(tuned.originals, forget, rest)
        if not changed:
            raise ErasureError(
                "ssd_diffusion: no weight is chosen that it would change; take a smaller alpha or dampening, or give a (larger) share"
            )
        return self.eraser(tuple(concepts), changed)

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> WeightEraser:
        return WeightEraser(self, concepts, tensors)

    def prompts(self, concepts: Sequence[Concept]) -> tuple[list[str], list[str]]:
        """Of the concepts, and of the rest: anchors and retained phrases, or neutral ones where there is no retain list."""
        forget = [t.format(word) for concept in concepts for word in concept.targets for t in _templates(concept)]
        anchors = [t.format(word) for concept in concepts for word in concept.anchors if word for t in _templates(concept)]
        kept = [t.format(word) for t in TEMPLATES["other"] for concept in concepts for word in concept.retain]
        return forget, list(dict.fromkeys(_in_turn(anchors, kept or list(NEUTRAL))))

    def fisher(self, session: Session, pool: Pool) -> dict[str, Tensor]:
        """Mean squared gradient of the denoising loss over draws of the images, by parameter, in float32.

        Source: Foster et al., with |target - prediction|² of eps, v or flow in the place of the classifier's loss.
        """
        of, draw = session.denoising, torch.Generator().manual_seed(session.run.seed)
        starts = [*range(0, len(pool.prompts), self.batch)] * self.draws
        with _squares(session.tuned.parameters) as sums:
            for start in tqdm(starts, desc="fisher", disable=not session.run.progress):
                x0, words = pool.states[start : start + self.batch, -1], pool.prompts[start : start + self.batch]
                noise, t = torch.randn(x0.shape, generator=draw).to(x0), of.timesteps(len(x0), draw)
                x_t, wanted = of.schedule.add_noise(x0, noise, t), of.schedule.target(x0, noise, t)
                (of.predict(x_t, t, words) - wanted).square().mean().backward()  # type: ignore[no-untyped-call]
        return {name: each.div_(len(starts)) for name, each in sums.items()}

    @torch.no_grad()
    def _dampened(self, originals: Mapping[str, Tensor], forget: dict[str, Tensor], rest: dict[str, Tensor]) -> dict[str, Tensor]:
        """New values of the parameters that change, on the CPU; takes the Fisher terms away one by one."""
        alpha = self.alpha if self.share is None else _threshold(forget, rest, self.share)
        changed = {}
        for name, value in originals.items():
            new = dampen(value, forget.pop(name), rest.pop(name), alpha, dampening=self.dampening)
            if not torch.equal(new, value):
                changed[name] = new.cpu()
        return changed


def _templates(concept: Concept) -> tuple[str, ...]:
    return TEMPLATES["style" if concept.kind == "style" else "other"]


def _in_turn(first: Sequence[str], second: Sequence[str]) -> Iterator[str]:
    """One of each in turn, so that a few images have some of both."""
    for i in range(max(len(first), len(second))):
        yield from (*first[i : i + 1], *second[i : i + 1])


def _threshold(forget: Mapping[str, Tensor], rest: Mapping[str, Tensor], share: float) -> float:
    """The α just below the ratios of that share of the weights; infinite where the share is less than one weight."""
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    ratios = {name: (forget[name] / rest[name].clamp(min=least)).clamp(max=most) for name in forget}
    chosen = saliency_mask(ratios, share)
    return min((float(ratios[name][mask].min()) for name, mask in chosen.items() if mask.any()), default=float("inf")) * (1 - 1e-6)


@contextmanager
def _squares(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Sums of the squared gradients of every backward pass inside, in float32; a gradient is gone as soon as it is in its sum."""
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}

    def collect(into: Tensor) -> Any:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            into.add_(parameter.grad.float().square())
            parameter.grad = None

        return add

    with ExitStack() as stack:
        for name, parameter in parameters.items():
            stack.callback(parameter.register_post_accumulate_grad_hook(collect(sums[name])).remove)
        yield sums
