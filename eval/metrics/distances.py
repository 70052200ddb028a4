"""Distances between sets of images as metrics: FID, KID, CMMD; each names features, reference and n with the number."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat

from erasure.errors import ErasureError

from ..rows import Row
from . import clip, cmmd, frechet, kid, reference
from .base import ImageMetric
from .extraction import Extractor, extractor

log = logging.getLogger("erasure")
BASE = "base"
Source = str | Path
"""``"base"`` for the base model's images of the same rows, a folder of images, or an .npz file made from one."""


class Distance(ImageMetric):
    """What the three share: an extractor, and a reference that is the base's images or lies on disk."""

    higher_is_better = False

    def __init__(self, features: Extractor, source: Source, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extractor, self.source = features, source
        self.needs = frozenset({BASE}) if source == BASE else frozenset()

    def update(self, images: Tensor, rows: Sequence[Row], base: Tensor | None = None) -> None:
        own, other = self.checked(images, rows, base)
        self.add("own", self.extractor(own))
        if other is not None:
            self.add("ref", self.extractor(other))

    @abstractmethod
    def add(self, side: str, features: Tensor) -> None:
        """Take features [n, dim] of a side, "own" or "ref"."""

    def identity(self) -> dict[str, Any]:
        origin = self.source if self.source == BASE else Path(self.source).name
        return {"name": self.name, "features": self.extractor.identity(), "reference": origin, "backend": _backend()}

    def record(self, value: float, sizes: tuple[int, int], **more: Any) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": value,
            "lo": None,
            "hi": None,
            "n": sizes[0],
            "n_reference": sizes[1],
            "interval": "none",
            "identity": self.identity(),
            "warnings": [],
            **more,
        }


class FID(Distance):
    """Fréchet Inception Distance: ``frechet.distance`` between the images' and the reference's features.

    features: "inception" (torch-fidelity's network; weights: its file, resize: a name of ``inception.RESIZERS``), or any module on
    floats in 0..1. States are sums in float64, as in torchmetrics' FrechetInceptionDistance, so memory does not grow with n.
    Under 10 000 images ``result()`` carries a warning, and the log repeats it.

    >>> from erasure.eval.rows import Row
    >>> levels = torch.linspace(0, 0.5, 8).reshape(8, 1, 1, 1).expand(8, 3, 4, 4)
    >>> colour = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> fid = FID(features=colour)
    >>> fid.update(levels + 0.5, [Row(f"row-{i}", "other", "a wall", i) for i in range(8)], base=levels)
    >>> round(fid.compute().item(), 2)  # three channels, each half a unit away
    0.75
    """

    name = "fid"

    def __init__(
        self,
        reference: Source = BASE,
        *,
        features: str | nn.Module | Extractor = "inception",
        weights: str | Path | None = None,
        resize: str = "torchmetrics",
        **kwargs: Any,
    ) -> None:
        super().__init__(extractor(features, weights=weights, resize=resize), reference, **kwargs)
        dim = self.extractor.dim
        for side in ("own", "ref") if reference == BASE else ("own",):
            self.add_state(f"{side}_n", torch.tensor(0), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self._disk: frechet.Statistics | None = None

    def add(self, side: str, features: Tensor) -> None:
        wide = features.double()
        setattr(self, f"{side}_n", getattr(self, f"{side}_n") + len(wide))
        setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + wide.sum(0))
        setattr(self, f"{side}_outer", getattr(self, f"{side}_outer") + wide.T @ wide)

    def statistics(self, side: str = "own") -> frechet.Statistics:
        """Mean, covariance and n of a side: "own", or "ref" for the reference. ``save`` them to use them as a reference."""
        if side == "ref" and self.source != BASE:
            self._disk = self._disk or reference.statistics(self.source, self.extractor, device=self.device)
            return self._disk
        n, total, outer = (getattr(self, f"{side}_{part}") for part in ("n", "sum", "outer"))
        if not n:
            raise self._nothing()
        return frechet.Statistics.of_sums(int(n), total.cpu().numpy(), outer.cpu().numpy(), self.extractor.identity())

    def compute(self) -> Tensor:
        own, ref = self.statistics(), self.statistics("ref")
        return torch.tensor(frechet.distance(own.mu, own.cov, ref.mu, ref.cov), dtype=torch.float64)

    def result(self) -> dict[str, Any]:
        own, ref = self.statistics(), self.statistics("ref")
        warnings = frechet.small_sample(min(own.n, ref.n), self.extractor.dim)
        for warning in warnings:
            log.warning("%s: %s", self.name, warning)
        return self.record(float(self.compute()), (own.n, ref.n), warnings=warnings)


