"""The protocol of metrics on images: torchmetrics' update, compute, merge and reset, with records that intervals need."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from erasure.errors import ErasureError

from .. import stats
from ..rows import Row
from .extraction import shared_features

END = "\0"
"""Ends a text among the bytes of a text state."""


class ImageMetric(Metric):
    """One number on a set of images.

    ``update(images, rows, base=None)`` takes a batch: images [n, 3, h, w], uint8 or floats in 0..1, their n rows, and the base
    model's images of the same rows where ``needs`` says "base". Floats are rounded to 8 bits first, so that an image scores the
    same from memory as from its file. Models load at the first update. ``compute()`` is the number as a tensor, ``result()`` the
    record of it. No images, another shape, values outside the range and unequal numbers raise ErasureError.
    """

    name: ClassVar[str]
    is_differentiable = False
    full_state_update = False
    needs: frozenset[str] = frozenset()
    """Of "prompts" and "base": what updates must bring beside images and row ids."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that two numbers must share before they may be compared: options, model, hash of its weights, backend."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """A JSON-able record: name, value, lo and hi (None without an interval), n, interval, identity, warnings."""

    def checked(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The batch as uint8 on the metric's device; base is None unless the metric needs it."""
        own = as_bytes(images, self.name).to(self.device)
        if len(rows) != len(own):
            raise ErasureError(f"{self.name} was given {len(own)} images of {len(rows)} rows")
        if "base" not in self.needs:
            return own, None
        if base is None:
            raise ErasureError(f"{self.name} compares with the base model's images of the same rows: give them as base=")
        reference = as_bytes(base, self.name).to(self.device)
        if len(reference) != len(own):
            raise ErasureError(f"{self.name} was given {len(own)} images and {len(reference)} of the base")
        return own, reference

    def _nothing(self) -> ErasureError:
        return ErasureError(f"{self.name} has seen no images: a score of none would be meaningless")


class SampleMetric(ImageMetric):
    """A metric with values for every image; the number is their mean.

    Subclasses give ``fields``, the first of which is the number, and ``measure(images, rows, base) -> [n, fields]`` on uint8 images;
    NaN where a value does not apply to a row.
    """

    fields: ClassVar[tuple[str, ...]]
    ids: list[Tensor]
    prompts: list[Tensor]
    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Texts are kept as bytes, which torchmetrics can move, gather and merge like any other state.
        for state in ("ids", "prompts", "values"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    @abstractmethod
    def measure(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        """Values [n, fields] of uint8 images [n, 3, h, w]."""

    def update(self, images: Tensor, rows: Sequence[Row], base: Tensor | None = None) -> None:
        own, reference = self.checked(images, rows, base)
        with torch.inference_mode():
            values = self.measure(own, rows, reference).detach().float().reshape(len(own), len(self.fields))
        if values[:, 0].isinf().any() or (values[:, 0].isnan().any() and not self.may_skip):
            bad = [row.id for row, value in zip(rows, values[:, 0].tolist(), strict=True) if not np.isfinite(value)]
            raise ErasureError(f"{self.name} is not a number for the rows {', '.join(bad)}: look at their images")
        self.ids.append(_pack([row.id for row in rows], self.device))
        self.prompts.append(_pack([row.prompt for row in rows], self.device))
        self.values.append(values.clone().to(self.device))

    may_skip: ClassVar[bool] = False
    """Whether rows may have no value, because their prompt asks for nothing that the metric looks at."""

    def compute(self) -> Tensor:
        """Mean of the first field over the rows that have one."""
        first = self._table()[2][:, 0]
        return first[~first.isnan()].double().mean().float()

    def samples(self) -> dict[str, dict[str, float | None]]:
        """Row id -> field -> value; None where it does not apply. Raises ErasureError for no images or a row given twice."""
        ids, _, values = self._table()
        cells = [[None if value != value else value for value in row] for row in values.tolist()]
        return {row: dict(zip(self.fields, cell, strict=True)) for row, cell in zip(ids, cells, strict=True)}

    def result(self) -> dict[str, Any]:
        """The record of the first field, and under ``fields`` the mean with its interval of each."""
        _, prompts, values = self._table()
        columns = values.double().cpu().numpy().T
        fields = {field: mean_with_interval(column, prompts) for field, column in zip(self.fields, columns, strict=True)}
        head = fields[self.fields[0]]
        if head is None:
            raise ErasureError(f"{self.name} applies to none of the {len(prompts)} rows")
        return {"name": self.name, **head, "fields": fields, "identity": self.identity(), "warnings": self.warnings()}

    def warnings(self) -> list[str]:
        """What a reader must know beside the number."""
        return []

    def _table(self) -> tuple[list[str], list[str], Tensor]:
        # After a merge or a gather torchmetrics holds the concatenation instead of the list.
        if not len(self.ids):
            raise self._nothing()
        ids, prompts, values = (dim_zero_cat(state) for state in (self.ids, self.prompts, self.values))
        names = _unpack(ids)
        if len(set(names)) != len(names):
            twice = sorted({row for row in names if names.count(row) > 1})
            raise ErasureError(f"{self.name} was given rows more than once: {', '.join(twice[:5])}; reset it between runs")
        return names, _unpack(prompts), values


class Panel:
    """Metrics that are fed together: every batch is handed to all of them, and features that several use are taken once."""

    def __init__(self, metrics: Sequence[ImageMetric]) -> None:
        self.metrics = {metric.name: metric for metric in metrics}
        if not metrics or len(self.metrics) != len(metrics):
            raise ErasureError(f"a panel takes one metric or more, each name once; got {[metric.name for metric in metrics]}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(metric.needs for metric in self.metrics.values()))

    def update(self, images: Tensor, rows: Sequence[Row], base: Tensor | None = None) -> None:
        device = next(iter(self.metrics.values())).device
        images = as_bytes(images, "scoring").to(device)
        base = None if base is None else as_bytes(base, "scoring").to(device)
        with shared_features():
            for metric in self.metrics.values():
                metric.update(images, rows, base=base)

    def results(self) -> dict[str, dict[str, Any]]:
        """Metric name -> record."""
        return {name: metric.result() for name, metric in self.metrics.items()}

    def samples(self) -> dict[str, dict[str, float | None]]:
        """Row id -> "metric.field" -> value, of all metrics that have values for every image."""
        merged: dict[str, dict[str, float | None]] = {}
        for name, metric in self.metrics.items():
            if isinstance(metric, SampleMetric):
                for row, values in metric.samples().items():
                    merged.setdefault(row, {}).update({f"{name}.{field}": value for field, value in values.items()})
        return merged

    def reset(self) -> None:
        for metric in self.metrics.values():
            metric.reset()


def as_bytes(images: Tensor, who: str = "metrics") -> Tensor:
    """Images [n, 3, h, w] as uint8, rounded as an image file would; raises ErasureError for what is not such a batch.

    >>> as_bytes(torch.full((1, 3, 1, 1), 0.5)).flatten().tolist()
    [128, 128, 128]
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ErasureError(f"{who} takes images [n, 3, h, w] with n, h, w >= 1, got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ErasureError(f"{who} takes images as uint8 or as floats in 0..1, got {images.dtype}")
    lowest, highest = images.aminmax()
    if not (lowest >= 0 and highest <= 1):  # NaN fails too
        raise ErasureError(f"{who} takes float images in 0..1, got values from {lowest.item():.4g} to {highest.item():.4g}")
    return (images.float() * 255).round().to(torch.uint8)


def as_unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0..1."""
    return images.float() / 255


def mean_with_interval(values: ArrayLike, prompts: Sequence[str]) -> dict[str, Any] | None:
    """Mean of values [n] with the 95 % interval of a bootstrap over prompts, NaN left out; None if nothing is left.

    >>> mean_with_interval([1.0, float("nan"), 1.0], ["a cat", "a dog", "a bird"])["lo"]
    1.0
    """
    column = np.asarray(values, dtype=np.float64)
    kept = np.flatnonzero(~np.isnan(column)).tolist()
    if not len(kept):
        return None
    asked = [prompts[i] for i in kept]
    distinct = len(set(asked))
    record: dict[str, Any] = {"value": float(column[kept].mean()), "lo": None, "hi": None, "n": len(kept), "prompts": distinct}
    if distinct < 2:
        return {**record, "interval": "none: fewer than two prompts"}
    lo, hi = stats.cluster_bootstrap(column[kept], asked)
    return {**record, "lo": lo, "hi": hi, "interval": "percentile bootstrap over prompts"}


def _pack(texts: Sequence[str], device: torch.device) -> Tensor:
    if any(END in text for text in texts):
        raise ErasureError("row ids and prompts hold no NUL character")
    data = "".join(text + END for text in texts).encode()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _unpack(data: Tensor) -> list[str]:
    return bytes(data.cpu().tolist()).decode().split(END)[:-1]
