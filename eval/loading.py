"""The images of a cell in batches of one size, each read once, by worker processes where that pays."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from erasure.errors import ErasureError

from .rows import Row
from .store import Cell, read_image

SIZE = 32
FEW = 256
"""Images that one process has read before workers have started."""

Item = tuple[Row, Path, str]


@dataclass(frozen=True)
class Batch:
    """Rows with their images, uint8 [n, 3, h, w], and the base model's images of the same rows where they were asked for."""

    rows: tuple[Row, ...]
    images: Tensor
    base: Tensor | None = None


def batches(cell: Cell, base: Cell | None = None, *, size: int = SIZE, workers: int | None = None) -> Iterator[Batch]:
    """Every image of a cell once, beside the base's of the same row; rows of one size together, else in the order of the suite.

    workers: processes that read and decode; 0 reads here, None chooses by the number of images. Raises ErasureError for a missing or
    damaged image, for sizes that differ where the rows' do not, and for a base that answered other rows.
    """
    items = cell.files()
    partners = _partners(cell, items, base) if base is not None else None
    loader = DataLoader(
        _Images(items, partners),
        batch_sampler=_alike([row for row, _, _ in items], size),
        num_workers=default_workers(len(items)) if workers is None else workers,
        collate_fn=_together,
    )
    for found in loader:
        if isinstance(found, ErasureError):
            raise found
        rows, images, references = found
        yield Batch(rows, torch.from_numpy(images), None if references is None else torch.from_numpy(references))


def default_workers(images: int) -> int:
    """One process for few images, whose reading is over before workers have started; else up to four."""
    return 0 if images < FEW else min(4, os.cpu_count() or 1)


def same_rows(first: Sequence[Row], second: Sequence[Row]) -> bool:
    """Whether rows are the same images' of the same prompts from the same seeds, which pairing takes for granted."""
    return [(r.id, r.prompt, r.seed) for r in first] == [(r.id, r.prompt, r.seed) for r in second]


def _partners(cell: Cell, items: Sequence[Item], base: Cell) -> list[Item]:
    if not same_rows(cell.rows, base.rows):
        raise ErasureError(
            f"{cell.folder} and {base.folder} answer other rows (ids, prompts or seeds differ): a difference to the base is paired on "
            "seeds, so generate both from one suite and concept"
        )
    return base.files([row for row, _, _ in items])


def _alike(rows: Sequence[Row], size: int) -> list[list[int]]:
    groups: dict[tuple[int | None, int | None], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row.height, row.width), []).append(i)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


Read = tuple[Item, np.ndarray, np.ndarray | None]
Loaded = tuple[tuple[Row, ...], np.ndarray, np.ndarray | None]


class _Images(Dataset[Read | ErasureError]):
    """What workers run. Errors are handed over as values, since a loader would wrap them in the worker's traceback."""

    def __init__(self, items: Sequence[Item], partners: Sequence[Item] | None) -> None:
        self.items, self.partners = items, partners

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Read | ErasureError:
        item = self.items[index]
        try:
            own = read_image(*item[1:]).numpy()
            return item, own, read_image(*self.partners[index][1:]).numpy() if self.partners else None
        except ErasureError as error:
            return error


def _together(found: list[Read | ErasureError]) -> Loaded | ErasureError:
    """A batch as arrays, which travel through a pipe: shared memory is small in containers."""
    read: list[Read] = []
    for one in found:
        if isinstance(one, ErasureError):
            return one
        read.append(one)
    first = read[0]
    for item, own, partner in read:
        for image in (own, own if partner is None else partner):
            if image.shape != first[1].shape:
                return ErasureError(
                    f"mixed sizes: {item[1]} of row {item[0].id} and its partner should have the {_size(first[1])} of row "
                    f"{first[0][0].id}, one has {_size(image)}: remove its chunk and generate again"
                )
    bases = [partner for _, _, partner in read if partner is not None]
    return tuple(item[0] for item, _, _ in read), np.stack([own for _, own, _ in read]), np.stack(bases) if bases else None


def _size(image: np.ndarray) -> str:
    return f"{image.shape[2]} x {image.shape[1]} pixels"