class FeatureDistance(Distance):
    """A distance that needs all features, and keeps them as float32."""

    def __init__(self, features: Extractor, source: Source, **kwargs: Any) -> None:
        super().__init__(features, source, **kwargs)
        for side in ("own", "ref") if source == BASE else ("own",):
            self.add_state(side, default=[], dist_reduce_fx="cat")
        self._disk: Tensor | None = None

    def add(self, side: str, features: Tensor) -> None:
        getattr(self, side).append(features)

    def table(self, side: str = "own") -> Tensor:
        """Features [n, dim] of a side: "own", or "ref" for the reference."""
        if side == "ref" and self.source != BASE:
            if self._disk is None:
                self._disk = reference.feature_table(self.source, self.extractor, device=self.device)
            return self._disk
        if not len(getattr(self, side)):
            raise self._nothing()
        return dim_zero_cat(getattr(self, side)).cpu()


class KID(FeatureDistance):
    """Kernel Inception Distance: mean of ``kid.polynomial_mmd`` over random subsets of both sides.

    subset_size: images of a subset, the same from both sides; None takes all images once, and is then the closed form itself.
    Against the base's images of the same rows a subset takes the same rows on both sides, and leaves out the terms of a row with
    itself, see ``polynomial_mmd(paired=True)``; identity says so. lo and hi are None: subsets overlap, and their spread (``std``)
    is no interval.
    """

    name = "kid"

    def __init__(
        self,
        reference: Source = BASE,
        *,
        features: str | nn.Module | Extractor = "inception",
        weights: str | Path | None = None,
        resize: str = "torchmetrics",
        subsets: int = 100,
        subset_size: int | None = 1000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(extractor(features, weights=weights, resize=resize), reference, **kwargs)
        if subsets < 1 or (subset_size is not None and subset_size < 2):
            raise ErasureError(f"KID takes one subset or more, of two images or more; got {subsets} of {subset_size}")
        self.subsets, self.subset_size, self.seed = (1 if subset_size is None else subsets), subset_size, seed
        self.paired = reference == BASE

    def compute(self) -> Tensor:
        return torch.tensor(np.mean(self.draws()), dtype=torch.float64)

    def draws(self) -> list[float]:
        """The distance of each subset."""
        own, ref = self.table().numpy(), self.table("ref").numpy()
        size, smaller = self.subset_size, min(len(own), len(ref))
        if size is None:
            return [kid.polynomial_mmd(own, ref, paired=self.paired)]
        if smaller < size:
            raise ErasureError(f"KID in subsets of {size} was given {smaller} images: make more, or set subset_size (None: all of them)")
        rng, drawn = np.random.default_rng(self.seed), []
        for _ in range(self.subsets):
            # Sorted, so that a subset of everything gives the closed form's very bits.
            first = np.sort(rng.choice(len(own), size, replace=False))
            second = first if self.paired else np.sort(rng.choice(len(ref), size, replace=False))
            drawn.append(kid.polynomial_mmd(own[first], ref[second], paired=self.paired))
        return drawn

    def identity(self) -> dict[str, Any]:
        options = {"subsets": self.subsets, "subset_size": self.subset_size, "seed": self.seed, "paired": self.paired}
        return {**super().identity(), **options}

    def result(self) -> dict[str, Any]:
        drawn = self.draws()
        spread = float(np.std(drawn, ddof=1)) if len(drawn) > 1 else None
        return self.record(float(np.mean(drawn)), (len(self.table()), len(self.table("ref"))), std=spread)


class CMMD(FeatureDistance):
    """CLIP Maximum Mean Discrepancy: ``cmmd.mmd`` of normalised CLIP image embeddings.

    model, pretrained: of open_clip, see ``clip.load``; the paper's are the default. features: any module or extractor in their place.
    """

    name = "cmmd"

    def __init__(
        self,
        reference: Source = BASE,
        *,
        model: str = "ViT-L-14-336",
        pretrained: str | None = "openai",
        features: nn.Module | Extractor | None = None,
        estimator: cmmd.Estimator = "biased",
        **kwargs: Any,
    ) -> None:
        super().__init__(clip.load(model, pretrained).extractor if features is None else extractor(features), reference, **kwargs)
        self.estimator: cmmd.Estimator = estimator

    def add(self, side: str, features: Tensor) -> None:
        super().add(side, nn.functional.normalize(features, dim=1))

    def compute(self) -> Tensor:
        own, ref = (self.table(side).to(self.device) for side in ("own", "ref"))
        return torch.tensor(cmmd.mmd(own, nn.functional.normalize(ref, dim=1), estimator=self.estimator), dtype=torch.float64)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "estimator": self.estimator, "sigma": cmmd.SIGMA, "scale": cmmd.SCALE}

    def result(self) -> dict[str, Any]:
        return self.record(float(self.compute()), (len(self.table()), len(self.table("ref"))))


def _backend() -> str:
    return f"erasure on torchmetrics {version('torchmetrics')}"
