"""SAeUron as a method, and what its fit gives."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from typing import Any, ClassVar, Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor
from tqdm.auto import tqdm

from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.families import Family
from erasure.method import ErasureMethod, Run, RuntimeEraser
from erasure.seams import denoiser, prompt
from erasure.seams.issued import Issued

from ..sae.coder import SparseCoder, SparseCoderConfig
from ..sae.hookpoints import editing
from .formulas import Rule, ablate, choose, deactivate, score
from .reading import Clock, activations, block_of, contrast, maps, mean_codes, patches, prompts_of, retained

log = logging.getLogger("erasure")

CANVAS = "weights/sae-unet"
"""The autoencoder that ships with the canvas."""


@dataclass(frozen=True, kw_only=True)
class SAeUron(ErasureMethod):
    """SAeUron (Cywiński and Deja, ICML 2025): an autoencoder's features of a UNet block, chosen by score for each timestep and ablated.

    ``fit`` draws a few images of each concept and of what is retained with the base, reads the block's codes for the text side of the
    guidance at each timestep, and keeps what it needs with the autoencoder's weights, so that its eraser stands alone. At run time the
    nearest of those timesteps counts: nothing is counted up, so that the number of steps is free and each run is as the first. Where no
    chosen feature fires, the block's output is the base's. D_¬c is what was retained; a concept that is erased too is no part of it.

    It acts on what the image becomes, whatever the prompt was: as a rule, prompts that were given as embeddings are erased, too.
    """

    name: ClassVar[str] = "saeuron"
    paper: ClassVar[str] = "arXiv:2501.18052"
    families: ClassVar[frozenset[str]] = frozenset(("sd1", "sd2", "sdxl"))

    sae: str = ""
    """Folder of an autoencoder of the block's output; unset: the one of the canvas, which ships with the suite."""
    hookpoint: str = ""
    """The block, such as the paper's unet.up_blocks.1.attentions.1; unset: the one that the autoencoder was trained on."""
    percentile: float = 99.5
    """Features that score above this percentile of all are chosen. The paper's is 99.99 to 99.999: two or one of its 20480."""
    factor: float = -4.0
    """Strength of the ablation, γ: 0 switches a chosen feature off, below 0 turns it round."""
    rule: Rule = "scale"
    """What a chosen feature z becomes: γ z (scale), γ μ (mean), or γ μ z (paper), with μ its mean over the concept's images. The paper's
    grows with the square of the activations' scale, so each model asks for another γ: theirs is -1 for styles, -1 to -30 for objects."""
    branches: Literal["both", "text"] = "both"
    """Sides of the guidance that are edited. both, as released, needs to know nothing of the call. text leaves the unconditional side as it
    is, and refuses prompts that do not come as text."""
    images: int = 16
    """Images of each concept; of what is retained one a phrase, but at least as many, and at most four times as many."""
    steps: int = 20
    """Sampling steps of these images; each has its own features."""

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ErasureError(f"saeuron: percentile is {self.percentile}; it has to be from 0 to 100")
        if min(self.images, self.steps) < 1:
            raise ErasureError(f"saeuron: images is {self.images}, steps {self.steps}; both have to be at least 1")

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> "SAeUronEraser":
        family = self.family(pipe)
        if not concepts:
            raise ErasureError("saeuron was given no concept to erase")
        coder = SparseCoder.load(self.sae or str(files("erasure.canvas").joinpath(CANVAS)))
        where = self.hookpoint or coder.config.hookpoint
        self._check(pipe, family, coder, where)
        coder.config = replace(coder.config, hookpoint=where)
        kept = retained(concepts)
        texts = [*(prompts_of(concept, self.images) for concept in concepts), contrast(kept, self.images)]
        with tqdm(total=sum(map(len, texts)), desc=self.name, unit="image", disable=not run.progress) as bar:
            found = [
                mean_codes(coder, activations(pipe, family, where, part, steps=self.steps, seed=run.seed + 10_000 * i, bar=bar))
                for i, part in enumerate(texts)
            ]
        timesteps = sorted(found[0], reverse=True)
        *targets, others = (torch.stack([means[t] for t in timesteps]) for means in found)
        chosen = [choose(score(means, others), self.percentile) for means in targets]
        for concept, which in zip(concepts, chosen, strict=True):
            if not which.any() and self.percentile < 100:
                raise ErasureError(
                    f"saeuron: at no timestep a feature fires more for {concept.name!r} than for what is retained "
                    f"({', '.join(kept) or 'our neutral prompts'}); take out of retain what looks the same, or use another autoencoder"
                )
        table = self.table(torch.tensor(timesteps), torch.stack(targets), torch.stack(chosen), others, len(kept) or len(texts[-1]))
        return SAeUronEraser(self, tuple(concepts), coder, table)

    def _check(self, pipe: Any, family: Family, coder: SparseCoder, where: str) -> None:
        """Raise unless the pipeline has that block in the autoencoder's width."""
        hint = "" if self.sae else "; the autoencoder that ships is the canvas's: train one on this model's block, and give it as sae"
        try:
            block = block_of(pipe, family, where)
        except ErasureError as error:
            raise ErasureError(f"saeuron: {error}{hint}") from error
        width = getattr(block, "out_channels", None) or getattr(block, "in_channels", None) or coder.config.d_in
        if width != coder.config.d_in:
            raise ErasureError(f"saeuron: {where} is {width} wide, and the autoencoder was made for {coder.config.d_in}{hint}")

    def table(self, timesteps: Tensor, targets: Tensor, chosen: Tensor, others: Tensor, weight: int) -> "Table":
        """What to ablate at each timestep [t]: the union of what the concepts chose, with the largest μ of those that chose it.

        Mean codes are [concepts, t, n], those of what is retained [t, n]; it counts ``weight`` times in the mean over all concepts.
        """
        union = chosen.any(0)
        if not union.any():
            log.warning("saeuron: above percentile %g there is no feature, so nothing is erased: the output is the base's", self.percentile)
        features = union.any(0).nonzero()[:, 0]
        threshold = (targets.sum(0) + weight * others) / (len(targets) + weight)
        mean = (targets * chosen).amax(0)
        return Table(timesteps, features, union[:, features], threshold[:, features], mean[:, features])

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> "SAeUronEraser":
        own = {key.removeprefix("coder."): value for key, value in tensors.items() if key.startswith("coder.")}
        table = Table(**{key: value for key, value in tensors.items() if not key.startswith("coder.")})
        config = TypeAdapter(SparseCoderConfig).validate_json(bytes(own.pop("config").tolist()))
        decoder = torch.zeros(config.num_latents, config.d_in)
        decoder[table.features] = own["W_dec"]
        coder = SparseCoder(config).eval().requires_grad_(False)
        coder.load_state_dict(own | {"W_dec": decoder})
        return SAeUronEraser(self, concepts, coder, table.checked())


