"""Minimalist Concept Erasure: masks on heads, neurons and norms, trained end to end through every sampling step."""

import logging
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure import fingerprint, tuning
from erasure.callbacks import Progress
from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.errors import ErasureError, NotErased
from erasure.families import Family, Unit
from erasure.method import ErasureMethod, Run
from erasure.trained import CEILING, FROM_PRESET, OfPreset, check_concepts
from erasure.training import Loss, train

from . import formulas
from .chain import Chain
from .eraser import MaskEraser
from .samples import Samples, from_base, from_file, phrases, retained
from .sites import Site, find, hooked

log = logging.getLogger("erasure")
SAVE_EVERY = 10
"""Optimiser steps between two checkpoints; each of them runs the whole sampler several times."""
RAMP, MOMENTUM = 0.2, 0.9
"""Of ranked gates: the share of the steps over which the budget opens, and of a step's movement that the next one goes on with."""


@dataclass(frozen=True, kw_only=True)
class Minimalist(ErasureMethod):
    """Minimalist Concept Erasure (Zhang et al., ICML 2025): as few units of the denoiser as possible are switched off.

    Hard-concrete gates are trained so that the final latents of a prompt with the concept become those that the base makes of the anchor
    from the same noise, and those of other prompts stay. The released code has no regulariser, and its masks close 63 % of the FLUX
    neurons that they are on; here a ``budget`` bounds the share that is switched off, of each kind. ``preset=released`` is what that code
    does. ``objective=preserve`` is EcoDiff (arXiv:2412.02852): the whole model pruned by the budget, and nothing erased on purpose.
    """

    name: ClassVar[str] = "minimalist"
    paper: ClassVar[str] = "arXiv:2507.13386"
    families: ClassVar[frozenset[str]] = frozenset(("sd1", "sd2", "sdxl", "sd3", "flux"))
    trained: ClassVar[bool] = True
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "budget": {
            "units": ("heads", "neurons", "norms"), "layers": (), "budget": 0.02, "steps": 100, "lr": 1.0, "weight_decay": 0.0,
            "batch": 1, "accumulation": 4, "images": 40, "sampling_steps": 5, "guidance": 1.0, "retain_scale": 1.0,
            "regulariser": "budget", "init": 3.0, "spread": 0.5, "clamp": "ranked", "expand": False, "company": False,
            "recompute": True,
        },
        "released": {  # its FLUX configuration: heads have a learning rate of 0
            "units": ("neurons", "norms"), "layers": ("ff", "ff_context", "norm1_context"), "budget": 0.02, "steps": 50, "lr": 0.5,
            "weight_decay": 0.01, "batch": 1, "accumulation": 4, "images": 40, "sampling_steps": 5, "guidance": 1.0, "retain_scale": 0.1,
            "regulariser": "none", "init": 3.0, "spread": 0.5, "clamp": "hard", "expand": False, "company": False,
            "recompute": True,
        },
        "canvas": {
            "units": ("heads", "neurons", "norms"), "layers": (), "budget": 0.02, "steps": 120, "lr": 1.0, "weight_decay": 0.0,
            "batch": 4, "accumulation": 1, "images": 192, "sampling_steps": 5, "guidance": 4.0, "retain_scale": 0.5,
            "regulariser": "budget", "init": 3.0, "spread": 0.5, "clamp": "ranked", "expand": True, "company": False,
            "recompute": False,
        },
        "canvas-flow": {
            "units": ("heads", "neurons", "norms"), "layers": (), "budget": 0.02, "steps": 120, "lr": 1.0, "weight_decay": 0.0,
            "batch": 4, "accumulation": 1, "images": 192, "sampling_steps": 5, "guidance": 3.0, "retain_scale": 0.3,
            "regulariser": "budget", "init": 3.0, "spread": 0.5, "clamp": "ranked", "expand": True, "company": True,
            "recompute": False,
        },
    }  # fmt: skip

    preset: Literal["budget", "released", "canvas", "canvas-flow"] = "budget"
    """Values of what is not given: ours for FLUX-schnell, the released code's for it, or quick ones for an embedded model."""
    objective: Literal["erase", "preserve"] = "erase"
    """erase: the concept becomes its anchor. preserve (EcoDiff): all outputs stay while the budget's share of units is switched off."""
    units: OfPreset[tuple[Unit, ...]] = FROM_PRESET
    """What has gates: attention heads, feed-forward neurons, outputs of norms."""
    layers: OfPreset[tuple[str, ...]] = FROM_PRESET
    """Only units in layers with one of these dotted parts in the name; all if empty."""
    budget: OfPreset[float] = FROM_PRESET
    """Largest share of the units of each kind that may be switched off; with ``preserve``, the share that is: the lowest logits."""
    budget_scale: float = 1.0
    """Weight of the regulariser: the relative overshoot of the budget."""
    regulariser: OfPreset[Literal["budget", "none"]] = FROM_PRESET
    """budget: the regulariser; what is closed beyond the budget even so is opened again. none: weight decay alone, as released."""
    retain_scale: OfPreset[float] = FROM_PRESET
    """Weight of the distance on what is kept (the retain list, or a dozen neutral captions), β."""
    pairs: str = ""
    """A file of image pairs (lines of JSON: prompt, seed, image) instead of the base's own images of the anchor."""
    steps: OfPreset[int] = FROM_PRESET
    """Optimiser steps; each runs the whole sampler."""
    lr: OfPreset[float] = FROM_PRESET
    """Learning rate of the gates' logits. Adam makes steps of this order whatever the size of the gradient; ranked gates do not depend on
    it."""
    weight_decay: OfPreset[float] = FROM_PRESET
    """Pull of the logits towards 0, the threshold."""
    batch: OfPreset[int] = FROM_PRESET
    """Images of the concept, and as many that are kept, in a micro-batch."""
    accumulation: OfPreset[int] = FROM_PRESET
    """Micro-batches to an optimiser step, under the same gates."""
    images: OfPreset[int] = FROM_PRESET
    """Targets of the concept, and as many of what is kept, that the base makes first."""
    sampling_steps: OfPreset[int] = FROM_PRESET
    """Steps of the sampler that gradients run through."""
    guidance: OfPreset[float] = FROM_PRESET
    """Classifier-free guidance of the sampler; 1 for none."""
    init: OfPreset[float] = FROM_PRESET
    """Logit that every gate starts from: 3 is open, for all noise within the default spread but 3 % of it."""
    spread: OfPreset[float] = FROM_PRESET
    """Width of the noise u around 1/2: 1 is the full (0, 1), 0.5 what the released code's ε = 0.5 leaves of it."""
    clamp: OfPreset[Literal["ranked", "binary", "through", "hard"]] = FROM_PRESET
    """How logits become gates. hard: no gradient where a gate is 0 or 1, as released, so that closed ones never come back. through: as if
    it were not clamped. binary: gates of 0 and 1 alone, as they are once folded, with the gradient of ``through``. ranked: the budget's
    share of the lowest logits is closed at every step, without noise or regulariser; logits sum up gradients (SGD with momentum), of
    which only the order counts. The last two are not for ``preserve``, whose loss is flat where all gates are open."""
    expand: OfPreset[bool] = FROM_PRESET
    """Put each phrase into five short templates, too."""
    company: OfPreset[bool] = FROM_PRESET
    """Name targets beside retained phrases, too, which then have to stay; styles have things in their templates already."""
    size: int | None = None
    """Pixels a side of the samples; the pipeline's own if not given."""
    recompute: OfPreset[bool] = FROM_PRESET
    """Run each sampling step again in the backward pass, in the memory of one step; false keeps all activations."""

    def __post_init__(self) -> None:
        values = dict(self.PRESETS[self.preset])
        if self.objective == "preserve" and values["clamp"] in ("binary", "ranked"):
            values |= {"clamp": "through", "lr": 0.1}
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not 0 < self.budget < 1:
            raise ErasureError(f"minimalist: budget is {self.budget}; it is a share between 0 and 1 (both excluded), such as 0.02")
        for name in ("steps", "batch", "accumulation", "images", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ErasureError(f"minimalist: {name} is {getattr(self, name)}; it has to be at least 1")
        if not 0 < self.lr < math.inf or not 0 < self.init < math.inf or not 0 < self.spread <= 1 or not self.units:
            raise ErasureError(
                f"minimalist: lr is {self.lr}, init {self.init}, spread {self.spread}, units {self.units}; give lr and init above 0, "
                "spread above 0 up to 1, and at least one kind of units"
            )
        for name in ("budget_scale", "retain_scale", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ErasureError(f"minimalist: {name} is {getattr(self, name)}; it has to be 0 or more")

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> MaskEraser:
        return MaskEraser(self, concepts, tensors)

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> MaskEraser:
        family = self.family(pipe)
        check_concepts(self.name, concepts)
        if vars(pipe).get("_erasers"):
            raise NotErased("minimalist is fitted on a bare base, and this pipeline has an eraser attached: detach it first")
        sites = find(pipe, family, self.units, self.layers)
        logits = self.train(pipe, family, sites, concepts, run)
        return self.eraser(tuple(concepts), self.masks(sites, logits))

    def train(self, pipe: Any, family: Family, sites: Sequence[Site], concepts: Sequence[Concept], run: Run) -> dict[str, Tensor]:
        """Trained logits by site; ``pipe`` is as before afterwards."""
        gates: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(tuning.weights(pipe, ()))  # nothing of the pipeline itself wants gradients
            chain = Chain(Denoising(pipe, family, self.size), self.sampling_steps, self.guidance, self.recompute)
            erase, keep = self.samples(chain, concepts, run)
            stack.enter_context(hooked(pipe, sites, gates))
            logits = {site.key: torch.full((site.count,), self.init, device=chain.denoising.denoiser.device) for site in sites}
            bar = Progress(self.name, run.progress)
            stack.callback(bar.close)
            agreed = {
                "method": {self.name: self.config()},
                "concepts": [concept.to_dict() for concept in concepts],
                "base": fingerprint.take(pipe) if run.checkpoint else None,
            }
            train(
                logits, self.loss(chain, logits, gates, erase, keep, run.seed), steps=self.steps, lr=self.lr, seed=run.seed,
                accumulation=self.accumulation, weight_decay=self.weight_decay, ceiling=CEILING, checkpoint=run.checkpoint,
                momentum=MOMENTUM if self.clamp == "ranked" else None, save_every=SAVE_EVERY, settings=agreed,
                callbacks=(bar, *run.callbacks),
            )  # fmt: skip
        return {key: value.detach().cpu() for key, value in logits.items()}

    def samples(self, chain: Chain, concepts: Sequence[Concept], run: Run) -> tuple[Samples | None, Samples]:
        """What should change (nothing, where the objective is to preserve), and what should stay."""
        pairs = [pair for concept in concepts for pair in phrases(concept, self.expand, self.company, run.seed)]
        if len(pairs) > self.images:  # a part by chance, which is fair to all concepts
            pairs = random.Random(run.seed).sample(pairs, self.images)
        kept = retained(concepts, self.expand)
        if self.objective == "preserve":
            kept = [*kept, *(target for target, _ in pairs)]
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(run.seed)).tolist()
        keep = from_base(chain, [(kept[i], kept[i]) for i in order], self.images, run.seed + 1, run.progress)
        if self.objective == "preserve":
            return None, keep
        return from_file(chain, Path(self.pairs)) if self.pairs else from_base(chain, pairs, self.images, run.seed, run.progress), keep

    def loss(
        self,
        chain: Chain,
        logits: Mapping[str, Tensor],
        gates: dict[str, Tensor],
        erase: Samples | None,
        keep: Samples,
        seed: int,
    ) -> Loss:
        """Distances of final latents, and the regulariser; writes ``gates``, which stay until the backward pass has run."""

        def loss(step: int, generator: torch.Generator) -> Tensor:
            gates.update(self.gates(logits, seed, step))
            total = self._budgeted(logits)
            if erase is None:
                return total + keep.loss(chain, self.batch, generator)
            return total + erase.loss(chain, self.batch, generator) + self.retain_scale * keep.loss(chain, self.batch, generator)

        return loss

    def gates(self, logits: Mapping[str, Tensor], seed: int, step: int) -> dict[str, Tensor]:
        """Gates of all micro-batches of an optimiser step, and of their recomputation: what they are depends on logits and step alone."""
        found: dict[str, Tensor] = {}
        if self.clamp == "ranked":
            share = min(1.0, step / (RAMP * self.steps))
            for mine in _by_kind(logits).values():
                found |= formulas.ranked(mine, math.floor(share * self._most(mine)))
            return found
        draw = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        rule = {"binary": formulas.binary, "through": formulas.through, "hard": formulas.hard_concrete}[self.clamp]
        for key, each in logits.items():
            u = 0.5 + self.spread * (torch.rand(each.shape, generator=draw) - 0.5)
            found[key] = rule(each, u.clamp(1e-6, 1 - 1e-6).to(each))
        return found

    def _most(self, logits: Mapping[str, Tensor]) -> int:
        """How many units of a kind the budget allows to switch off."""
        return math.floor(self.budget * sum(len(each) for each in logits.values()))

    def _budgeted(self, logits: Mapping[str, Tensor]) -> Tensor:
        if self.regulariser == "none" or self.clamp == "ranked":
            return torch.zeros((), device=next(iter(logits.values())).device)
        shares = {kind: formulas.share_closed(torch.cat(list(mine.values()))) for kind, mine in _by_kind(logits).items()}
        return self.budget_scale * formulas.overspent(shares, self.budget, exactly=self.objective == "preserve")

    def masks(self, sites: Sequence[Site], logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Closed gates [count] bool by site; errors where none is closed, or all of a kind are."""
        found: dict[str, Tensor] = {}
        for kind, mine in _by_kind(logits).items():
            found |= self._ranked_off(mine) if self.clamp == "ranked" else self._off(kind, mine)
        if not any(mask.any() for mask in found.values()):
            raise ErasureError("minimalist closed no gate, so nothing would be erased: take a larger lr, more steps, or a larger budget")
        return {site.key: found[site.key] for site in sites}

    def _ranked_off(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The budget's share of the lowest logits, less those that training never pushed down."""
        lowest = formulas.within(logits, self._most(logits), exactly=True)
        return {key: mask & (logits[key] < self.init) for key, mask in lowest.items()}

    def _off(self, kind: str, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        everything = sum(len(each) for each in logits.values())
        wanted = sum(int(formulas.closed(each).sum()) for each in logits.values())
        if wanted == everything:
            raise ErasureError(
                f"minimalist closed all {everything} {kind}, which leaves no model: take a smaller lr, fewer steps, or regulariser=budget"
            )
        most = everything if self.regulariser == "none" else self._most(logits)
        exactly = self.objective == "preserve" and self.regulariser == "budget"
        if wanted > most and not exactly:
            log.warning("minimalist closed %d of %d %s; the budget allows %d: the others are opened", wanted, everything, kind, most)
        return formulas.within(logits, most, exactly=exactly)


def _by_kind(logits: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Logits by site, apart for heads, neurons and norms: the last part of a site's key."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for key, each in logits.items():
        kinds.setdefault(key.rpartition(".")[2], {})[key] = each
    return kinds
