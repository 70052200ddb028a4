"""ConceptPrune: feed-forward weights that the concept's prompts excite more than other prompts do, set to zero."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.errors import ErasureError, NotErased
from erasure.method import ErasureMethod, Run, WeightEraser
from erasure.methods.masking.samples import NEUTRAL
from erasure.methods.masking.sites import Site, find
from erasure.seams import activation
from erasure.seams.weights import editable, parameter
from erasure.trained import TEMPLATES, check_concepts

AT_ONCE = 8
"""Images that are sampled in one batch."""


def scores(weight: Tensor, norms: Tensor) -> Tensor:
    """Importance of each weight, |W| times the norm of its input: weight [o, i], norms [i] -> [o, i].

    Source: Sun et al., ICLR 2024 (Wanda), as Chavhan et al., ICLR 2025, take it.
    """
    return weight.abs() * norms


def skilled(target: Tensor, base: Tensor, ratio: float) -> Tensor:
    """Weights that serve the concept: in the top ``ratio`` of their row by its scores, and above the score without it; bool [o, i].

    ``target`` and ``base`` [o, i] are `scores` on prompts with and without the concept; int(ratio i) weights of a row come into question.
    Errors: shapes that differ, or a ratio outside 0..1, raise. Source: Chavhan et al., ICLR 2025.
    """
    if target.shape != base.shape:
        raise ValueError(f"scores with and without the concept belong to one layer: {tuple(target.shape)} against {tuple(base.shape)}")
    if not 0 <= ratio <= 1:
        raise ErasureError(f"conceptprune: ratio is {ratio}; it is the share of a row that may be pruned, from 0 to 1")
    top = torch.zeros_like(target, dtype=torch.bool)
    top.scatter_(1, target.topk(int(ratio * target.shape[1]), dim=1).indices, True)
    return top & (target > base)


@dataclass(frozen=True, kw_only=True)
class ConceptPrune(ErasureMethod):
    """ConceptPrune (Chavhan et al., ICLR 2025): skilled weights of the second feed-forward layers, pruned once for all steps.

    The base samples prompts with and without the concept from the same noise, and the norms of the layers' inputs are kept step by step.
    What is skilled in one of the first steps is zero afterwards. On SD3 that holds for the feed-forwards of image and text, on FLUX.1 for
    those and the neurons of the single blocks; the paper has SD 1.x and 2. Weights of several concepts are found one by one, and united.
    Steps are DDIM's (Euler's on flows) where the authors' are PNDM's. The zeros show what was pruned: who has the base can put it back.
    """

    name: ClassVar[str] = "conceptprune"
    paper: ClassVar[str] = "arXiv:2405.19237"
    families: ClassVar[frozenset[str]] = frozenset(("sd1", "sd2", "sdxl", "sd3", "flux"))
    trained: ClassVar[bool] = True

    ratio: float = 0.02
    """Share of each row that may be pruned: the authors take 0.02 for objects, 0.01 for styles and nudity."""
    timesteps: int = 10
    """First sampling steps whose skilled weights are pruned, τ."""
    agreement: float = 0.0
    """Share of these steps beyond which a weight has to be skilled; 0 is the union over the steps."""
    base: Literal["context", "anchor"] = "context"
    """Prompts without the concept: the scenes alone that it is put into (context, as in the authors' code), or its anchor."""
    branches: Literal["both", "text"] = "both"
    """Whose activations count: of the prompt and the empty prompt, as in the authors' code, or of the prompt alone."""
    normalise: bool = True
    """Scale the activations of each token to length 1, as the authors' code does; the formula of the paper has no such step."""
    images: int = 48
    """Pairs of images with and without the concept."""
    sampling_steps: int = 50
    """Sampling steps of a full run, of which the first ``timesteps`` are made."""
    guidance: float = 7.5
    """Guidance scale of the samples."""
    size: int | None = None
    """Pixels a side of the samples; the pipeline's own if not given."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1 or not 0 <= self.agreement < 1:
            raise ErasureError(f"conceptprune: ratio is {self.ratio} and agreement {self.agreement}; both are shares, such as 0.02 and 0")
        if not 1 <= self.timesteps <= self.sampling_steps or self.images < 1:
            raise ErasureError(
                f"conceptprune: {self.timesteps} timesteps of {self.sampling_steps} sampling steps on {self.images} images; "
                "take at least one image and one step, and no more steps than there are"
            )

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> WeightEraser:
        family = self.family(pipe)
        check_concepts(self.name, concepts)
        if vars(pipe).get("_erasers"):
            raise NotErased("conceptprune is fitted on a bare base, and this pipeline has an eraser attached: detach it first")
        sites = find(pipe, family, ("neurons",))
        weights = {site.key: editable(name, parameter(pipe, name)).detach() for site in sites for name in [_weight(site)]}
        pruned = {key: torch.zeros_like(weight, dtype=torch.bool) for key, weight in weights.items()}
        of, draw = Denoising(pipe, family, self.size), torch.Generator().manual_seed(run.seed)
        with tqdm(total=2 * self.images * len(concepts), desc=self.name, disable=not run.progress) as bar:
            for concept in concepts:
                pairs = self.pairs(concept)
                chosen = [pairs[i % len(pairs)] for i in range(self.images)]
                seeds = torch.randint(2**31, (self.images,), generator=draw).tolist()
                target, base = (self.norms(of, sites, prompts, seeds, bar) for prompts in zip(*chosen, strict=True))
                for site in sites:
                    pruned[site.key][:, site.span] |= self.mask(weights[site.key][:, site.span], target[site.key], base[site.key])
        if not any(mask.any() for mask in pruned.values()):
            raise ErasureError(
                f"conceptprune found no skilled weight: none of the top {self.ratio:.2%} of any row serves the concept more than its base "
                "prompts, or the share is less than one weight; take a larger ratio, or other anchors"
            )
        changed = {_weight(s): weights[s.key].masked_fill(pruned[s.key], 0).cpu() for s in sites if pruned[s.key].any()}
        return self.eraser(tuple(concepts), changed)

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> WeightEraser:
        return WeightEraser(self, concepts, tensors)

    def pairs(self, concept: Concept) -> list[tuple[str, str]]:
        """Prompts with the concept, and what each is compared with."""
        kind = "style" if concept.kind == "style" else "other"
        if self.base == "anchor":
            return [(t.format(word), t.format(anchor) if anchor else "") for t in TEMPLATES[kind] for word, anchor in concept.pairs()]
        form = "{scene} in the style of {word}" if kind == "style" else "{word} and {scene}"
        return [(form.format(word=word, scene=scene), scene) for scene in concept.retain or NEUTRAL for word in concept.targets]

    @torch.no_grad()
    def norms(self, of: Denoising, sites: Sequence[Site], prompts: Sequence[str], seeds: Sequence[int], bar: Any) -> dict[str, Tensor]:
        """Norms of each input of the sites' layers over prompts and tokens, by site: [timesteps, neurons] in float64."""
        sums = {site.key: torch.zeros(self.timesteps, site.count, dtype=torch.float64) for site in sites}
        layers: dict[nn.Module, Site] = {}
        for site in sites:
            component, _, path = site.layers[0].partition(".")
            layers[getattr(of.pipe, component).get_submodule(path)] = site
        step = 0

        def note(module: nn.Module, x: Tensor) -> Tensor:
            site = layers[module]
            rows = x[..., site.span].flatten(0, -2).float()
            rows = nn.functional.normalize(rows, dim=1) if self.normalise else rows
            sums[site.key][step] += rows.square().sum(0).double().cpu()
            return x

        for start in range(0, len(prompts), AT_ONCE):
            part = list(prompts[start : start + AT_ONCE])
            states, t = of.paths(
                part, seeds[start : start + AT_ONCE], steps=self.sampling_steps, guidance=self.guidance, stop=self.timesteps
            )
            with activation.inputs(layers, note):
                for step in range(self.timesteps):
                    of.predict(states[:, step], t[step], part)
                    if self.branches == "both":
                        of.predict(states[:, step], t[step], [""] * len(part))
            bar.update(len(part))
        for key, total in sums.items():
            if not total.isfinite().all():
                raise ErasureError(f"conceptprune: activations in {key} are not finite; load the base in float32 or bfloat16")
        return {key: total.sqrt() for key, total in sums.items()}

    def mask(self, weight: Tensor, target: Tensor, base: Tensor) -> Tensor:
        """Weights [o, i] that are skilled in enough steps, by norms [timesteps, i] with and without the concept."""
        count = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
        for with_it, without in zip(target.float().to(weight.device), base.float().to(weight.device), strict=True):
            count += skilled(scores(weight.float(), with_it), scores(weight.float(), without), self.ratio)
        return count > self.agreement * self.timesteps


def _weight(site: Site) -> str:
    return f"{site.layers[0]}.weight"