@dataclass(frozen=True)
class Table:
    """What to ablate, for each timestep [t] of the fit."""

    timesteps: Tensor
    """[t]"""
    features: Tensor
    """int [m]: those that any timestep ablates."""
    chosen: Tensor
    """bool [t, m]"""
    threshold: Tensor
    """[t, m]: mean over all concepts, above which a feature is ablated."""
    mean: Tensor
    """[t, m]: mean over the concept's images."""

    def checked(self) -> "Table":
        """This table, if its shapes agree."""
        shape = (len(self.timesteps), len(self.features))
        for name in ("chosen", "threshold", "mean"):
            if (found := getattr(self, name).shape) != shape:
                raise ErasureError(f"{name} is {tuple(found)}, where timesteps and features ask for {shape}")
        return self

    def nearest(self, timestep: float) -> int:
        """The row of the timestep that is nearest."""
        return int((self.timesteps - timestep).abs().argmin())


@dataclass(frozen=True)
class SAeUronEraser(RuntimeEraser):
    """Ablates features in the output of one block."""

    method: SAeUron
    coder: SparseCoder = field(repr=False)
    table: Table = field(repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """The table, and the autoencoder with those rows of its decoder that the table names."""
        weights = {name: value.detach().cpu() for name, value in self.coder.float().state_dict().items()}
        weights["W_dec"] = weights["W_dec"][self.table.features]
        weights["config"] = torch.tensor(list(json.dumps(asdict(self.coder.config)).encode()), dtype=torch.uint8)
        return {f"coder.{name}": value for name, value in weights.items()} | vars(self.table)

    def edits(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        clock, issued = Clock(), Issued(family)
        if self.method.branches == "text":
            yield prompt.encoding(pipe, family, issued)
        yield denoiser.calls(pipe, family, clock.see)

        def edit(x: Tensor) -> Tensor:
            if self.method.branches == "both":
                return self.edit(x, clock.read())
            if (rows := issued.rows.positives) is None:
                return x
            return torch.cat([x[: rows.start], self.edit(x[rows], clock.read()), x[rows.stop :]])

        yield editing(block_of(pipe, family, self.coder.config.hookpoint), edit)

    @torch.no_grad()
    def edit(self, x: Tensor, timestep: float) -> Tensor:
        """A block's output [n, d, h, w] or [n, tokens, d] without the concept; where no chosen feature fires, ``x`` itself."""
        row = self.table.nearest(timestep)
        chosen, threshold, mean = (part[row].to(x.device) for part in (self.table.chosen, self.table.threshold, self.table.mean))
        if not chosen.any():
            return x
        wide = patches(x).to(torch.promote_types(x.dtype, torch.float32))
        coder = self.coder.to(wide)
        codes = coder.encode(wide)[..., self.table.features.to(x.device)]
        ablated = ablate(codes, chosen, threshold.to(wide), mean.to(wide), self.method.factor, self.method.rule)
        if torch.equal(codes, ablated):
            return x
        return maps(deactivate(wide, codes, ablated, coder.W_dec[self.table.features.to(x.device)]), like=x).to(x)
